"""From a delta repo to what each hook adds: every tensor placed, or the variant refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from deltafold.compress import Checkpoint, DeltafoldError, DeltaRepo
from deltafold.compress.errors import name_some
from deltafold.compress.terms import Context, Encoded
from deltafold.runtime.kernels.base import Sum
from deltafold.runtime.kernels.forms import Target, table_form
from deltafold.runtime.kernels.reference import Dense, dense_delta
from deltafold.runtime.vllm.experts import DOWN, GATE_UP, ExpertsHook
from deltafold.runtime.vllm.hooks import Content
from deltafold.runtime.vllm.routes import Move, Routes, Window
from deltafold.runtime.vllm.sites import Site, Sites
from deltafold.runtime.vllm.windows import Piece, TablePiece, windowed_form

#: Layouts of slots: what the CPU applies fastest, copies of the weights, the GPU kernels' forms.
FORMS: Final = "forms"
DENSE: Final = "dense"
PACKED: Final = "packed"


@dataclass
class LoadedVariant:
    """A variant in host memory, ready for a slot.

    Attributes:
        digest: of the delta's content.
        contents: what it adds, by the hook's name.
        parameters: those that it changes.
    """

    digest: str
    contents: dict[str, Content] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)

    def content(self, hook: str) -> Content:
        """What it adds at a hook, to be filled."""
        return self.contents.setdefault(hook, Content())


@dataclass(frozen=True)
class Loader:
    """Reads variants for one loaded model. Thread-safe.

    Attributes:
        base: the checkpoint that is served.
        routes: where its tensors go.
        sites: the hooks.
        dtype: of the model.
        layout: of the slots.
    """

    base: Checkpoint
    routes: Routes
    sites: Sites
    dtype: torch.dtype
    layout: str

    def load(self, repo: DeltaRepo) -> LoadedVariant:
        """Read a whole delta.

        Raises:
            DeltafoldError: `checksum`; `engine-unsupported` for a tensor that no hook can change.
        """
        loaded = LoadedVariant(repo.digest)
        if repo.manifest.untied:
            names = ", ".join(repo.manifest.untied)
            raise _unsupported(
                str(repo.folder), f"vLLM holds {names} and another tensor as one", []
            )
        for tensor in sorted(repo.manifest.tensors):
            self._check(repo, tensor)
        with torch.no_grad():
            for tensor in sorted(repo.manifest.tensors):
                self._place(loaded, repo, tensor)
        return loaded

    def check_called(self, loaded: LoadedVariant, name: str) -> None:
        """Raises `engine-unsupported` where the model reads a changed parameter around its hook."""
        bad = {p: self.sites.bypassed(p) for p in sorted(loaded.parameters)}
        odd = sorted({module for modules in bad.values() for module in modules})
        if odd:
            raise _unsupported(
                name,
                "the model was seen to run without calling the hooks of parameters that this variant "
                "changes, so its delta would have no effect",
                [("bypassed", name_some(odd, len(odd)))],
            )

    def _check(self, repo: DeltaRepo, tensor: str) -> None:
        where, moves = str(repo.folder), self.routes.moves.get(tensor, [])
        if not moves and tensor not in self.routes.elsewhere:
            raise _unsupported(where, f"vLLM does not load {tensor}, or computes with it first", [])
        shape = tuple(repo.entry(tensor).shape)
        base = tuple(self.base.spec(tensor).shape)
        if shape != base:
            raise _unsupported(
                where,
                f"{tensor} has another shape than the base's, whose vocabulary all variants share",
                [("base", list(base)), ("variant", list(shape))],
            )
        bare = [b for m in moves for b in self.sites.bare.get(m.parameter, [])]
        if bare:
            raise _unsupported(
                where,
                f"the plugin cannot change {tensor} for some requests alone",
                [("read by", name_some(sorted(set(bare)), len(set(bare))))],
            )

    def _place(self, loaded: LoadedVariant, repo: DeltaRepo, tensor: str) -> None:
        moves = self.routes.moves.get(tensor, [])
        if not moves:
            return
        encoded = repo.parts(tensor)
        context = Context(tensor, self.base.tensor(tensor))
        one = _Tensor(encoded, tuple(repo.entry(tensor).shape), context)
        for move in moves:
            loaded.parameters.add(move.parameter)
            for site in self.sites.places[move.parameter]:
                self._at(loaded.content(site.hook.name), one, move, site)

    def _at(self, content: Content, one: _Tensor, move: Move, site: Site) -> None:
        if site.experts:
            self._at_experts(content, one, move, site)
            return
        if not site.multiplies:
            held = content.vectors.setdefault(site.attribute, torch.zeros(move.shape))
            move.target.of(held).copy_(move.source.of(one.delta()))
            return
        rows = None if self.layout == DENSE else row_window(move, one.shape, site)
        if rows is None or (self.layout == PACKED and not self._packed(content, one, rows, site)):
            self._whole(content, one, move, site)
        elif self.layout == FORMS:
            self._forms(content, one, rows, site)

    def _packed(self, content: Content, one: _Tensor, rows: tuple[Window, int], site: Site) -> bool:
        """Add the tensor's packed form, if it has one."""
        from deltafold.runtime.vllm.places import packed_form

        window, first = rows
        matrix = (one.shape[0], one.shape[1])
        found = packed_form(
            one.encoded, matrix, one.context, self.dtype, window, looks_up=site.looks_up
        )
        if found is not None:
            form = found[0] if len(found) == 1 else Sum(found)
            content.pieces.append(Piece(first, window.rows, form))
        return found is not None

    def _forms(self, content: Content, one: _Tensor, rows: tuple[Window, int], site: Site) -> None:
        """Add the forms that the CPU applies fastest."""
        window, first = rows
        target = Target(torch.device("cpu"), self.dtype)
        matrix = (one.shape[0], one.shape[1])
        calls = site.hook.calls
        # A table that was never multiplied by, and a head that never looked up, need one form alone.
        if not site.looks_up or calls.products or not calls.lookups:
            form = windowed_form(one.encoded, matrix, one.context, target, window)
            content.pieces.append(Piece(first, window.rows, form))
        if site.looks_up and (calls.lookups or not calls.products):
            table = table_form(one.encoded, matrix, one.context, target)
            content.tables.append(TablePiece(window.rows, window.row, table))

    def _at_experts(self, content: Content, one: _Tensor, move: Move, site: Site) -> None:
        """Forms for one expert, or dense parts where one tensor of the checkpoint holds several."""
        self._read_base(site)
        target = Target(torch.device("cpu"), self.dtype)
        rows = move.as_expert_rows(one.shape)
        if rows is not None:
            expert, window, first = rows
            matrix = (one.shape[0], one.shape[1])
            form = windowed_form(one.encoded, matrix, one.context, target, window)
            mine = content.experts.setdefault((site.attribute, expert), [])
            mine.append(Piece(first, window.rows, form))
            return
        whole = torch.zeros(move.shape, dtype=self.dtype)
        move.target.of(whole).copy_(move.source.of(one.delta()))
        for expert, matrix_of in enumerate(whole):
            if matrix_of.any():
                mine = content.experts.setdefault((site.attribute, expert), [])
                mine.append(Piece(0, move.shape[1], Dense(matrix_of)))

    def _read_base(self, site: Site) -> None:
        """The base's own experts in plain layout, once for all variants."""
        hook = site.hook
        assert isinstance(hook, ExpertsHook)
        for attribute in (GATE_UP, DOWN):
            if attribute in hook.base:
                continue
            parameter = f"{hook.name}.{attribute}"
            held: torch.Tensor | None = None
            for tensor, moves in self.routes.moves.items():
                for move in moves:
                    if move.parameter != parameter:
                        continue
                    held = torch.zeros(move.shape, dtype=self.dtype) if held is None else held
                    move.target.of(held).copy_(move.source.of(self.base.tensor(tensor)))
            assert held is not None, parameter
            hook.base[attribute] = held

    def _whole(self, content: Content, one: _Tensor, move: Move, site: Site) -> None:
        """One dense difference of the whole parameter, filled part by part."""
        if content.dense is None:
            content.dense = torch.zeros(move.shape, dtype=self.dtype)
            if self.layout == FORMS:
                content.pieces.append(Piece(0, move.shape[0], Dense(content.dense)))
                if site.looks_up:
                    content.tables.append(TablePiece(move.shape[0], 0, Dense(content.dense)))
        move.target.of(content.dense).copy_(move.source.of(one.delta()))


def row_window(move: Move, shape: tuple[int, ...], site: Site) -> tuple[Window, int] | None:
    """The window of a tensor and the first row of a parameter that it fills, where the loader put it
    on whole rows as it is, and so that rows can be looked up if they must be.
    """
    rows = move.as_rows(shape)
    if rows is not None and site.looks_up and (rows[1] or rows[0].columns != shape[1]):
        return None
    return rows


def pinned(loaded: LoadedVariant) -> LoadedVariant:
    """A variant in memory that a GPU copies from by itself, while the step goes on."""
    contents = {
        name: each_tensor(c, torch.Tensor.pin_memory) for name, c in loaded.contents.items()
    }
    return dataclasses.replace(loaded, contents=contents)


def each_tensor(thing: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of what a hook's content is made of, with every tensor changed."""
    if isinstance(thing, torch.Tensor):
        return change(thing)
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        own = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.init}
        return dataclasses.replace(thing, **{n: each_tensor(v, change) for n, v in own.items()})
    if isinstance(thing, dict):
        return {name: each_tensor(value, change) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing)(each_tensor(value, change) for value in thing)
    return thing


class _Tensor:
    """One tensor of a delta; decoded once, if at all."""

    def __init__(self, encoded: list[Encoded], shape: tuple[int, ...], context: Context) -> None:
        self.encoded, self.shape, self.context = encoded, shape, context
        self._delta: torch.Tensor | None = None

    def delta(self) -> torch.Tensor:
        """Float32, contiguous, of the checkpoint's shape."""
        if self._delta is None:
            self._delta = dense_delta(self.encoded, self.shape, self.context).contiguous()
        return self._delta


def _unsupported(where: str, what: str, facts: list[tuple[str, object]]) -> DeltafoldError:
    return DeltafoldError(
        "engine-unsupported",
        f"{where}: {what}.",
        facts=facts,
        fix="restore this variant and serve it by itself, or use the embedded engine",
    )
