"""Which vLLM this plugin is written for. Any other one must start as if the plugin were not there."""

from __future__ import annotations

import logging
from functools import cache, wraps
from typing import Any, Final

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.vllm.settings import settings_of

_log = logging.getLogger(__name__)
#: Releases whose classes were read.
_KNOWN: Final = ((0, 32), (0, 33))


@cache
def is_known() -> bool:
    """Whether the plugin fits the installed vLLM. If not, it is logged, and engines that are started
    with deltas are refused.
    """
    import vllm

    if tuple(vllm.__version_tuple__[:2]) in _KNOWN:
        return True
    _log.warning("deltafold serves no deltas in vLLM %s, %s.", vllm.__version__, _wanted())
    _refuse_deltas(vllm.__version__)
    return False


def _wanted() -> str:
    return "only in " + " and ".join(f"{major}.{minor}" for major, minor in _KNOWN)


def _refuse_deltas(version: str) -> None:
    from vllm.config import VllmConfig

    config: Any = VllmConfig
    stock = config.__post_init__

    @wraps(stock)
    def __post_init__(self: Any, *args: Any) -> None:  # noqa: N807
        if settings_of(self.additional_config) is not None:
            raise DeltafoldError(
                "engine-unsupported",
                f"deltas cannot be served in vLLM {version}, {_wanted()}.",
                fix="pip install 'deltafold[vllm]'",
            )
        stock(self, *args)

    config.__post_init__ = __post_init__
