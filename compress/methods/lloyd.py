"""`lloyd`: a sign and one of a few magnitudes for each weight, those of the least squared error.

Lloyd, "Least squares quantization in PCM" (1982), on the magnitudes of a tensor or a row. They have
less squared error than `codebook`'s blocks of equal counts at the same size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltafold.compress.methods.base import method
from deltafold.compress.methods.codebook import CodebookMethod
from deltafold.compress.terms import Context, Encoded


@method
@dataclass(frozen=True)
class Lloyd(CodebookMethod):
    """Levels of least squared error, with the same options."""

    id: ClassVar[str] = "lloyd"
    summary: ClassVar[str] = "sign and magnitude level, levels of least squared error"
    paper: ClassVar[str] = "Lloyd 1982"
    #: Its running sums have no fixed order on a GPU.
    on_device: ClassVar[bool] = False

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """One `codebook` term."""
        return [self.term().encode_lloyd(delta)]
