"""From a delta repo to what the hooks add: every tensor placed, counted, and in its fastest form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from deltafold.compress import Checkpoint, DeltafoldError, DeltaRepo
from deltafold.compress.errors import name_some
from deltafold.compress.terms import Context, Encoded, LowRank
from deltafold.runtime.kernels.base import DeltaMatrix, Sum
from deltafold.runtime.kernels.forms import Target, product_form, table_form
from deltafold.runtime.kernels.reference import Dense, dense_delta
from deltafold.runtime.kernels.simple import Factors
from deltafold.runtime.layers import is_embedding, is_linear, is_transposed_linear
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
        homes: every module to wrap, by name.
        applied: tensors of the delta that found their place.
    """

    digest: str
    folder: Path
    products: dict[str, DeltaMatrix] = field(default_factory=dict)
    tables: dict[str, DeltaMatrix] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    vectors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    homes: dict[str, Home] = field(default_factory=dict)
    applied: set[str] = field(default_factory=set)

    def vectors_of(self, module: str) -> dict[str, torch.Tensor]:
        """Differences that one wrapped module brings in, by path."""
        return self.vectors.get(module, {})

    def add_vector(self, home: Home, delta: torch.Tensor) -> None:
        """Keep a difference of one parameter."""
        self.vectors.setdefault(home.name, {})[home.path] = delta

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        forms = {id(f): f.nbytes for f in (*self.products.values(), *self.tables.values())}
        kept = {id(v): v for vectors in self.vectors.values() for v in vectors.values()}
        return sum(forms.values()) + sum(v.numel() * v.element_size() for v in kept.values())


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
    load = _Load(LoadedVariant(repo.digest, repo.folder), repo, base, slots, target)
    lost = [tensor for tensor in sorted(repo.manifest.tensors) if not load.tensor(tensor)]
    if lost:
        raise DeltafoldError(
            "coverage",
            f"{repo.folder}: the model has no place for {len(lost)} tensors of this variant.",
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
    base: Checkpoint
    slots: SlotMap
    target: Target

    @cached_property
    def _own(self) -> set[str | None]:
        """Slots that a tensor of the delta names."""
        return {self.slots.find(tensor) for tensor in self.repo.manifest.tensors}

    def tensor(self, tensor: str) -> bool:
        """Place one coded tensor; False where the model has no place for it."""
        name = self.slots.find(tensor)
        stored = self.base.tensor(tensor) if tensor in self.base else None
        if stored is not None and (name is None or not self._same(name, stored)):
            region = self.slots.region(tensor, stored, self.base.names())
            if region is None and name is not None:
                raise self._unsupported(
                    f"the model does not hold {tensor} as the checkpoint does, nor any part of it"
                )
            return region is not None and self._place_region(tensor, stored, region)
        return name is not None and self._place_whole(tensor, stored, name)

    def _same(self, name: str, stored: torch.Tensor) -> bool:
        held = self.slots.slots[name].tensor.detach()
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
            basis = (stored if stored is not None else slot.tensor.detach()).to("cpu")
            for home in self.slots.homes(tied):
                reached = True
                self._refuse_shape(tensor, tuple(basis.shape), home)
                self._place(home, tensor, encoded, basis)
        if not reached:
            raise self._unreachable(tensor, ties)
        self.loaded.applied.add(tensor)
        return True

    def _place_region(self, tensor: str, stored: torch.Tensor, region: Region) -> bool:
        """Give a tensor to the part of a parameter that it became."""
        shape = tuple(self.repo.entry(tensor).shape)
        if shape != tuple(stored.shape):
            raise self._unsupported(
                f"{tensor} was resized, and the model keeps it in {region.slot}"
            )
        delta = self.repo.delta(tensor, stored)
        ties = self.slots.tied_to(region.slot)
        homes = [
            h for n in ties if n == region.slot or n not in self._own for h in self.slots.homes(n)
        ]
        if not homes:
            raise self._unreachable(tensor, ties)
        whole = self.slots.slots[region.slot].tensor
        for home in homes:
            self.loaded.homes[home.name] = home
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
        else:
            delta = dense_delta(encoded, shape, context)
            loaded.add_vector(home, delta.to(self.target.device, self._dtype(delta.dim())))

    def _dtype(self, dimensions: int) -> torch.dtype:
        return torch.float32 if dimensions < 2 else self.target.dtype

    def _refuse_shape(self, tensor: str, base: tuple[int, ...], home: Home) -> None:
        shape = tuple(self.repo.entry(tensor).shape)
        vocabulary = id(home.module) in self.slots.vocabulary and home.path in ("weight", "bias")
        served = is_linear(home.module) or (is_embedding(home.module) and home.path == "weight")
        if shape != base and not (vocabulary and served and shape[0]):
            raise self._unsupported(
                f"{tensor} has another shape than the base's, and only tables of tokens may",
                facts=[("base", list(base)), ("variant", list(shape))],
            )

    def _unreachable(self, tensor: str, names: list[str]) -> DeltafoldError:
        readers = sorted({r for n in names for r in self.slots.reading(n)})
        return self._unsupported(
            f"the model reads {tensor} where no variant's value can be brought in for some requests "
            "alone, so a delta there would have no effect",
            facts=[("read by", name_some(readers, len(readers)) if readers else "no module")],
        )

    def _unsupported(self, what: str, facts: Sequence[tuple[str, object]] = ()) -> DeltafoldError:
        return DeltafoldError(
            "engine-unsupported",
            f"{self.repo.folder}: {what}.",
            facts=facts,
            fix="restore this variant and serve it by itself",
        )


def turned_form(
    encoded: list[Encoded], shape: tuple[int, ...], context: Context, target: Target
) -> DeltaMatrix:
    """The form for `x @ D`, for layers that keep their weight as `[in, out]`."""
    forms: list[DeltaMatrix] = []
    for term, parts in encoded:
        if isinstance(term, LowRank):
            a, b = term.factors(parts)
            # D = b a, so D^T = a^T b^T.
            turned = (b.T.contiguous(), a.T.contiguous())
            forms.append(Factors(*(t.to(target.device, target.dtype) for t in turned)))
        else:
            delta = term.decode(parts, shape, context).T.contiguous()
            forms.append(Dense(delta.to(target.device, target.dtype)))
    return forms[0] if len(forms) == 1 else Sum(forms)
