"""The memory of slots of fixed shapes: how much the zoo's variants need, and taking it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deltafold.compress import Checkpoint, DeltafoldError, DeltaRepo
from deltafold.compress.errors import name_some
from deltafold.compress.terms import Context
from deltafold.runtime.kernels.base import leaves
from deltafold.runtime.kernels.devices import applies_packed
from deltafold.runtime.vllm.hooks import LayerHook, NormHook
from deltafold.runtime.vllm.needs import Key, Needs, Place
from deltafold.runtime.vllm.routes import Move, Routes, Window
from deltafold.runtime.vllm.settings import Settings
from deltafold.runtime.vllm.sites import Site, Sites
from deltafold.runtime.vllm.source import Source
from deltafold.runtime.vllm.variant import DENSE, FORMS, PACKED, LoadedVariant, row_window

if TYPE_CHECKING:
    from deltafold.runtime.vllm.packed import PackedSlots
    from deltafold.runtime.vllm.tiles import Tiles


def layout_of(setting: str, device: torch.device, *, zoo: bool) -> str:
    """The layout that the `slots` setting means on a device.

    Args:
        setting: `auto`, or a layout.
        device: of the model.
        zoo: whether there is a zoo, by which packed slots are cut.
    """
    if setting != "auto":
        return setting
    if device.type == "cpu":
        return FORMS
    return PACKED if zoo and applies_packed(device) else DENSE


def zoo_repos(source: Source, settings: Settings) -> list[DeltaRepo]:
    """The deltas of a zoo that fit the base."""
    folder = Path(settings.zoo).expanduser() if settings.zoo else None
    entries = source.zoo(folder).entries()
    return [entry.repo for entry in entries if entry.repo is not None and not entry.root]


@dataclass
class SlotMaker:
    """Cuts the slots of one model.

    Attributes:
        base: the checkpoint that deltas were packed against.
        routes: where its tensors go.
        sites: the hooks.
        slots: how many slots.
        layout: of them.
        dtype: of the model.
        device: of the model; the meta device to learn sizes alone.
    """

    base: Checkpoint
    routes: Routes
    sites: Sites
    slots: int
    layout: str
    dtype: torch.dtype
    device: torch.device
    _needs: dict[str, Needs] = field(default_factory=dict)

    def allocate(self, repos: Iterable[DeltaRepo]) -> None:
        """Take the memory that any of these variants needs in a slot.

        A variant that no hook can serve needs nothing; whoever asks for it is told.
        """
        if self.layout == FORMS:
            return
        for repo in repos if self.layout == PACKED else []:
            for name, needs in self._of_repo(repo).items():
                mine = self._needs.setdefault(name, Needs())
                mine.dense |= needs.dense
                for span, places in needs.places.items():
                    mine.add(span, places.items())
        tiles = self._tiles()
        shapes = {m.parameter: m.shape for moves in self.routes.moves.values() for m in moves}
        for hook in self.sites.hooks.values():
            if isinstance(hook, NormHook):
                hook.allocate()
            elif isinstance(hook, LayerHook):
                own = {a: p for p in shapes for m, a in self.routes.owners[p] if m == hook.name}
                needs = self._needs.get(hook.name, Needs())
                hook.allocate(
                    shapes[own["weight"]] if "weight" in own else (),
                    self.dtype,
                    self.device,
                    biased="bias" in own,
                    dense="weight" in own and (needs.dense or self.layout == DENSE),
                    packed=self._packed(needs),
                    tiles=tiles,
                )

    @property
    def nbytes(self) -> int:
        """Memory of all slots on this rank, in bytes."""
        fixed = (LayerHook, NormHook)
        return sum(h.nbytes for h in self.sites.hooks.values() if isinstance(h, fixed))

    def check(self, loaded: LoadedVariant, name: str) -> None:
        """Whether a variant fits into the slots.

        Raises:
            DeltafoldError: `engine-unsupported` where it does not.
        """
        if self.layout != PACKED:
            return
        odd = []
        for hook, content in loaded.contents.items():
            from deltafold.runtime.vllm.places import places_of_forms

            needs = Needs(dense=content.dense is not None)
            for piece in content.pieces:
                found = places_of_forms([form for form, _ in leaves(piece.form)])
                needs.add((piece.row, piece.rows), found)
            if self._needs.get(hook, Needs()).lacking(needs):
                odd.append(hook)
        if odd:
            raise DeltafoldError(
                "engine-unsupported",
                f"{name} does not fit into the slots: they were cut at the start, for what the zoo "
                "held then.",
                facts=[("no room at", name_some(sorted(odd), len(odd)))],
                fix="put it into the zoo and start the engine again, or start it with slots: dense",
            )

    def _of_repo(self, repo: DeltaRepo) -> dict[str, Needs]:
        found: dict[str, Needs] = {}
        for tensor, move, site in self._sites_of(repo):
            if site.experts or not site.multiplies:
                continue
            needs = found.setdefault(site.hook.name, Needs())
            shape = tuple(repo.entry(tensor).shape)
            rows = row_window(move, shape, site)
            places = None if rows is None else self._places(repo, tensor, rows[0], site)
            if rows is None or places is None:
                needs.dense = True
            else:
                needs.add((rows[1], rows[0].rows), places)
        return found

    def _sites_of(self, repo: DeltaRepo) -> Iterator[tuple[str, Move, Site]]:
        for tensor in sorted(repo.manifest.tensors):
            for move in self.routes.moves.get(tensor, []):
                for site in self.sites.places.get(move.parameter, []):
                    yield tensor, move, site

    def _places(
        self, repo: DeltaRepo, tensor: str, window: Window, site: Site
    ) -> list[tuple[Key, Place]] | None:
        from deltafold.runtime.vllm.places import packed_form, places_of_forms, places_of_terms

        rows, columns = repo.entry(tensor).shape
        terms, shape = repo.terms(tensor), (rows, columns)
        try:
            return places_of_terms(terms, shape, window, looks_up=site.looks_up)
        except LookupError:
            context = Context(tensor, self.base.tensor(tensor))
            forms = packed_form(
                repo.parts(tensor), shape, context, self.dtype, window, looks_up=site.looks_up
            )
            return None if forms is None else places_of_forms(forms)

    def _packed(self, needs: Needs) -> PackedSlots | None:
        if not needs.places:
            return None
        from deltafold.runtime.vllm.packed import PackedSlots

        return PackedSlots(needs.places, self.slots, self.device, self.dtype)

    def _tiles(self) -> Tiles | None:
        if self.layout != PACKED:
            return None
        from deltafold.runtime.vllm.tiles import Tiles

        return Tiles(self.slots)
