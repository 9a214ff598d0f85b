"""One tensor of a packing run: read, hashed, coded, and read back from what it was coded as."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from deltafold.compress import dtypes
from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.coded import Coded, Sink
from deltafold.compress.encode import (
    CPU,
    check_exact,
    encode_tensor,
    is_blockwise,
    measure,
    settled_value,
)
from deltafold.compress.evidence import EvidenceSource
from deltafold.compress.fingerprint import TensorDigest
from deltafold.compress.in_blocks import code_in_blocks
from deltafold.compress.manifest import Quantization
from deltafold.compress.methods import Method
from deltafold.compress.naming import NamedBase
from deltafold.compress.quantized import dequantized
from deltafold.compress.recipe import Recipe
from deltafold.compress.terms import Encoded, SharedSource
from deltafold.compress.terms.blocks import block_rows

#: Terms that need no encoder, and the float32 delta that they stand for; or None.
Given: TypeAlias = Callable[[str], tuple[list[Encoded], torch.Tensor] | None]


def nothing_given(name: str) -> None:
    """What a job is given of its tensors beside both models: nothing."""


@dataclass(frozen=True)
class Coder:
    """Codes tensors of a fine-tune one by one; used by several threads.

    Attributes:
        source: the base.
        target: the fine-tune.
        recipe: which method for which tensor.
        sink: where parts go.
        known: digests of the base's tensors that need not be hashed.
        known_target: the same of the fine-tune's.
        evidence: of a calibration run.
        given: terms that the fine-tune brings itself.
        delta: float32 differences that the fine-tune's tensors are a rounding of, or None.
        quantization: of the base that differences are taken to; None for the base as it is.
        shared: where given terms read what they share with other deltas.
        settled: told what the compressed model holds in place of each tensor, float32; whoever asks
            for it gets tensors in the order in which they are coded, as a whole.
        device: where codecs run whose cost is arithmetic.
    """

    source: NamedBase
    target: TensorSource
    recipe: Recipe
    sink: Sink
    known: Mapping[str, str]
    known_target: Mapping[str, str] = field(default_factory=dict)
    evidence: EvidenceSource | None = None
    given: Given = nothing_given
    delta: Callable[[str], torch.Tensor | None] = nothing_given
    quantization: Quantization | None = None
    shared: SharedSource | None = None
    settled: Callable[[str, torch.Tensor], None] | None = None
    device: torch.device = CPU

    def code(self, name: str) -> Coded:
        """Read, hash and code one tensor.

        Raises:
            DeltafoldError: `not-finite`, `not-lossless`, `needs-calibration`, and what reading gives.
        """
        base, variant = self.known.get(name), self.known_target.get(name)
        if base is not None and base == variant and self._is_left_alone(name):
            return Coded(base, variant, [], [], None)
        return self._by_rows(name) if self.in_blocks(name) else self._whole(name)

    def _is_left_alone(self, name: str) -> bool:
        """Whether a tensor of equal bytes is equal to the base's.

        A given difference may be too small to survive rounding; it still counts when it is served. A
        quantised tensor differs from its own original.
        """
        given = self.given(name) is not None or self.delta(name) is not None
        same = self.source.spec(name) == self.target.spec(name)
        return same and not given and not self.is_quantised(name)

    def in_blocks(self, name: str) -> bool:
        """Whether a tensor is read and coded in blocks of rows; a small one is a single block."""
        if not isinstance(self.target, Checkpoint) or name not in self.source or self.settled:
            return False
        if self.given is not nothing_given or self.delta is not nothing_given:
            return False
        spec, base, method = self.target.spec(name), self.source.spec(name), self.method(name)
        if len(base.shape) != len(spec.shape) or method.needs or not is_blockwise(method):
            return False
        if len(spec.shape) == 2:
            return math.prod(spec.shape) > 0 and base.shape[1] == spec.shape[1]
        # Of a stack of matrices that grew or shrank, rows of the matrix are not rows of the tensor.
        return block_rows(spec.shape) > 0 and base == spec

    def method(self, name: str) -> Method:
        """The recipe's method for a tensor."""
        spec = self.target.spec(name)
        return self.recipe.method_for(name, spec.shape, floating=spec.dtype in dtypes.FLOATS)

    def is_quantised(self, name: str) -> bool:
        """Whether a difference is taken to what the base holds once it is quantised."""
        return self.quantization is not None and name in self.quantization.tensors

    def as_served(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """Rows of a base's tensor as the differences are taken to."""
        if not self.is_quantised(name):
            return base
        assert self.quantization is not None
        return dequantized(name, base, self.quantization.method)

    def _by_rows(self, name: str) -> Coded:
        assert isinstance(self.target, Checkpoint)
        return code_in_blocks(
            name,
            self.source,
            self.target,
            self.method(name),
            self.sink,
            known=(self.known.get(name), self.known_target.get(name)),
            quantization=self.quantization if self.is_quantised(name) else None,
        )

    def _whole(self, name: str) -> Coded:
        source, given, known = self.source, self.given(name), self.delta(name)
        value = self.target.tensor(name)
        base = source.tensor(name) if name in source else None
        digest = self.known_target.get(name) or dtypes.sha256(value)
        base_digest = None if base is None else self.known.get(name) or dtypes.sha256(base)
        same = base is not None and (base.dtype, base.shape) == (value.dtype, value.shape)
        differs = given is not None or known is not None or self.is_quantised(name)
        if same and not differs and base_digest == digest:
            return Coded(base_digest, digest, [], [], None)
        if base is not None:
            base = self.as_served(name, base)
        encoded, delta = given or encode_tensor(
            name, value, base, self.recipe, self.evidence, known, self.device
        )
        check_exact(name, encoded, value, base, TensorDigest(*self.target.spec(name), digest))
        if self.settled is not None:
            self.settled(name, settled_value(name, encoded, value, base))
        stats = measure(name, encoded, delta, base, self.shared)
        places = [{k: self.sink(part) for k, part in sorted(e.parts.items())} for e in encoded]
        return Coded(base_digest, digest, [e.term for e in encoded], places, stats)
