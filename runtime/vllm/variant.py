"""From a delta repo to what each hook adds: every tensor placed, or the variant refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from deltafold.compress import Checkpoint, DeltafoldError, DeltaRepo
from deltafold.compress.errors import name_some
from deltafold.compress.terms import Context, Encoded
from deltafold.runtime.kernels.forms import Target, table_form
from deltafold.runtime.kernels.reference import Dense, dense_delta
from deltafold.runtime.vllm.hooks import Content
from deltafold.runtime.vllm.routes import Move, Routes
from deltafold.runtime.vllm.sites import Site, Sites
from deltafold.runtime.vllm.windows import Piece, TablePiece, windowed_form


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
        dense: whether slots are dense.
    """

    base: Checkpoint
    routes: Routes
    sites: Sites
    dtype: torch.dtype
    dense: bool

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
        if not site.multiplies:
            held = content.vectors.setdefault(site.attribute, torch.zeros(move.shape))
            move.target.of(held).copy_(move.source.of(one.delta()))
            return
        rows = None if self.dense else move.as_rows(one.shape)
        if rows is None or (site.looks_up and (rows[1] or rows[0].columns != one.shape[1])):
            self._whole(content, one, move, site)
            return
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

    def _whole(self, content: Content, one: _Tensor, move: Move, site: Site) -> None:
        """One dense difference of the whole parameter, filled part by part."""
        if content.dense is None:
            content.dense = torch.zeros(move.shape, dtype=self.dtype)
            if not self.dense:
                content.pieces.append(Piece(0, move.shape[0], Dense(content.dense)))
                if site.looks_up:
                    content.tables.append(TablePiece(move.shape[0], 0, Dense(content.dense)))
        move.target.of(content.dense).copy_(move.source.of(one.delta()))


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
