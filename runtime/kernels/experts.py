"""Deltas of a parameter that stacks matrices, `[E, A, B]`: fused experts, each delta in its own form.

A token meets few experts, so a variant's delta of all of them is never made dense: a product with
expert e adds what e's own forms give. Tokens of many experts are served by one launch on a GPU, where
the expert takes the place of the variant's slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from deltafold.compress.terms import Context, Encoded, LowRank
from deltafold.compress.terms.base import rows_and_columns
from deltafold.runtime.kernels.base import DeltaMatrix, Scaled, Sum
from deltafold.runtime.kernels.devices import applies_packed
from deltafold.runtime.kernels.forms import Target, form_of_delta, product_form, share_kept
from deltafold.runtime.kernels.reference import Dense
from deltafold.runtime.kernels.simple import Factors
from deltafold.runtime.kernels.tables import TABLES, parts_of_rows
from deltafold.runtime.kernels.turned import turned_form

if TYPE_CHECKING:
    from deltafold.runtime.kernels.triton.grouped import GroupedProducts


@dataclass(frozen=True, eq=False)
class Piece:
    """The delta of some rows of one matrix W `[A, B]` of the stack, or of some rows of W^T.

    Attributes:
        turned: whether they are rows of W^T.
        start: first of them.
        step: from one to the next.
        count: how many.
        form: `[count, B]`, or `[count, A]` where turned.
    """

    turned: bool
    start: int
    step: int
    count: int
    form: DeltaMatrix

    @property
    def places(self) -> slice:
        """The rows."""
        return slice(self.start, self.start + self.step * (self.count - 1) + 1, self.step)

    def dense(self, columns: int, device: torch.device) -> torch.Tensor:
        """The form's matrix, float32."""
        if isinstance(self.form, Dense):
            return self.form.weight.to(torch.float32)
        return self.form.matmul(torch.eye(columns, device=device)).T


@dataclass(eq=False)
class Stack:
    """One variant's delta of one stacked parameter.

    Attributes:
        shape: E, A, B.
        pieces: of each matrix; an empty list where it did not change.
    """

    shape: tuple[int, int, int]
    pieces: list[list[Piece]]
    _launches: dict[tuple[bool, torch.dtype], _Launch | None] = field(
        default_factory=dict, repr=False
    )

    @classmethod
    def empty(cls, shape: Sequence[int]) -> Stack:
        """No change of a parameter of this shape."""
        experts, rows, columns = shape
        return cls((experts, rows, columns), [[] for _ in range(experts)])

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        forms = {id(p.form): p.form.nbytes for pieces in self.pieces for p in pieces}
        return sum(forms.values())

    def add(
        self, y: torch.Tensor, x: torch.Tensor, expert: int, *, turned: bool, scale: float
    ) -> None:
        """`y += scale * x D_e^T`, or `x D_e` where turned.

        Args:
            y: `[k, A]`, or `[k, B]`; changed in place.
            x: `[k, B]`, or `[k, A]`.
            expert: e.
            turned: whether the model multiplies by the matrices as they lie, `x W`.
            scale: of the delta.
        """
        for piece in self.pieces[expert]:
            if piece.turned == turned:
                y[:, piece.places] += piece.form.matmul(x).to(y.dtype) * scale
            else:
                # Laid out for the other product, which no model was seen to do.
                dense = piece.dense(self.shape[1] if piece.turned else self.shape[2], x.device)
                y += (x[:, piece.places] @ dense.to(x.dtype)).to(y.dtype) * scale

    def add_by_expert(
        self, y: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, *, turned: bool, scale: float
    ) -> None:
        """`add` for tokens of several experts.

        Args:
            y: `[k, A]`, or `[k, B]`; changed in place.
            x: `[k, B]`, or `[k, A]`.
            experts: int64 `[k]`; tokens of experts below 0 or beyond the last get nothing.
            turned: see `add`.
            scale: of the delta.
        """
        inside = (experts >= 0) & (experts < self.shape[0])
        experts = torch.where(inside, experts, -1)
        launch = self._launch(turned, x.dtype) if applies_packed(x.device) else None
        if launch is not None and len(x) <= launch.most:
            launch.add(y, x, experts, scale)
            return
        for expert in sorted(set(experts.tolist()) - {-1}):
            if self.pieces[expert]:
                mine = (experts == expert).nonzero().reshape(-1)
                part = y[mine]
                self.add(part, x[mine], expert, turned=turned, scale=scale)
                y[mine] = part

    def dense(self, device: torch.device, expert: int | None = None) -> torch.Tensor:
        """The delta of one matrix, float32 `[A, B]`, or of all, `[E, A, B]`."""
        if expert is None:
            return torch.stack([self.dense(device, e) for e in range(self.shape[0])])
        _, rows, columns = self.shape
        total = torch.zeros(rows, columns, device=device)
        for piece in self.pieces[expert]:
            whole = total.T if piece.turned else total
            whole[piece.places] += piece.dense(rows if piece.turned else columns, device)
        return total

    def scaled(self, weight: float) -> Stack:
        """The same delta times a number: a component of a mixture."""
        pieces = [[replace(p, form=Scaled(p.form, weight)) for p in mine] for mine in self.pieces]
        return Stack(self.shape, pieces)

    def plus(self, other: Stack) -> Stack:
        """The sum of two deltas."""
        pairs = zip(self.pieces, other.pieces, strict=True)
        return Stack(self.shape, [[*mine, *theirs] for mine, theirs in pairs])

    def _launch(self, turned: bool, dtype: torch.dtype) -> _Launch | None:
        """How one launch applies all matrices; None where it cannot."""
        if (turned, dtype) not in self._launches:
            self._launches[turned, dtype] = _Launch.of(self, turned, dtype)
        return self._launches[turned, dtype]


@dataclass(frozen=True, eq=False)
class _Launch:
    """Packed forms of the same places for all matrices of a stack.

    Attributes:
        places: rows of each part.
        forms: of each matrix, by part.
        products: the kernels' tables.
        most: tokens for which it is the faster way.
    """

    places: list[slice]
    forms: dict[int, list[DeltaMatrix | None]]
    products: GroupedProducts
    most: int

    @classmethod
    def of(cls, stack: Stack, turned: bool, dtype: torch.dtype) -> _Launch | None:
        from deltafold.runtime.kernels.triton.forms import REBUILD_ABOVE
        from deltafold.runtime.kernels.triton.grouped import GroupedProducts, groupable
        from deltafold.runtime.kernels.triton.parts import MOST_PARTS

        every = [piece for pieces in stack.pieces for piece in pieces]
        places = list(dict.fromkeys((p.start, p.count) for p in every))
        if not 0 < len(places) <= MOST_PARTS:
            return None
        if any(p.turned != turned or p.step != 1 for p in every):
            return None
        # Tokens of one expert are as many as the router pleases: the average stands for them.
        most = next((m for m in (REBUILD_ABOVE, 32) if _all(groupable, every, dtype, m)), 0)
        forms = {
            expert: [
                _sum([p.form for p in pieces if (p.start, p.count) == place]) for place in places
            ]
            for expert, pieces in enumerate(stack.pieces)
        }
        slices = [slice(start, start + count) for start, count in places]
        return cls(slices, forms, GroupedProducts(len(places)), most * stack.shape[0])

    def add(self, y: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, scale: float) -> None:
        from deltafold.runtime.kernels.triton.segments import block_for, make_segments

        count = len(self.forms)
        scales = None
        if scale != 1:
            scales = torch.full((len(x),), scale, dtype=torch.float32, device=x.device)
        segments = make_segments(experts, count, block_for(-(-len(x) // count)), scales)
        ys = [y[:, place] for place in self.places]
        self.products.add(ys, x.contiguous(), self.forms, segments, count)


def _all(
    groupable: Callable[..., bool], pieces: Sequence[Piece], dtype: torch.dtype, longest: int
) -> bool:
    return all(groupable(p.form, p.count, dtype, longest) for p in pieces)


def _sum(forms: list[DeltaMatrix]) -> DeltaMatrix | None:
    if not forms:
        return None
    return forms[0] if len(forms) == 1 else Sum(forms)


def stack_of(
    encoded: list[Encoded],
    shape: tuple[int, int, int],
    context: Context,
    target: Target,
    *,
    turned: bool,
) -> Stack:
    """The stack of a tensor that is stored as one, `[E, A, B]`.

    Args:
        encoded: the tensor's terms.
        shape: E, A, B.
        context: of the whole tensor.
        target: where and in which dtype the model runs.
        turned: whether the model computes `x W`.
    """
    stack = Stack.empty(shape)
    count = shape[2] if turned else shape[1]
    for each in encoded:
        for expert, form in enumerate(_by_expert(each, shape, context, target, turned)):
            stack.pieces[expert].append(Piece(turned, 0, 1, count, form))
    return stack


def _by_expert(
    encoded: Encoded, shape: tuple[int, int, int], context: Context, target: Target, turned: bool
) -> list[DeltaMatrix]:
    term, parts = encoded
    experts, rows, columns = shape
    make = turned_form if turned else product_form
    if rows_and_columns(shape) == (experts * rows, columns):
        if isinstance(term, TABLES):
            every = torch.arange(experts * rows).reshape(experts, rows)
            own = [Encoded(term, parts_of_rows(term, parts, mine)) for mine in every]
            inner = Context(context.name)
            return [make([each], (rows, columns), inner, target) for each in own]
        if isinstance(term, LowRank):
            a, b = (t.to(target.device, target.dtype) for t in term.factors(parts))
            thin = [b[e * rows : (e + 1) * rows] for e in range(experts)]
            if turned:
                a = a.T.contiguous()
                return [Factors(each.T.contiguous(), a) for each in thin]
            return [Factors(a, each) for each in thin]
    deltas = term.decode(parts, shape, context).reshape(shape)
    share = share_kept(term, deltas)
    return [
        form_of_delta(delta.T.contiguous() if turned else delta, share, target) for delta in deltas
    ]
