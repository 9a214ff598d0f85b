"""The plugin's settings: the `deltafold` entry of vLLM's `--additional-config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltafold.compress.errors import DeltafoldError

KEY = "deltafold"


@dataclass(frozen=True)
class Settings:
    """What may be set, as JSON.

    Attributes:
        zoo: folder of deltas that are served by name without being loaded first; "" is none.
        slots: `forms` keeps every variant in its fastest CPU form. On a GPU, whose slots are allocated
            at the start: `packed` has room for what the zoo's variants need, `dense` a copy of every
            parameter. `auto` is `forms` on a CPU, and on a GPU `packed` if there is a zoo.
        any_path: whether clients may load deltas from outside the zoo (where vLLM was told to let
            them load anything at all).
        pin: names of the zoo that are loaded at the start and stay in host memory, whatever else is
            asked for. A server's setting; offline there is `LLMEngine.pin_lora`.
        base: folder or hub id of the checkpoint that the deltas were packed against, where vLLM serves
            a quantised copy of it under other tensor names; "" where it is vLLM's own model.
    """

    zoo: str = ""
    slots: str = "auto"
    any_path: bool = True
    pin: Sequence[str] = ()
    base: str = ""

    def __post_init__(self) -> None:
        if self.slots not in ("auto", "forms", "packed", "dense"):
            raise _bad(f"slots cannot be {self.slots!r}; it is auto, forms, packed or dense")
        texts = isinstance(self.zoo, str) and isinstance(self.base, str)
        if not texts or not isinstance(self.any_path, bool):
            raise _bad("zoo and base are names of folders, any_path is true or false")
        if isinstance(self.pin, str) or not all(isinstance(name, str) for name in self.pin):
            raise _bad("pin is a list of names")


def settings_of(additional_config: object) -> Settings | None:
    """The settings in vLLM's additional configuration; None where deltafold is not asked for.

    Raises:
        DeltafoldError: `bad-argument`.
    """
    if not isinstance(additional_config, Mapping) or KEY not in additional_config:
        return None
    given: Any = additional_config[KEY]
    known = {f.name for f in dataclasses.fields(Settings)}
    if not isinstance(given, Mapping) or set(given) - known:
        raise _bad(f"it is an object with the keys {', '.join(sorted(known))}")
    return Settings(**given)


def _bad(why: str) -> DeltafoldError:
    return DeltafoldError(
        "bad-argument",
        f"--additional-config: {KEY}: {why}.",
        fix='--additional-config \'{"deltafold": {"zoo": "zoo"}}\'',
    )
