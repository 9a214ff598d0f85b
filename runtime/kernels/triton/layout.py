"""The bit-slice layout: how packed weights lie in GPU memory.

A *slice* of b bits (1, 2 or 4) holds a field q in [0, 2**b) for each weight and stands for

    1 bit: 2 q - 1 (a sign)        2 bits: q - 2        4 bits: q - 8

times a level that rows, groups of columns, or all weights share. Every planes or codes term is a sum
of slices without a remaining constant: a code of more bits is its low 2 or 4 bits, centred, and a sign
for each bit above them (`slices_of_codes`).

Fields lie in 16-bit words. In tile t of the columns, column `t * TK + j * BW + w` is field j of word w
of its row, with BW words a row and tile and `TK = BW * 16 / b`. One shift and mask over a block of
words thus gives the fields of BW neighbouring columns, as a matrix product reads them, without moving
anything between threads. Words are stored `[N / BN, K / TK, BN, BW]`: what a block of threads reads in
one step is contiguous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import torch

#: Rows of a tile, and words of a row in it.
BLOCK_ROWS: Final = 128
BLOCK_WORDS: Final = 32
#: Fewer words than this are no matrix product's width.
_LEAST_WORDS: Final = 16
_WORD_BITS: Final = 16
#: Weights unpacked at a time while a tensor is laid out: bounds the temporary memory.
_CHUNK: Final = 2**24


@dataclass(frozen=True, slots=True)
class Kind:
    """The shape and the levels of a slice.

    Attributes:
        bits: 1, 2 or 4.
        rows: N.
        columns: M.
        group: columns that share a level; `columns` where a row has one level.
        by_column: whether a factor for each column meets the activations first.
        level_dtype: float32 or float16.
    """

    bits: int
    rows: int
    columns: int
    group: int
    by_column: bool
    level_dtype: torch.dtype

    @property
    def block_rows(self) -> int:
        """BN: rows of a tile."""
        return min(BLOCK_ROWS, max(16, 1 << (self.rows - 1).bit_length()))

    @property
    def of_blocks(self) -> Kind:
        """What slices of any number of rows must share to be multiplied in one launch: the kind of
        one block of their rows.
        """
        return replace(self, rows=self.block_rows)

    @property
    def block_words(self) -> int:
        """BW: words of a row in a tile; a field's columns never span two groups."""
        return BLOCK_WORDS if self.one_group or self.group % BLOCK_WORDS == 0 else _LEAST_WORDS

    @property
    def fields(self) -> int:
        """Fields of a word."""
        return _WORD_BITS // self.bits

    @property
    def used_fields(self) -> int:
        """Fields that hold a column in some tile: narrow matrices do not fill even one."""
        if self.column_tiles > 1:
            return self.fields
        used = -(-self.columns // self.block_words)
        return min(self.fields, -(-used // max(self.fold, 1)) * max(self.fold, 1))

    @property
    def tile_columns(self) -> int:
        """TK: columns of a tile."""
        return self.fields * self.block_words

    @property
    def row_blocks(self) -> int:
        """Tiles over the rows."""
        return -(-self.rows // self.block_rows)

    @property
    def column_tiles(self) -> int:
        """Tiles over the columns."""
        return -(-self.columns // self.tile_columns)

    @property
    def groups(self) -> int:
        """Levels of a row."""
        return -(-self.columns // self.group)

    @property
    def one_group(self) -> bool:
        """Whether a row has one level."""
        return self.group >= self.columns

    @property
    def fold(self) -> int:
        """Fields whose products share a level and are summed before it; 0: a whole row's."""
        if self.one_group:
            return 0
        return math.gcd(self.group // self.block_words, self.fields)


def group_fits(columns: int, group: int) -> bool:
    """Whether levels of such groups can be applied packed."""
    return group >= columns or group % _LEAST_WORDS == 0


@dataclass(frozen=True, eq=False)
class Slice:
    """One slice of a tensor in GPU memory.

    Attributes:
        kind: shape and levels.
        words: int16 `[N / BN, K / TK, BN, BW]`.
        levels: `[groups, N]` of the kind's dtype, N padded to whole tiles.
        factor: what all levels are times.
        columns: float32 `[M]`, factors of the columns, or None.
    """

    kind: Kind
    words: torch.Tensor
    levels: torch.Tensor
    factor: float
    columns: torch.Tensor | None = None


def lay(fields: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Fields uint8 `[N, M]` below `2**bits` as words, on the fields' device."""
    bn, bw, count = kind.block_rows, kind.block_words, kind.fields
    shape = (kind.row_blocks, kind.column_tiles, bn, bw)
    words = torch.empty(shape, dtype=torch.int16, device=fields.device)
    blocks = max(1, _CHUNK // (bn * kind.column_tiles * kind.tile_columns))
    for start in range(0, kind.row_blocks, blocks):
        stop = min(start + blocks, kind.row_blocks)
        part = fields[start * bn : stop * bn]
        missing = ((stop - start) * bn - len(part), shape[1] * kind.tile_columns - kind.columns)
        if any(missing):
            part = torch.nn.functional.pad(part, (0, missing[1], 0, missing[0]))
        part = part.reshape(stop - start, bn, shape[1], count, bw)
        packed = part[:, :, :, 0].to(torch.int16)
        for j in range(1, count):
            packed |= part[:, :, :, j].to(torch.int16) << (kind.bits * j)
        words[start:stop] = packed.transpose(1, 2)
    return words


def unlay(words: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Undo `lay`: uint8 `[N, M]`."""
    wide = words.to(torch.int32)
    fields = [(wide >> (kind.bits * j)) & (2**kind.bits - 1) for j in range(kind.fields)]
    # [NB, KT, BN, fields, BW] -> [NB, BN, KT, fields, BW]
    tiles = torch.stack(fields, dim=3).to(torch.uint8).transpose(1, 2)
    rows = kind.row_blocks * kind.block_rows
    return tiles.reshape(rows, -1)[: kind.rows, : kind.columns].contiguous()


def make_slice(
    fields: torch.Tensor,
    kind: Kind,
    levels: torch.Tensor,
    factor: float = 1.0,
    columns: torch.Tensor | None = None,
) -> Slice:
    """A slice of fields uint8 `[N, M]` with levels `[groups, N]`."""
    assert kind.by_column == (columns is not None), "only kinds by column have column factors"
    return Slice(kind, lay(fields, kind), pad_levels(levels, kind), factor, columns)


def pad_levels(levels: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Levels `[groups, N]` in the kind's dtype, with zeros for the rows that fill the last tile."""
    missing = kind.row_blocks * kind.block_rows - kind.rows
    assert levels.shape == (kind.groups, kind.rows), (levels.shape, kind)
    return torch.nn.functional.pad(levels.to(kind.level_dtype), (0, missing)).contiguous()


def values(piece: Slice) -> torch.Tensor:
    """What a slice stands for, float32 `[N, M]`: the layout's meaning in plain torch."""
    kind = piece.kind
    fields = unlay(piece.words, kind).to(torch.float32)
    centred = 2 * fields - 1 if kind.bits == 1 else fields - 2 ** (kind.bits - 1)
    levels = piece.levels[:, : kind.rows].to(torch.float32).T * piece.factor
    spread = levels.repeat_interleave(min(kind.group, kind.columns), dim=1)[:, : kind.columns]
    dense = centred * spread
    return dense if piece.columns is None else dense * piece.columns
