"""From a delta repo to what the hooks add: every tensor placed, counted, and in its fastest form."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deltafold.compress import Checkpoint, DeltaRepo
from deltafold.compress.errors import name_some
from deltafold.compress.naming import NamedBase
from deltafold.compress.terms import Encoded
from deltafold.runtime.kernels.base import DeltaMatrix
from deltafold.runtime.kernels.experts import Piece, Stack, stack_of
from deltafold.runtime.kernels.forms import Target, product_form, table_form
from deltafold.runtime.kernels.reference import Dense, dense_delta
from deltafold.runtime.kernels.turned import turned_form
from deltafold.runtime.layers import is_embedding, is_linear, is_transposed_linear
from deltafold.runtime.misfit import (
    NotAppliableError,
    misfit,
    not_appliable,
    own_slots,
    slot_of,
    unreachable,
)
from deltafold.runtime.quantized import QuantizedLinear
from deltafold.runtime.regions import Region
from deltafold.runtime.slots import Home, SlotMap


@dataclass
class LoadedVariant:
    """A variant in memory.

    Attributes:
        digest: of the delta's content.
        folder: the delta repo.
        products: forms for linear layers, by module name.
        tables: forms for embeddings, by module name.
        sizes: rows of those tables.
        vectors: differences of everything else, by the wrapped module's name and the parameter's path
            in it: float32 up to one dimension, the model's dtype above.
        stacks: differences of parameters that stack matrices (fused experts), likewise.
        homes: every module to wrap, by name.
        applied: tensors of the delta that found their place.
        borrowed: whether the forms are those of other variants (a mixture's are).
        families: digests of the families whose tensors it shares with others.
    """

    digest: str
    folder: Path
    products: dict[str, DeltaMatrix] = field(default_factory=dict)
    tables: dict[str, DeltaMatrix] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    vectors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    stacks: dict[str, dict[str, Stack]] = field(default_factory=dict)
    homes: dict[str, Home] = field(default_factory=dict)
    applied: set[str] = field(default_factory=set)
    borrowed: bool = False
    families: frozenset[str] = frozenset()

    def vectors_of(self, module: str) -> dict[str, torch.Tensor]:
        """Differences that one wrapped module brings in, by path."""
        return self.vectors.get(module, {})

    def changes(self, module: str) -> bool:
        """Whether a wrapped module that is run again has anything of this variant's."""
        return bool(self.vectors.get(module) or self.stacks.get(module))

    def add_vector(self, home: Home, delta: torch.Tensor) -> None:
        """Keep a difference of one parameter."""
        self.vectors.setdefault(home.name, {})[home.path] = delta

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        held = () if self.borrowed else (*self.products.values(), *self.tables.values())
        forms = {id(f): f.nbytes for f in held}
        if not self.borrowed:
            forms |= {id(s): s.nbytes for stacks in self.stacks.values() for s in stacks.values()}
        kept = {id(v): v for vectors in self.vectors.values() for v in vectors.values()}
        return sum(forms.values()) + sum(v.numel() * v.element_size() for v in kept.values())


@dataclass(frozen=True)
class RebuiltVariant:
    """A variant as a dense model of its own.

    Attributes:
        digest: of the delta's content.
        folder: the delta repo.
        model: of transformers, in eval mode on the base's device; parameters that equal the base's
            are the base's own.
        tensor: the tensor (or the keys of the configuration) that made it necessary.
        nbytes: memory that it holds beside the base's, in bytes.
    """

    digest: str
    folder: Path
    model: Any
    tensor: str
    nbytes: int


@dataclass(frozen=True)
class Handle:
    """A loaded variant under the name that a request used.

    Attributes:
        name: as the request had it.
        loaded: the variant, or a mixture of several.
        components: digests of the variants that a mixture holds on to.
    """

    name: str
    loaded: LoadedVariant | RebuiltVariant
    components: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """The delta's content digest."""
        return self.loaded.digest

    @property
    def model(self) -> Any | None:
        """The variant's own dense model; None where its delta is applied to the shared one."""
        return self.loaded.model if isinstance(self.loaded, RebuiltVariant) else None

    @property
    def folder(self) -> Path:
        """The delta repo."""
        return self.loaded.folder


def load_variant(
    repo: DeltaRepo,
    base: Checkpoint,
    slots: SlotMap,
    target: Target,
    base_config: Path | None = None,
    beside: Collection[str] | None = None,
) -> LoadedVariant:
    """Read a whole delta and check that all of it can be applied.

    Args:
        repo: the delta.
        base: its base's checkpoint.
        slots: of the base's model, after a warm-up.
        target: where and in which dtype that model runs.
        base_config: see `misfit`.
        beside: tensors that somebody else applies, if the model has no slot of their name.

    Raises:
        NotAppliableError: `coverage` where a tensor has no place in the model;
            `engine-unsupported` where applying it would have no or a wrong effect.
        DeltafoldError: `checksum` and what else reading gives.
    """
    problem = misfit(repo, base, slots, base_config, whole=beside is None)
    if problem is not None:
        raise problem
    loaded = LoadedVariant(repo.digest, repo.folder, families=frozenset(repo.families))
    load = _Load(loaded, repo, repo.named(base), slots, target, frozenset(beside or ()))
    lost = [tensor for tensor in sorted(repo.manifest.tensors) if not load.tensor(tensor)]
    if lost:
        raise NotAppliableError(
            "coverage",
            f"{repo.folder}: the model has no place for {len(lost)} tensors of this variant.",
            tensor=lost[0],
            facts=[("without a place", name_some(lost, len(repo.manifest.tensors)))],
            fix="nothing is served below 100 %; restore this variant and serve it by itself",
        )
    missing = sorted(set(repo.manifest.tensors) - load.loaded.applied)
    assert not missing, missing
    return load.loaded


@dataclass
class _Load:
    """One variant on its way into memory."""

    loaded: LoadedVariant
    repo: DeltaRepo
    base: NamedBase
    slots: SlotMap
    target: Target
    beside: frozenset[str]

    @cached_property
    def _own(self) -> set[str | None]:
        """Slots that a tensor of the delta names."""
        return own_slots(self.repo, self.base, self.slots)

    def tensor(self, tensor: str) -> bool:
        """Place one coded tensor; False where the model has no place for it."""
        name = slot_of(tensor, self.base, self.slots)
        if name is None and tensor in self.beside:
            self.loaded.applied.add(tensor)
            return True
        stored = self.base.tensor(tensor) if tensor in self.base else None
        if stored is not None and (name is None or not self._same(name, stored)):
            own = self.base.likely(tensor)[0]
            region = self.slots.region(own, stored, self.base.checkpoint.names())
            if region is None and name is not None:
                raise self._unsupported(
                    tensor,
                    f"the model does not hold {tensor} as the checkpoint does, nor any part of it",
                )
            return region is not None and self._place_region(tensor, stored, region)
        return name is not None and self._place_whole(tensor, stored, name)

    def _same(self, name: str, stored: torch.Tensor) -> bool:
        slot = self.slots.slots[name]
        if isinstance(slot.module, QuantizedLinear) and slot.attribute == "weight":
            # Its codes were made from this very tensor when the base was opened.
            return slot.module.shape == tuple(stored.shape)
        held = slot.tensor.detach()
        if held.shape != stored.shape:
            return False
        stored = stored.to(held.device, held.dtype)
        return torch.equal(held, stored) or bool(
            ((held == stored) | ((held != held) & (stored != stored))).all()
        )

    def _place_whole(self, tensor: str, stored: torch.Tensor | None, name: str) -> bool:
        """Give a tensor to its slot and to those tied to it, unless the fine-tune unties them by
        bringing a tensor of their own.
        """
        encoded, reached = self.repo.parts(tensor), False
        ties = [n for n in self.slots.tied_to(name) if n == name or n not in self._own]
        for tied in ties:
            slot = self.slots.slots[tied]
            # An untied head has no base tensor of its own: what the model runs there is the tied one.
            basis = stored if stored is not None else slot.tensor.detach().to("cpu")
            if tensor in self.repo.quantised:
                assert isinstance(slot.module, QuantizedLinear)
                basis = slot.module.values()
            for home in self.slots.homes(tied):
                reached = True
                self._place(home, tensor, encoded, basis)
        assert reached or self.slots.is_idle(ties), f"{tensor} has no home, and was not refused"
        self.loaded.applied.add(tensor)
        return True

    def _place_region(self, tensor: str, stored: torch.Tensor, region: Region) -> bool:
        """Give a tensor to the part of a parameter that it became."""
        shape = tuple(self.repo.entry(tensor).shape)
        if shape != tuple(stored.shape):
            raise self._unsupported(
                tensor, f"{tensor} was resized, and the model keeps it in {region.slot}"
            )
        ties = self.slots.tied_to(region.slot)
        homes = [
            h for n in ties if n == region.slot or n not in self._own for h in self.slots.homes(n)
        ]
        if not homes:
            raise unreachable(self.repo, tensor, self.slots, ties)
        whole = self.slots.slots[region.slot].tensor
        delta: torch.Tensor | None = None
        for home in homes:
            self.loaded.homes[home.name] = home
            if region.index is not None and whole.dim() == 3 and is_run_again(home.module):
                self._stack(home, whole).pieces[region.index].append(
                    self._piece(tensor, stored, region)
                )
                continue
            delta = self.repo.delta(tensor, stored) if delta is None else delta
            known = self.loaded.vectors_of(home.name).get(home.path)
            if known is None:
                known = torch.zeros(
                    whole.shape, dtype=self._dtype(whole.dim()), device=self.target.device
                )
                self.loaded.add_vector(home, known)
            region.of(known).copy_(delta)
            self._as_product(home, whole)
        self.loaded.applied.add(tensor)
        return True

    def _stack(self, home: Home, whole: torch.Tensor) -> Stack:
        stacks = self.loaded.stacks.setdefault(home.name, {})
        return stacks.setdefault(home.path, Stack.empty(whole.shape))

    def _piece(self, tensor: str, stored: torch.Tensor, region: Region) -> Piece:
        encoded, shape = self.repo.parts(tensor), tuple(stored.shape)
        make = turned_form if region.turned else product_form
        form = make(encoded, shape, self.repo.context(tensor, stored), self.target)
        return Piece(region.across, region.start, region.step, region.count, form)

    def _as_product(self, home: Home, whole: torch.Tensor) -> None:
        """Linear layers and tables that are filled region by region read one dense form."""
        if home.path != "weight":
            return
        vectors = self.loaded.vectors_of(home.name)
        if is_linear(home.module):
            self.loaded.products[home.name] = Dense(vectors["weight"])
        elif is_transposed_linear(home.module):
            self.loaded.products[home.name] = Dense(vectors["weight"].T)
        elif is_embedding(home.module):
            self.loaded.tables[home.name] = Dense(vectors["weight"])

    def _place(self, home: Home, tensor: str, encoded: list[Encoded], basis: torch.Tensor) -> None:
        shape = tuple(self.repo.entry(tensor).shape)
        context = self.repo.context(tensor, basis)
        loaded, name = self.loaded, home.name
        loaded.homes[name] = home
        if home.path == "weight" and is_linear(home.module):
            loaded.products[name] = product_form(encoded, shape, context, self.target)
        elif home.path == "weight" and is_transposed_linear(home.module):
            loaded.products[name] = turned_form(encoded, shape, context, self.target)
        elif home.path == "weight" and is_embedding(home.module):
            loaded.tables[name] = table_form(encoded, shape, context, self.target)
            loaded.sizes[name] = shape[0]
        elif len(shape) == 3 and (turned := multiplies_turned(home)) is not None:
            stack = stack_of(encoded, shape, context, self.target, turned=turned)
            loaded.stacks.setdefault(name, {})[home.path] = stack
        else:
            delta = dense_delta(encoded, shape, context)
            loaded.add_vector(home, delta.to(self.target.device, self._dtype(delta.dim())))

    def _dtype(self, dimensions: int) -> torch.dtype:
        return torch.float32 if dimensions < 2 else self.target.dtype

    def _unsupported(self, tensor: str, what: str) -> NotAppliableError:
        return not_appliable(self.repo, tensor, what)


def is_run_again(module: Any) -> bool:
    """Whether a module is served by running it again, with the variant's parameters."""
    return not (is_linear(module) or is_transposed_linear(module) or is_embedding(module))


def multiplies_turned(home: Home) -> bool | None:
    """Whether a module of experts computes `x W_e` with its stacked parameter, or `x W_e^T` (False).

    None where it does not say: then its difference is held dense.
    """
    turned = getattr(home.module, "is_transposed", None)
    return turned if home.own and isinstance(turned, bool) else None
