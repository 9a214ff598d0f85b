"""Sign planes and codes in the layout of `signs.c`: little more than a bit a weight and plane.

Codes of b bits are b planes: with bits t_i in {0, 1} and s_i = 2 t_i - 1, a code is
`q - 2**(b-1) = sum_i 2**(i-1) s_i - 1/2`, so its planes' scales are powers of two times the code's own,
and the half that is left is a constant for each group, times the sum of the group's activations.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field
from typing import Final

import torch

from deltafold.compress import bits as packing
from deltafold.compress.terms import Codebook, Codes, ColumnPlanes, Planes, scales
from deltafold.compress.terms.base import Parts
from deltafold.runtime.kernels.native import lookup_columns, signs_library
from deltafold.runtime.kernels.onednn import product

#: Rows that lie together.
BLOCK_ROWS: Final = 32
_WORD_BITS: Final = 32
#: Tokens above which rebuilding costs less, by columns of a lookup and planes, as
#: `benchmarks/linear.py --crossings` measured it; one plane is always applied.
_REBUILT_ABOVE: Final = {3: {2: 32, 3: 16, 4: 12}, 4: {2: 256, 3: 40, 4: 24}}
_MANY_PLANES: Final = {3: 8, 4: 12}
#: Entries that are rebuilt at a time: few enough for a CPU's caches.
_PIECE: Final = 2**20


@dataclass(frozen=True)
class SignWords:
    """Packed signs.

    Attributes:
        words: int32 `[planes, blocks, groups * words, 32]`.
        levels: float32 `[planes, groups, rows]`, rows padded to a multiple of 32.
        offsets: float32 `[groups, rows]`, or None.
        width: columns of a group.
        rows: N.
        columns: M.
        each: columns of one lookup, 3 or 4; a word holds 30 or 32 columns.
        library: the compiled kernel.
    """

    words: torch.Tensor
    levels: torch.Tensor
    offsets: torch.Tensor | None
    width: int
    rows: int
    columns: int
    each: int
    library: ctypes.CDLL = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        held = [self.words, self.levels, *([] if self.offsets is None else [self.offsets])]
        return sum(t.numel() * t.element_size() for t in held)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`; computed in float32."""
        flat = x.to(torch.float32).contiguous()
        many = len(flat) > self.rebuilt_above
        return (self.rebuilt(flat) if many else self.applied(flat)).to(x.dtype)

    def applied(self, flat: torch.Tensor) -> torch.Tensor:
        """`x @ D^T` from the words, for few tokens; x float32, contiguous."""
        planes, groups, rows = self.levels.shape
        words = self.words.shape[2] // groups
        lookups = _WORD_BITS // self.each
        scratch = torch.empty(groups * (words * lookups * 2**self.each + 1))
        y = torch.empty(len(flat), rows)
        self.library.signs_product(
            flat.data_ptr(),
            len(flat),
            self.columns,
            self.words.data_ptr(),
            self.levels.data_ptr(),
            None if self.offsets is None else self.offsets.data_ptr(),
            planes,
            groups,
            self.width,
            words,
            rows,
            self.each,
            scratch.data_ptr(),
            y.data_ptr(),
        )
        return y[:, : self.rows]

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Not for tables: the packed layout has no cheap rows."""
        raise AssertionError("sign words are made for products only")

    @property
    def rebuilt_above(self) -> int:
        """Tokens above which a plain product by the rebuilt matrix is the faster one."""
        planes = self.levels.shape[0]
        if planes == 1:
            return sys.maxsize
        return _REBUILT_ABOVE[self.each].get(planes, _MANY_PLANES[self.each])

    def dense(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Blocks `[first, last)` of 32 rows of D (all by default), float32."""
        planes, groups, rows = self.levels.shape
        last = rows // BLOCK_ROWS if last is None else last
        out = torch.empty((last - first) * BLOCK_ROWS, self.columns)
        self.library.signs_dense(
            self.words.data_ptr(),
            self.levels.data_ptr(),
            None if self.offsets is None else self.offsets.data_ptr(),
            planes,
            groups,
            self.width,
            self.words.shape[2] // groups,
            rows,
            self.each,
            first,
            last,
            self.columns,
            out.data_ptr(),
        )
        return out[: max(self.rows - first * BLOCK_ROWS, 0)]

    def rebuilt(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T` by the matrix, for many tokens; x float32. It is rebuilt piece by piece and never
        lies in memory as a whole.
        """
        blocks = self.levels.shape[2] // BLOCK_ROWS
        step = max(1, _PIECE // max(BLOCK_ROWS * self.columns, 1))
        pieces = [
            product(x, self.dense(start, min(start + step, blocks)), None)
            for start in range(0, blocks, step)
        ]
        return torch.cat(pieces, 1) if pieces else x.new_zeros(len(x), 0)


def planes_words(term: Planes, parts: Parts, shape: tuple[int, int]) -> SignWords | None:
    """Sign planes, or None where this machine has no kernel for them."""
    library = signs_library()
    if library is None:
        return None
    rows, columns = shape
    width = term.group if term.scale == "group" else max(columns, 1)
    fields = torch.zeros(shape, dtype=torch.uint8)
    for i, plane in enumerate(parts["signs"]):
        fields |= packing.unpack(plane, 1, columns) << i
    levels = term.levels(parts)
    if levels.dim() == 1:
        levels = levels.unsqueeze(1).expand(-1, rows)
    if levels.dim() == 2:
        levels = levels.unsqueeze(2)
    return _packed(fields, levels.transpose(1, 2), None, width, library)


def codes_words(term: Codes, parts: Parts, shape: tuple[int, int]) -> SignWords | None:
    """Uniform codes as planes, or None where this machine has no kernel for them."""
    library = signs_library()
    if library is None:
        return None
    columns = shape[1]
    fields = packing.unpack(parts["codes"], term.bits, columns)
    per_group = scales.load(dict(parts), term.scale_format, "scales").T
    levels = torch.stack([per_group * 2.0 ** (i - 1) for i in range(term.bits)])
    return _packed(fields, levels, per_group * -0.5, term.group or max(columns, 1), library)


def codebook_words(term: Codebook, parts: Parts, shape: tuple[int, int]) -> SignWords | None:
    """Signs with one of M levels as M planes, or None where this machine has no kernel for them."""
    library = signs_library()
    if library is None:
        return None
    planes, levels = codebook_planes(term, parts, shape)
    fields = torch.zeros(shape, dtype=torch.uint8)
    for i, plane in enumerate(planes):
        fields |= plane.to(torch.uint8) << i
    return _packed(fields, levels, None, max(shape[1], 1), library)


def codebook_planes(
    term: Codebook, parts: Parts, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs with one of M levels as M planes: bool `[M, rows, columns]`, levels `[M, 1, rows]`.

    With the index's bits as t_i in {-1, 1} any table is a sum over subsets of them, `level = sum_J c_J
    prod_{i in J} t_i` (a Walsh-Hadamard transform), and each product with the sign is a plane.
    """
    plus, index = term.split(parts, shape)
    table = scales.load(dict(parts), term.table_format, "table")
    subsets = torch.arange(term.levels)
    # Whether the product over subset J is negative for an index: the parity of the zeros it sees.
    negative = _parity(subsets.unsqueeze(1) & ~subsets)
    signs = 1.0 - 2.0 * negative.to(torch.float32)
    levels = (table @ signs.T / term.levels).T.reshape(term.levels, 1, -1).expand(-1, 1, shape[0])
    planes = torch.stack([plus ^ negative[j][index] for j in range(term.levels)])
    return planes, levels


def _parity(values: torch.Tensor) -> torch.Tensor:
    """Whether the number of ones in the low 7 bits is odd."""
    return torch.stack([values >> i & 1 for i in range(7)]).sum(dim=0) % 2 == 1


@dataclass(frozen=True)
class ColumnScaled:
    """Sign planes whose scales lie on the columns: `y = sum_i (x * c_i) S_i^T`.

    Attributes:
        planes: one form with unit levels for each plane.
        scales: float32 `[planes, M]`.
    """

    planes: tuple[SignWords, ...]
    scales: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        held = self.scales.numel() * self.scales.element_size()
        return held + sum(plane.nbytes for plane in self.planes)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ D^T`; computed in float32."""
        wide = x.to(torch.float32)
        total = self.planes[0].matmul(wide * self.scales[0])
        for plane, scale in zip(self.planes[1:], self.scales[1:], strict=True):
            total = total + plane.matmul(wide * scale)
        return total.to(x.dtype)

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Not for tables: the packed layout has no cheap rows."""
        raise AssertionError("sign words are made for products only")


def column_words(term: ColumnPlanes, parts: Parts, shape: tuple[int, int]) -> ColumnScaled | None:
    """Sign planes with column scales, or None where this machine has no kernel for them."""
    one = Planes(1, "tensor", 0, "float32")
    planes = []
    for signs in parts["signs"]:
        unit = {"signs": signs.unsqueeze(0), "scales": torch.ones(1)}
        words = planes_words(one, unit, shape)
        if words is None:
            return None
        planes.append(words)
    return ColumnScaled(tuple(planes), term.levels(parts))


def _packed(
    fields: torch.Tensor,
    levels: torch.Tensor,
    offsets: torch.Tensor | None,
    width: int,
    library: ctypes.CDLL,
) -> SignWords:
    """Lay uint8 `[N, M]` out, bit i of which is the sign of plane i, with levels `[planes, groups, N]`
    and offsets `[groups, N]`.
    """
    planes, groups, _ = levels.shape
    rows, columns = fields.shape
    padding = -rows % BLOCK_ROWS
    each = lookup_columns(library)
    words = -(-width // (_WORD_BITS // each * each))
    blocks = (rows + padding) // BLOCK_ROWS
    packed = torch.zeros(planes, blocks, groups * words, BLOCK_ROWS, dtype=torch.int32)
    fields = fields.contiguous()
    library.signs_lay(
        fields.data_ptr(),
        planes,
        rows,
        columns,
        groups,
        width,
        words,
        rows + padding,
        each,
        packed.data_ptr(),
    )
    pad = torch.nn.functional.pad
    return SignWords(
        words=packed,
        levels=pad(levels.to(torch.float32), (0, padding)).contiguous(),
        offsets=None if offsets is None else pad(offsets, (0, padding)).contiguous(),
        width=width,
        rows=rows,
        columns=columns,
        each=each,
        library=library,
    )
