"""A few entries of the delta, the others zero; the mask regenerated from a seed, or stored.

A seeded mask costs nothing on disk: `philox.keep_mask` makes it again from the drop rate, the seed
and the tensor's name. A mask that depends on the data is stored as a bitmap, one bit an entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from deltafold.compress import bits as packing
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.philox import keep_mask
from deltafold.compress.terms import scales
from deltafold.compress.terms.base import Checked, Context, Encoded, Parts, PartSpec, register


@register
@dataclass(frozen=True)
class Sparse(Checked):
    """Kept values in memory order.

    Parts: `values` `[count]` and, for float16, `values_unit`; with `mask="bitmap"` also `mask` uint8
    `[ceil(numel / 8)]`. With `mask="seed"` the entry is kept where `philox.keep_mask` says so; what
    the delta holds elsewhere is dropped. With "bitmap" every entry that is not zero is kept.

    Attributes:
        mask: "seed" or "bitmap".
        drop: drop rate of a seeded mask, in [0, 1).
        seed: its seed, unsigned 64 bits.
        count: kept entries; -1 until encoded.
        value_format: "float16" (with a float32 unit) or "float32".
    """

    id: ClassVar[str] = "sparse"
    version: ClassVar[int] = 1

    mask: Literal["seed", "bitmap"] = "seed"
    drop: float = 0.9
    seed: int = 0
    count: int = -1
    value_format: str = "float16"

    def __post_init__(self) -> None:
        self._require(self.mask in ("seed", "bitmap"), "mask must be seed or bitmap")
        self._require(0 <= self.drop < 1, f"drop must be in [0, 1), not {self.drop}")
        self._require(0 <= self.seed < 2**64, "seed must fit 64 unsigned bits")
        self._require(self.count >= -1, "count must not be negative")
        self._require(self.value_format in scales.FORMATS, "value_format: float32 or float16")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """The kept entries of a float32 delta."""
        flat = delta.reshape(-1)
        seeded = self.mask == "seed"
        keep = self.keep(flat.numel(), context.name) if seeded else flat != 0
        values = flat[keep]
        parts = scales.store(values, self.value_format, "values")
        if self.mask == "bitmap":
            parts["mask"] = packing.pack(keep.to(torch.uint8), 1)
        return Encoded(replace(self, count=values.numel()), parts)

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """The kept entries in their places, float32 of `shape`."""
        total = math.prod(shape)
        keep = self.positions(parts, total, context.name)
        values = scales.load(dict(parts), self.value_format, "values")
        if int(keep.sum()) != values.numel():
            raise DeltafoldError(
                "bad-manifest", f"{context.name}: the mask keeps another number of entries."
            )
        out = torch.zeros(total)
        out[keep] = values
        return out.reshape(shape)

    def positions(self, parts: Parts, total: int, name: str) -> torch.Tensor:
        """bool `[total]`: where the values belong."""
        if self.mask == "seed":
            return self.keep(total, name)
        return packing.unpack(parts["mask"], 1, total).bool()

    def keep(self, total: int, name: str) -> torch.Tensor:
        """The seeded mask, bool `[total]`."""
        return torch.from_numpy(keep_mask(total, drop=self.drop, seed=self.seed, name=name))

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part; before encoding `count` is what the drop rate promises."""
        total = math.prod(shape)
        count = round(total * (1 - self.drop)) if self.count < 0 else self.count
        specs = scales.specs((count,), self.value_format, "values")
        if self.mask == "bitmap":
            specs["mask"] = PartSpec(torch.uint8, (packing.packed_width(total, 1),))
        return specs
