"""What a budget asks for: a size, or a quality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.methods import Method, parse_spec
from deltafold.compress.sizes import parse_size

#: Tried on each tensor if nobody says otherwise: all need no data, and all are served without
#: rebuilding the weight but the last, which is there for tensors that deserve every bit.
DEFAULT_CANDIDATES: Final = (
    "bitdelta:bits=1",
    "bitdelta:bits=1,group=64",
    "bitdelta:bits=2,group=64",
    "bitdelta:bits=3,group=64",
    "int:bits=2,group=64",
    "int:bits=3,group=64",
    "int:bits=4,group=64",
    "int:bits=8,group=128",
    "svd:bits=0.1",
    "svd:bits=0.25",
    "svd:bits=0.5",
    "svd:bits=1",
    "svd:bits=2",
    "lossless",
)
#: Decomposing a matrix takes time in the cube of its smaller side. Beyond this one low rank is not
#: tried unless the user lists it.
SVD_SIDE: Final = 2048


@dataclass(frozen=True)
class Budget:
    """A goal for a packing run; one of size and quality.

    Attributes:
        target_size: as users write it: `10%` of the fine-tune's bytes, `500MiB`, or bytes. All files
            of the delta count but the card, the report and the manifest.
        max_kl: instead, the most KL divergence to the fine-tune, in nats a token, on the
            calibration data.
        candidates: codecs to choose from; empty for `DEFAULT_CANDIDATES`.
    """

    target_size: str = ""
    max_kl: float = 0.0
    candidates: tuple[Method, ...] = field(default=())

    def __post_init__(self) -> None:
        if bool(self.target_size) == bool(self.max_kl):
            raise DeltafoldError(
                "bad-argument",
                "a budget is a size or a KL: one of the two.",
                fix="--target-size 10%, or --max-kl 0.02 with --calibrate FILE",
            )
        if self.target_size:
            self.target_bytes(1)
        elif not 0 < self.max_kl < math.inf:
            raise DeltafoldError("bad-argument", f"--max-kl must be above 0, not {self.max_kl}.")

    def target_bytes(self, variant_bytes: int) -> int:
        """The target size in bytes. Raises `bad-argument` where it cannot be read."""
        text, fix = self.target_size.strip(), "--target-size 10%, or 500MiB"
        if not text.endswith("%"):
            return parse_size(text, fix)
        try:
            share = float(text[:-1])
        except ValueError:
            share = -1.0
        if not 0 < share < math.inf:
            raise DeltafoldError("bad-argument", f"{text!r} is not a size.", fix=fix)
        return int(share * variant_bytes / 100)

    def codecs(self, shape: tuple[int, ...]) -> tuple[Method, ...]:
        """The candidates for a tensor of this shape."""
        if self.candidates:
            return self.candidates
        side = min(shape[0], math.prod(shape[1:])) if len(shape) > 1 else 0
        return tuple(
            parse_spec(spec)
            for spec in DEFAULT_CANDIDATES
            if side <= SVD_SIDE or not spec.startswith("svd")
        )

    @classmethod
    def from_mapping(cls, data: Any, *, where: str) -> Budget:
        """A budget from YAML: `target_size` or `max_kl`, and `candidates`, a list of specs."""
        known = ("target_size", "max_kl", "candidates")
        if not isinstance(data, Mapping) or not set(map(str, data)) <= set(known):
            raise DeltafoldError(
                "bad-recipe",
                f"{where}: `budget` cannot be {data!r}.",
                facts=[("known", ", ".join(known))],
                fix="budget: {target_size: 10%}, or budget: {max_kl: 0.02}",
            )
        candidates = data.get("candidates") or []
        if isinstance(candidates, str) or not isinstance(candidates, Sequence):
            raise DeltafoldError("bad-recipe", f"{where}: `candidates` must be a list of codecs.")
        try:
            most = float(str(data.get("max_kl", 0.0)))
        except ValueError as error:
            raise DeltafoldError(
                "bad-recipe", f"{where}: max_kl must be a number, not {data['max_kl']!r}."
            ) from error
        return cls(
            target_size=str(data.get("target_size", "")),
            max_kl=most,
            candidates=tuple(parse_spec(str(spec)) for spec in candidates),
        )
