"""`dct`: cosine patches, the important ones with codes, the others their mean.

After Delta-DCT (arXiv 2503.06676). Patches are ranked by their norm, the first share gets `bits`,
and the whole is scaled so that its mean magnitude is the delta's. The paper's patch size and shares
were not to be found; the defaults are those of a third party. Unlike the paper's, a patch's grid
has zero among its levels and is fitted by squared error instead of reaching from minimum to
maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Need
from deltafold.compress.methods.base import method
from deltafold.compress.terms import Context, Encoded, Patches, Term, scaled


@method
@dataclass(frozen=True)
class Dct:
    """Patches in the cosine domain.

    Attributes:
        size: of a patch's side.
        bits: of the coefficients of important patches, 2 to 8.
        share: of the patches that are important, in (0, 1].
        match: scale by sum|D| / sum|D^|, as the paper does; it costs squared error.
    """

    id: ClassVar[str] = "dct"
    summary: ClassVar[str] = "cosine patches, the important ones with codes, the others their mean"
    paper: ClassVar[str] = "after 2503.06676"
    needs: ClassVar[tuple[Need, ...]] = ()
    applied: ClassVar[str] = "rebuilt at load"
    #: Patches are padded, turned and coded side by side.
    entry_bytes: ClassVar[int] = 96

    size: int = 16
    bits: int = 2
    share: float = 0.5
    match: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise DeltafoldError("bad-recipe", f"dct: share must be in (0, 1], not {self.share}")
        if not 2 <= self.bits <= 8:
            raise DeltafoldError("bad-recipe", f"dct: bits must be 2 to 8, not {self.bits}")
        self._term()

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `patches` term."""
        term = self._term()
        encoded = term.encode(delta, context)
        if self.match:
            found = encoded.term.decode(encoded.parts, tuple(delta.shape), context)
            before, after = (t.abs().sum(dtype=torch.float64).item() for t in (delta, found))
            if after > 0:
                encoded = scaled(encoded, before / after)
        return [encoded]

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """One `patches` term."""
        return [self._term()]

    def _term(self) -> Patches:
        if self.share == 1:
            return Patches(self.size, (self.bits,), (1.0,))
        return Patches(self.size, (self.bits, 0), (self.share, 1 - self.share))
