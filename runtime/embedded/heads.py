"""A variant's own class on the shared trunk: classification heads, poolers of labels, reward heads.

The trunk (`BertModel`, `ViTModel`, `LlamaModel`, ...) runs once for a mixed batch. Each variant's
configuration names its own class of transformers; that class is built without its trunk, and in the
trunk's place stands what the shared one said about the variant's requests. So pooling, activation and
every odd way of reading hidden states are the class's own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from deltafold.compress import Checkpoint, DeltafoldError, DeltaRepo
from deltafold.compress.errors import name_some
from deltafold.runtime.renaming import renaming

#: Heads kept ready; they are small beside their variants, and made again on use.
_KEPT: Final = 256
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)


class _TrunkOutput(nn.Module):
    """Stands in the trunk's place and says what it said."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        """The shared trunk's output, whatever is asked."""
        return self.output


@dataclass(frozen=True)
class Plan:
    """A class of transformers whose parameters have shapes, but no values yet.

    Attributes:
        folder: whose configuration names it.
        model: on the meta device, its trunk replaced.
        prefix: the trunk's name in it, and before the names of the trunk's tensors.
        trunk: names of the tensors that its own trunk has.
        own: names of the others: the head's. None where the class is a trunk itself.
        tied: its tensors that are others under a second name.
        rename: from a checkpoint's names to the class's.
    """

    folder: Path
    model: nn.Module
    prefix: str
    trunk: frozenset[str]
    own: frozenset[str]
    tied: Mapping[str, str]
    rename: Callable[[str], str]

    def bare(self, name: str) -> str:
        """A checkpoint's name of a tensor, as the trunk by itself calls it."""
        return _bare(self.rename(name), self.prefix)


def plan_of(folder: Path) -> Plan | None:
    """The class that a folder's configuration names; None where transformers has none."""
    config, cls = named_class(folder)
    if cls is None:
        return None
    try:
        with torch.device("meta"):
            model = cls(config)
    except _FAILURES:
        return None
    prefix, names = str(cls.base_model_prefix or ""), set(model.state_dict())
    rename = renaming(model)
    if not isinstance(getattr(model, prefix or "_", None), nn.Module):
        return Plan(folder, model, prefix, frozenset(names), frozenset(), {}, rename)
    setattr(model, prefix, _TrunkOutput())
    own = frozenset(model.state_dict())
    tied = getattr(model, "_tied_weights_keys", None)
    pairs = dict(tied) if isinstance(tied, Mapping) else {}
    if not getattr(config.get_text_config(), "tie_word_embeddings", True):
        pairs = {}
    return Plan(folder, model.eval(), prefix, frozenset(names) - own, own, pairs, rename)


def named_class(folder: Path) -> tuple[Any, Any]:
    """Configuration and class of transformers for a folder; None where there is none."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, *_FAILURES):
        return None, None
    names = getattr(config, "architectures", None) or [""]
    return config, getattr(transformers, names[0], None) if names[0] else None


class Head:
    """One variant's class, ready to run on the shared trunk's output. For one thread at a time."""

    def __init__(self, plan: Plan, values: Mapping[str, torch.Tensor]) -> None:
        self._plan = plan
        self.config: Any = plan.model.config
        plan.model.load_state_dict(dict(values), strict=True, assign=True)
        left = [
            n for n, t in (*plan.model.named_parameters(), *plan.model.named_buffers()) if t.is_meta
        ]
        if left:
            raise _unsupported(plan, "cannot be built without its trunk", left)
        self._inputs = _accepted(plan.model)

    def run(self, inputs: Mapping[str, Any], trunk: Any) -> Mapping[str, Any]:
        """The class's own output for some requests.

        Args:
            inputs: what the trunk was given for them.
            trunk: what it returned for them.
        """
        place = self._plan.model.get_submodule(self._plan.prefix)
        assert isinstance(place, _TrunkOutput)
        place.output = trunk
        try:
            kept = {n: v for n, v in inputs.items() if n in self._inputs}
            output = self._plan.model(**kept, return_dict=True)
        finally:
            place.output = None
        assert isinstance(output, Mapping), type(output)
        return output

    @property
    def folder(self) -> Path:
        """Whose head it is."""
        return self._plan.folder

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(p.numel() * p.element_size() for p in self._plan.model.parameters())


def _accepted(model: nn.Module) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)


@dataclass(frozen=True)
class Trunk:
    """What heads need to know of the shared model.

    Attributes:
        tensors: its tensors, and the names under which each of them is known.
        lacking: those that the base's checkpoint does not bring.
        dispensable: those that have no say in its hidden states, such as a pooler's.
        device: where it is.
        dtype: what it computes in.
        sample: inputs of one request, and what it returned for them. Each head is tried on it.
    """

    tensors: Mapping[str, frozenset[str]]
    lacking: frozenset[str]
    dispensable: frozenset[str]
    device: torch.device
    dtype: torch.dtype
    sample: tuple[Mapping[str, Any], Any]


class Heads:
    """Heads by the digest of their delta, made on first use. Thread-safe."""

    def __init__(self, base: Checkpoint, trunk: Trunk) -> None:
        self._base, self._trunk = base, trunk
        self._heads: OrderedDict[str, Head] = OrderedDict()
        self._lacking: dict[str, frozenset[str]] = {}
        self._lock = threading.Lock()

    def beside(self, repo: DeltaRepo) -> frozenset[str]:
        """Tensors of a delta that its head takes, or that its class can do without.

        Raises:
            DeltafoldError: `engine-unsupported` where the variant lacks a tensor of the trunk that it
                needs: the base's would answer for it.
        """
        plan = plan_of(repo.folder)
        if plan is None:
            return frozenset()
        lost = self._without(repo, plan)
        own = {_bare(n, plan.prefix) for n in plan.trunk}
        needed = sorted(lost & own | lost - self._trunk.dispensable)
        if needed:
            raise _unsupported(plan, "does not bring tensors that the shared model needs", needed)
        manifest = repo.manifest
        head = {n for n in manifest.tensors if plan.rename(n) in plan.own}
        return frozenset(head | {n for n in manifest.absent if plan.bare(n) in lost})

    def resident(self) -> dict[str, int]:
        """Bytes in memory by name of the folder that a head was loaded from."""
        with self._lock:
            return {head.folder.name: head.nbytes for head in self._heads.values()}

    def without(self, digest: str, folder: Path | None) -> frozenset[str]:
        """The trunk's tensors for which a variant (None: the base) has no value of its own."""
        if folder is None:
            return self._trunk.lacking
        with self._lock:
            if digest not in self._lacking:
                self._lacking[digest] = self._without(DeltaRepo.open(folder), plan_of(folder))
            return self._lacking[digest]

    def get(self, digest: str, repo: DeltaRepo | None) -> Head:
        """The head of a variant, or of the base (None).

        Raises:
            DeltafoldError: `bad-argument` where the model has no head; `engine-unsupported` where
                it cannot be run on the shared trunk; and what reading a delta gives.
        """
        with self._lock:
            if digest not in self._heads:
                self._heads[digest] = self._make(repo)
                while len(self._heads) > _KEPT:
                    self._heads.popitem(last=False)
            self._heads.move_to_end(digest)
            return self._heads[digest]

    def _make(self, repo: DeltaRepo | None) -> Head:
        folder = self._base.folder if repo is None else repo.folder
        plan = plan_of(folder)
        if plan is None or not plan.own:
            raise DeltafoldError(
                "bad-argument",
                f"{folder.name} has no head: its class ends where the shared model does.",
                fix="ask it for embeddings, or name a variant that classifies",
            )
        head = Head(plan, self._values(plan, repo))
        inputs, output = self._trunk.sample
        try:
            with torch.inference_mode():
                head.run(inputs, output)
        except _FAILURES as error:
            raise _unsupported(
                plan, "cannot be run on the shared model's output", [str(error)]
            ) from error
        return head

    def _values(self, plan: Plan, repo: DeltaRepo | None) -> dict[str, torch.Tensor]:
        known = self._base.names() if repo is None else repo.variant_names()
        stored = {plan.rename(name): name for name in known}
        values, lost = {}, []
        for name in sorted(plan.own):
            source = stored.get(name, stored.get(plan.tied.get(name, "")))
            if source is None:
                lost.append(name)
                continue
            value = self._value(source, repo)
            dtype = self._trunk.dtype if value.is_floating_point() else value.dtype
            values[name] = value.to(self._trunk.device, dtype)
        if lost:
            raise _unsupported(plan, "does not have all tensors of its class", lost)
        return values

    def _value(self, name: str, repo: DeltaRepo | None) -> torch.Tensor:
        """A checkpoint's tensor as the variant has it."""
        if repo is None:
            return self._base.tensor(name)
        base = repo.base_tensor(self._base, name)
        if name in repo.manifest.tensors:
            return repo.restored(name, base)
        assert base is not None
        return base

    def _without(self, repo: DeltaRepo, plan: Plan | None) -> frozenset[str]:
        manifest, known = repo.manifest, self._trunk.tensors

        def bare(name: str) -> str:
            return name if plan is None else plan.bare(name)

        brought: set[str] = set()
        for name in (*manifest.tensors, *manifest.unchanged):
            brought |= known.get(bare(name), frozenset())
        gone = {bare(n) for n in manifest.absent} & set(known)
        return (self._trunk.lacking | gone) - brought


def _bare(name: str, prefix: str) -> str:
    """A tensor's name within the trunk."""
    return name.removeprefix(f"{prefix}.") if prefix else name


def _unsupported(plan: Plan, what: str, names: list[str]) -> DeltafoldError:
    return DeltafoldError(
        "engine-unsupported",
        f"{plan.folder}: its class {type(plan.model).__name__} {what}.",
        facts=[("first", name_some(names, len(names)))],
        fix="restore this variant and serve it by itself",
    )
