"""The class of transformers that a configuration names, taken apart into trunk and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.runtime.misfit import NotAppliableError
from deltafold.runtime.renaming import renaming

#: What building or running a class of transformers may raise.
FAILURES: Final = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
#: Flags that say how a trunk answers, not what.
_MANNERS: Final = frozenset({"return_dict", "use_cache"})


class TrunkOutput(nn.Module):
    """Stands in the trunk's place and says what it said.

    Attributes:
        output: that.
        asked: flags that the class around it set when it last asked, such as `output_hidden_states`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.output: Any = None
        self.asked: frozenset[str] = frozenset()

    def forward(self, *_: Any, **kwargs: Any) -> Any:
        """The shared trunk's output, whatever is asked."""
        self.asked = frozenset(n for n, v in kwargs.items() if v is True) - _MANNERS
        return self.output


@dataclass(frozen=True)
class Plan:
    """A class of transformers whose parameters have shapes, but no values yet.

    Attributes:
        folder: whose configuration names it.
        model: on the meta device, its trunk replaced.
        prefix: the trunk's name in it, and before the names of the trunk's tensors.
        trunk_class: its own trunk's class; None where the class is a trunk itself.
        trunk: names of the tensors that its own trunk has.
        own: names of the others: the head's. None where the class is a trunk itself.
        tied: its tensors that are others under a second name.
        rename: from a checkpoint's names to the class's.
    """

    folder: Path
    model: nn.Module
    prefix: str
    trunk_class: type[nn.Module] | None
    trunk: frozenset[str]
    own: frozenset[str]
    tied: Mapping[str, str]
    rename: Callable[[str], str]

    @property
    def place(self) -> TrunkOutput:
        """What stands in the trunk's place."""
        found = self.model.get_submodule(self.prefix)
        assert isinstance(found, TrunkOutput)
        return found

    def bare(self, name: str) -> str:
        """A checkpoint's name of a tensor, as the trunk by itself calls it."""
        return self.within(self.rename(name))

    def within(self, name: str) -> str:
        """A tensor's name within the trunk."""
        return name.removeprefix(f"{self.prefix}.") if self.prefix else name

    def unsupported(
        self, what: str, *, names: Sequence[str] = (), says: str = ""
    ) -> NotAppliableError:
        """The error for a class that cannot be run on the shared trunk.

        Args:
            what: stands in the way.
            names: of tensors that it is about.
            says: the reason where it is about none.
        """
        name = type(self.model).__name__
        found = ("first", name_some(names, len(names))) if names else ("reason", says)
        return NotAppliableError(
            "engine-unsupported",
            f"{self.folder}: its class {name} {what}.",
            tensor=names[0] if names else name,
            facts=[found],
            fix="serve it with --rebuild auto, or restore this variant and serve it by itself",
        )


def plan_of(folder: Path) -> Plan | None:
    """The class that a folder's configuration names; None where transformers has none."""
    config, cls = named_class(folder)
    if cls is None:
        return None
    try:
        with torch.device("meta"):
            model = cls(config)
    except FAILURES:
        return None
    prefix, names = str(cls.base_model_prefix or ""), set(model.state_dict())
    rename, trunk = renaming(model), getattr(model, prefix or "_", None)
    if not isinstance(trunk, nn.Module):
        return Plan(folder, model, prefix, None, frozenset(names), frozenset(), {}, rename)
    setattr(model, prefix, TrunkOutput())
    own = frozenset(model.state_dict())
    tied = getattr(model, "_tied_weights_keys", None)
    pairs = dict(tied) if isinstance(tied, Mapping) else {}
    if not getattr(config.get_text_config(), "tie_word_embeddings", True):
        pairs = {}
    others = frozenset(names) - own
    return Plan(folder, model.eval(), prefix, type(trunk), others, own, pairs, rename)


def refused_input(model: nn.Module, error: ValueError) -> DeltafoldError:
    """The error for a request that a class of transformers does not take."""
    return DeltafoldError(
        "bad-argument",
        f"{type(model).__name__} does not take this input.",
        facts=[("it says", (str(error) or repr(error)).splitlines()[0])],
    )


def named_class(folder: Path) -> tuple[Any, Any]:
    """Configuration and class of transformers for a folder; None where there is none."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, *FAILURES):
        return None, None
    names = getattr(config, "architectures", None) or [""]
    return config, getattr(transformers, names[0], None) if names[0] else None
