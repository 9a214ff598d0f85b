"""From a delta repo to what the hooks add: every tensor placed, counted, and in its fastest form."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from deltafold.compress import Checkpoint, DeltafoldError, DeltaRepo
from deltafold.compress.errors import name_some
from deltafold.compress.repo import pad_rows
from deltafold.compress.terms import Context, Encoded
from deltafold.runtime.kernels.base import DeltaMatrix
from deltafold.runtime.kernels.forms import Target, product_form, table_form
from deltafold.runtime.kernels.reference import dense_delta
from deltafold.runtime.layers import is_embedding, is_linear
from deltafold.runtime.slots import Slot, SlotMap


@dataclass
class LoadedVariant:
    """A variant in memory.

    Attributes:
        digest: of the delta's content.
        folder: the delta repo.
        products: forms for linear layers, by module name.
        tables: forms for embeddings, by module name.
        vectors: float32 differences of everything else, by slot name.
        modules: every module that the variant changes.
        applied: tensors of the delta that found their place.
    """

    digest: str
    folder: Path
    products: dict[str, DeltaMatrix] = field(default_factory=dict)
    tables: dict[str, DeltaMatrix] = field(default_factory=dict)
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    applied: set[str] = field(default_factory=set)
    _by_module: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def vectors_of(self, module: str) -> dict[str, torch.Tensor]:
        """Differences of one module's own tensors, by attribute."""
        return self._by_module.get(module, {})

    def add_vector(self, slot: Slot, delta: torch.Tensor) -> None:
        """Keep a difference of one slot."""
        self.vectors[slot.name] = delta
        self._by_module.setdefault(slot.module_name, {})[slot.attribute] = delta

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        forms = {id(f): f.nbytes for f in (*self.products.values(), *self.tables.values())}
        vectors = {id(v): v.numel() * v.element_size() for v in self.vectors.values()}
        return sum(forms.values()) + sum(vectors.values())


@dataclass(frozen=True)
class Handle:
    """A loaded variant under the name that a request used."""

    name: str
    loaded: LoadedVariant

    @property
    def digest(self) -> str:
        """The delta's content digest."""
        return self.loaded.digest

    @property
    def folder(self) -> Path:
        """The delta repo."""
        return self.loaded.folder


def load_variant(
    repo: DeltaRepo, base: Checkpoint, slots: SlotMap, target: Target
) -> LoadedVariant:
    """Read a whole delta and check that all of it can be applied.

    Raises:
        DeltafoldError: `checksum` and what else reading gives; `coverage` where a tensor has no place
            in the model; `engine-unsupported` where applying it would have no or a wrong effect.
    """
    loaded = LoadedVariant(repo.digest, repo.folder)
    place = _places(repo, slots)
    for tensor, names in place.items():
        _load_tensor(loaded, repo, base, slots, target, tensor, names)
    missing = sorted(set(repo.manifest.tensors) - loaded.applied)
    assert not missing, missing
    return loaded


def _places(repo: DeltaRepo, slots: SlotMap) -> dict[str, list[str]]:
    """The slots of each coded tensor. A tied parameter's other slots follow it, unless the
    fine-tune unties them by bringing a tensor of their own.
    """
    found = {tensor: slots.find(tensor) for tensor in repo.manifest.tensors}
    lost = sorted(t for t, name in found.items() if name is None)
    if lost:
        raise DeltafoldError(
            "coverage",
            f"{repo.folder}: the model has no place for {len(lost)} tensors of this variant.",
            facts=[("without a place", name_some(lost, len(found)))],
            fix="nothing is served below 100 %; restore this variant and serve it by itself",
        )
    own = set(found.values())
    places = {}
    for tensor, name in found.items():
        assert name is not None
        ties = [n for n in slots.tied_to(name) if n == name or n not in own]
        places[tensor] = ties
    return places


def _load_tensor(
    loaded: LoadedVariant,
    repo: DeltaRepo,
    base: Checkpoint,
    slots: SlotMap,
    target: Target,
    tensor: str,
    names: list[str],
) -> None:
    entry = repo.entry(tensor)
    shape = tuple(entry.shape)
    encoded = repo.parts(tensor)
    stored_base = base.tensor(tensor) if tensor in base else None
    called = False
    for name in names:
        slot = slots.slots[name]
        if not _reachable(slots, slot, tensor, repo):
            continue
        called = True
        # An untied head has no base tensor of its own: what the model runs there is the tied one.
        basis = stored_base if stored_base is not None else slot.tensor.detach()
        _refuse_shape(repo, tensor, shape, tuple(basis.shape))
        context = Context(tensor, pad_rows(basis.to("cpu"), shape))
        _place(loaded, slot, encoded, shape, context, target)
    if not called:
        raise DeltafoldError(
            "engine-unsupported",
            f"{repo.folder}: the model reads {tensor} without calling the module that holds it, so "
            "a delta there would have no effect.",
            fix="restore this variant and serve it by itself",
        )
    loaded.applied.add(tensor)


def _reachable(slots: SlotMap, slot: Slot, tensor: str, repo: DeltaRepo) -> bool:
    if slot.module_name not in slots.called:
        return False
    if not slots.called[slot.module_name]:
        raise DeltafoldError(
            "engine-unsupported",
            f"{repo.folder}: {slot.module_name}, which holds {tensor}, does not see requests as rows "
            "of a batch.",
            fix="restore this variant and serve it by itself",
        )
    return True


def _refuse_shape(
    repo: DeltaRepo, tensor: str, shape: tuple[int, ...], base: tuple[int, ...]
) -> None:
    if shape != base:
        raise DeltafoldError(
            "engine-unsupported",
            f"{repo.folder}: {tensor} has another shape than the base's, which this engine does not "
            "serve yet.",
            facts=[("base", list(base)), ("variant", list(shape))],
            fix="restore this variant and serve it by itself",
        )


def _place(
    loaded: LoadedVariant,
    slot: Slot,
    encoded: list[Encoded],
    shape: tuple[int, ...],
    context: Context,
    target: Target,
) -> None:
    module, name = slot.module, slot.module_name
    loaded.modules[name] = module
    if slot.attribute == "weight" and is_linear(module):
        loaded.products[name] = product_form(encoded, shape, context, target)
    elif slot.attribute == "weight" and is_embedding(module):
        loaded.tables[name] = table_form(encoded, shape, context, target)
    else:
        delta = dense_delta(encoded, shape, context).to(target.device)
        loaded.add_vector(slot, delta)
