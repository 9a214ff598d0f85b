"""A tensor that several deltas have in common, and what each delta takes of it.

The shared tensor lies in a family (`compress/family.py`), outside the delta; the term names it by the
family's digest. A delta keeps one bit an entry (which entries it takes), a group number a row (which
of several rows it takes), and one scale.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch

from deltafold.compress import bits
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.terms.base import (
    Checked,
    Context,
    Encoded,
    Parts,
    PartSpec,
    register,
    rows_and_columns,
)

#: Stands for a family that is not written yet.
NO_FAMILY: Final = "sha256:" + "0" * 64
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_MOST_GROUPS: Final = 256


@register
@dataclass(frozen=True)
class Shared(Checked):
    """Entries and rows of a shared tensor `S [groups * N, M]`.

    `D[n, m] = scale * mask[n, m] * S[index[n] * N + n, m]`. Parts: `mask`, 1-bit codes
    `[N, ceil(M / 8)]`, where `masked`; `index`, codes of `index_bits` bits, where `groups` > 1.

    Attributes:
        family: digest of the family, `sha256:<hex>`.
        key: name of the shared tensor in the family.
        groups: rows to choose from for each row of the tensor, 1 to 256.
        masked: whether entries are left out (zero) where the mask is 0; else all are taken.
        scale: a float32 number, kept here since a whole delta has one.
    """

    id: ClassVar[str] = "shared"
    version: ClassVar[int] = 1

    family: str = NO_FAMILY
    key: str = ""
    groups: int = 1
    masked: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        self._require(_DIGEST.fullmatch(self.family) is not None, "family must be a digest")
        self._require(1 <= self.groups <= _MOST_GROUPS, "groups must be 1 to 256")
        self._require(math.isfinite(self.scale), "scale must be finite")

    @property
    def index_bits(self) -> int:
        """Bits of a row's group number: the least of 1, 2, 4 and 8 that are enough."""
        return next(b for b in (1, 2, 4, 8) if 2**b >= self.groups)

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """For each row the group whose row comes closest, and the entries that agree in sign."""
        rows, columns = rows_and_columns(tuple(delta.shape))
        matrix = delta.reshape(rows, columns)
        table = self.table(rows, columns, context)
        scale = torch.tensor(self.scale, dtype=torch.float32)
        term = replace(self, scale=scale.item())
        index = torch.zeros(rows, dtype=torch.int64)
        best = torch.full((rows,), torch.inf, dtype=torch.float64)
        for group in range(self.groups):
            taken = table[group]
            if self.masked:
                taken = taken * (matrix * taken > 0)
            missed = (matrix - scale * taken).square().sum(1, dtype=torch.float64)
            index = torch.where(missed < best, group, index)
            best = torch.minimum(missed, best)
        parts = {}
        if self.groups > 1:
            parts["index"] = bits.pack(index.to(torch.uint8), self.index_bits)
        if self.masked:
            chosen = table[index, torch.arange(rows)]
            parts["mask"] = bits.pack((matrix * chosen > 0).to(torch.uint8), 1)
        return Encoded(term, parts)

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """The difference, float32 of `shape`.

        Raises:
            DeltafoldError: `not-found` where there is no family to read from; `bad-manifest` where
                the shared tensor or the index does not fit.
        """
        rows, columns = rows_and_columns(shape)
        table = self.table(rows, columns, context)
        out = table[self.index(parts, rows, context.name), torch.arange(rows)]
        if self.masked:
            out = out * bits.unpack(parts["mask"], 1, columns)
        return (out * torch.tensor(self.scale, dtype=torch.float32)).reshape(shape)

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part."""
        rows, columns = rows_and_columns(shape)
        specs = {}
        if self.groups > 1:
            specs["index"] = PartSpec(torch.uint8, (bits.packed_width(rows, self.index_bits),))
        if self.masked:
            specs["mask"] = PartSpec(torch.uint8, (rows, bits.packed_width(columns, 1)))
        return specs

    def table(self, rows: int, columns: int, context: Context) -> torch.Tensor:
        """The shared tensor, float32 `[groups, N, M]`."""
        if context.shared is None:
            raise DeltafoldError(
                "not-found", f"{context.name} is stored in a family, which was not opened."
            )
        found = context.shared(self.family, self.key)
        if tuple(found.shape) != (self.groups * rows, columns):
            raise DeltafoldError(
                "bad-manifest",
                f"{context.name}: the family's tensor {self.key} does not fit.",
                facts=[
                    ("expected", [self.groups * rows, columns]),
                    ("found", list(found.shape)),
                ],
            )
        return found.reshape(self.groups, rows, columns)

    def index(self, parts: Parts, rows: int, name: str) -> torch.Tensor:
        """int64 `[N]`: each row's group."""
        if self.groups == 1:
            return torch.zeros(rows, dtype=torch.int64)
        index = bits.unpack(parts["index"], self.index_bits, rows).long()
        if index.numel() and int(index.max()) >= self.groups:
            raise DeltafoldError(
                "bad-manifest", f"{name}: an index of rows reaches beyond {self.groups} groups."
            )
        return index
