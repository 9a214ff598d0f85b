"""A few entries of the delta as codes into a table, and a mask in as few bits as its density allows.

A mask of independent entries with density d takes H(d) bits a weight at best. The lengths of the
zero runs are then geometric, for which Golomb's codes are the best prefix codes (Golomb 1966; Rice's
are those with a power of two, a percent or two longer): after UltraDelta (arXiv 2505.13563).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from deltafold.compress import bits as packing
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.philox import keep_mask
from deltafold.compress.terms import scales
from deltafold.compress.terms.base import Checked, Context, Encoded, Parts, PartSpec, register

#: The width that stands for plain float16 values.
HALF = 16
_MOST_RICE = 16


@register
@dataclass(frozen=True)
class SparseCodes(Checked):
    """Kept entries in memory order.

    Parts: `codes` uint8 `[ceil(count * bits / 8)]` and `table` float32 `[2**bits]`, or for 16 bits
    `values` float16 `[count]` and `values_unit`; the mask as `mask` uint8 `[ceil(numel / 8)]`
    ("bitmap"), or as `low` uint8 `[ceil(count * rice / 8)]` and `high` uint8 `[high]` ("runs"), or
    not at all ("seed").

    Attributes:
        mask: "runs", "bitmap" or "seed".
        bits: of a code, 1 to 8, or 16 for float16 values.
        drop: share of dropped entries: of a seeded mask; else a promise for `parts` before encoding.
        seed: of a seeded mask.
        count: kept entries; -1 until encoded.
        rice: bits of a run's low part, 0 to 16; filled in by encode.
        high: bytes of the runs' high parts; filled in by encode.
    """

    id: ClassVar[str] = "sparse-codes"
    version: ClassVar[int] = 1

    mask: Literal["runs", "bitmap", "seed"] = "runs"
    bits: int = 4
    drop: float = 0.9
    seed: int = 0
    count: int = -1
    rice: int = 0
    high: int = 0

    def __post_init__(self) -> None:
        self._require(self.mask in ("runs", "bitmap", "seed"), "mask must be runs, bitmap or seed")
        self._require(1 <= self.bits <= 8 or self.bits == HALF, "bits must be 1 to 8, or 16")
        self._require(0 <= self.drop < 1, f"drop must be in [0, 1), not {self.drop}")
        self._require(0 <= self.seed < 2**64, "seed must fit 64 unsigned bits")
        self._require(self.count >= -1 and self.high >= 0, "counts must not be negative")
        self._require(0 <= self.rice <= _MOST_RICE, f"rice must be 0 to {_MOST_RICE}")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """Entries that are not zero (or that the seed keeps), on the better of two even grids."""
        flat = delta.reshape(-1)
        keep = self._seeded(flat.numel(), context.name) if self.mask == "seed" else flat != 0
        values = flat[keep]
        if self.bits == HALF:
            return self.assemble(keep, scales.store(values, "float16", "values"))
        tables = even_table(values, self.bits), signed_table(values, self.bits)
        table = min(tables, key=lambda t: _loss(values, t))
        return self.assemble(keep, self.coded(nearest(values, table), table))

    def coded(self, codes: torch.Tensor, table: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parts from uint8 codes `[count]` and a float32 table `[2**bits]`."""
        return {"codes": packing.pack(codes, self.bits), "table": table.to(torch.float32)}

    def assemble(self, keep: torch.Tensor, parts: dict[str, torch.Tensor]) -> Encoded:
        """A mask, bool `[numel]`, added to the parts of the kept entries' values."""
        count = int(keep.sum())
        term = replace(self, count=count)
        if self.mask == "bitmap":
            parts["mask"] = packing.pack(keep.to(torch.uint8), 1)
        elif self.mask == "runs":
            rice, low, high = _write_runs(keep.numpy())
            parts |= {"low": torch.from_numpy(low), "high": torch.from_numpy(high)}
            term = replace(term, rice=rice, high=high.size)
        return Encoded(term, parts)

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """The kept entries in their places, float32 of `shape`."""
        total = math.prod(shape)
        places = self.places(parts, total, context.name)
        if len(places) != self.count:
            raise DeltafoldError(
                "bad-manifest", f"{context.name}: the mask keeps another number of entries."
            )
        if self.bits == HALF:
            values = scales.load(dict(parts), "float16", "values")
        else:
            codes = packing.unpack(parts["codes"], self.bits, self.count)
            values = parts["table"].index_select(0, codes.to(torch.int64))
        out = torch.zeros(total)
        out[places] = values
        return out.reshape(shape)

    def places(self, parts: Parts, total: int, name: str) -> torch.Tensor:
        """Flat indexes of the kept entries, int64, ascending."""
        if self.mask == "seed":
            return self._seeded(total, name).nonzero().reshape(-1)
        if self.mask == "bitmap":
            return packing.unpack(parts["mask"], 1, total).nonzero().reshape(-1)
        found = _read_runs(parts["low"], parts["high"], self.rice, self.count)
        if found is None or (len(found) and int(found[-1]) >= total):
            raise DeltafoldError(
                "bad-manifest", f"{name}: the runs of zeros do not fit {total} entries."
            )
        return torch.from_numpy(found)

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part; before encoding what `drop` leads to expect."""
        total = math.prod(shape)
        term = self._expected(total) if self.count < 0 else self
        if self.bits == HALF:
            specs = scales.specs((term.count,), "float16", "values")
        else:
            width = packing.packed_width(term.count, self.bits)
            specs = {
                "codes": PartSpec(torch.uint8, (width,)),
                "table": PartSpec(torch.float32, (2**self.bits,)),
            }
        if self.mask == "bitmap":
            specs["mask"] = PartSpec(torch.uint8, (packing.packed_width(total, 1),))
        elif self.mask == "runs":
            low = packing.packed_width(term.count, term.rice)
            specs["low"] = PartSpec(torch.uint8, (low,))
            specs["high"] = PartSpec(torch.uint8, (term.high,))
        return specs

    def _seeded(self, total: int, name: str) -> torch.Tensor:
        return torch.from_numpy(keep_mask(total, drop=self.drop, seed=self.seed, name=name))

    def _expected(self, total: int) -> SparseCodes:
        count = round(total * (1 - self.drop))
        sizes = [(rice, _expected_high(count, self.drop, rice)) for rice in range(_MOST_RICE + 1)]
        rice, high = min(sizes, key=lambda s: count * s[0] + 8 * s[1])
        return replace(self, count=count, rice=rice, high=high)


def even_table(values: torch.Tensor, bits: int) -> torch.Tensor:
    """`2**bits` levels from the least to the largest value, float32."""
    if not values.numel():
        return torch.zeros(2**bits)
    low, high = values.min(), values.max()
    steps = torch.arange(2**bits, dtype=torch.float32) / (2**bits - 1)
    table: torch.Tensor = low + (high - low) * steps
    return table


def signed_table(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Half of the levels for each sign, from the least to the largest magnitude: none lies between.

    What a magnitude cut leaves has a hole around zero, where an even grid would waste its levels.
    """
    if not values.numel():
        return torch.zeros(2**bits)
    magnitudes, half = values.abs(), 2 ** (bits - 1)
    if half == 1:
        levels = magnitudes.mean().reshape(1)
    else:
        low, high = magnitudes.min(), magnitudes.max()
        levels = low + (high - low) * (torch.arange(half, dtype=torch.float32) / (half - 1))
    return torch.cat([-levels.flip(0), levels])


def _loss(values: torch.Tensor, table: torch.Tensor) -> float:
    found = table[nearest(values, table).to(torch.int64)]
    return float((found - values).square().sum(dtype=torch.float64))


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """uint8 index of the nearest level of an ascending table."""
    return torch.searchsorted((table[1:] + table[:-1]) / 2, values).to(torch.uint8)


def _expected_high(count: int, drop: float, rice: int) -> int:
    """Bytes: a one for each run, and zeros by the mean of a geometric length over 2**rice."""
    past: float = drop ** (2**rice)
    return math.ceil(count * (1.0 + past / (1.0 - past)) / 8)


def _write_runs(keep: NDArray[np.bool_]) -> tuple[int, NDArray[np.uint8], NDArray[np.uint8]]:
    """Rice codes of the zeros before each kept entry.

    Low parts are `rice` bits each; high parts are unary, as many zeros and then a one.
    """
    gaps = np.diff(np.flatnonzero(keep), prepend=-1) - 1
    cost = [gaps.size * k + int((gaps >> k).sum()) for k in range(_MOST_RICE + 1)]
    rice = int(np.argmin(cost))
    ones = np.cumsum((gaps >> rice) + 1) - 1
    unary = np.zeros(ones[-1] + 1 if ones.size else 0, dtype=np.uint8)
    unary[ones] = 1
    low = np.empty(0, dtype=np.uint8)
    if rice and gaps.size:
        rest = (gaps & (2**rice - 1)).astype(np.uint8 if rice <= 8 else np.int32)
        low = packing.pack(torch.from_numpy(rest), rice).numpy()
    return rice, low, np.packbits(unary, bitorder="little")


def _read_runs(
    low: torch.Tensor, high: torch.Tensor, rice: int, count: int
) -> NDArray[np.int64] | None:
    """Places of the kept entries; None where there is another number of runs."""
    ones = np.flatnonzero(np.unpackbits(high.numpy(), bitorder="little"))
    if len(ones) != count:
        return None
    gaps = (np.diff(ones, prepend=-1) - 1).astype(np.int64) << rice
    if rice and count:
        gaps |= packing.unpack(low, rice, count).numpy().astype(np.int64)
    return np.cumsum(gaps + 1) - 1
