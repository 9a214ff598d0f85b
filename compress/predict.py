"""What a packing run would write and take, from names, dtypes and shapes alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from deltafold.compress import dtypes, fast
from deltafold.compress.budget.options import Part
from deltafold.compress.budget.size import companion_bytes, payload_bytes
from deltafold.compress.checkpoint import Spec
from deltafold.compress.encode import is_blockwise
from deltafold.compress.fast import Pair
from deltafold.compress.limits import SPARE, Limits, check_room, needs
from deltafold.compress.memory import resident
from deltafold.compress.methods import Method, PairMethod
from deltafold.compress.methods.chain import looks_around
from deltafold.compress.model_memory import evidence_bytes, fitting_bytes, on_cpu
from deltafold.compress.payload import payload_digest, payload_key
from deltafold.compress.spec import spec_of
from deltafold.compress.streaming import Coder
from deltafold.compress.terms import (
    NM,
    Blocks,
    Codebook,
    Codes,
    ColumnPlanes,
    Context,
    Dense,
    Exact,
    LowRank,
    MeasuredTerm,
    Patches,
    Planes,
    Rows,
    Term,
)
from deltafold.compress.terms.blocks import block_rows

if TYPE_CHECKING:
    from deltafold.compress.journal import Place
    from deltafold.compress.pipeline import Job

#: Terms whose size follows from the shape.
_FIXED = (Planes, ColumnPlanes, Codes, LowRank, Codebook, NM, Patches, Exact, Dense)
#: Side of the square matrix that speed is tried on.
_TRIED = 1024


@dataclass(frozen=True)
class Prediction:
    """What a run would come to.

    Attributes:
        nbytes: of the delta, as `Totals.delta_bytes` counts, if every tensor differs from the base's.
        variant_bytes: of the fine-tune's tensors.
        fixed: whether that is so to the byte; where codecs depend on the data it is an estimate.
        seconds: that coding would take on this machine as busy as it is now, reading left out.
        timed: whether `seconds` counts every codec; those that run the model, or look at all of it, are
            not tried.
        memory: bytes that the process would hold at its peak, those of `model` counted.
        model: bytes of it for running the fine-tune on calibration data, activations left out.
    """

    nbytes: int
    variant_bytes: int
    fixed: bool
    seconds: float
    timed: bool
    memory: int
    model: int = 0

    @property
    def ratio(self) -> float:
        """Delta size over the fine-tune's."""
        return self.nbytes / max(self.variant_bytes, 1)


def predict(job: Job, limits: Limits, *, device: str = "cpu", fit: bool = False) -> Prediction:
    """Look at headers only; no tensor is read. Speed is tried on random numbers.

    Args:
        job: what would be packed.
        limits: how much of the machine it may take.
        device: where models would run.
        fit: whether scales would be fitted.

    Raises:
        DeltafoldError: `not-enough-memory` where `limits` are too tight for a tensor.
    """
    coder = Coder(job.source, job.target, job.recipe, _nowhere, {}, quantization=job.quantization)
    parts: list[Part] = []
    entries: dict[str, list[Any]] = {}
    fixed = True
    for name in job.target.names():
        spec = job.target.spec(name)
        method = coder.method(name)
        # With evidence a codec may choose terms that it could not name before.
        fixed = fixed and not method.needs
        for number, term in enumerate(_terms(job, name, spec, method)):
            fixed = fixed and _is_fixed(term)
            for key, part in sorted(term.parts(spec.shape).items()):
                parts.append(Part(payload_key(name, number, key), part.dtype, part.shape))
        known = entries.setdefault(spec_of(method), [method, 0])
        known[1] += math.prod(spec.shape)
    names = job.target.names()
    taken = needs(coder, names, job.recipe)
    seconds = sum(count * _seconds_an_entry(method) for method, count in entries.values())
    model = 0
    if on_cpu(device):
        model = evidence_bytes(job.target, job.recipe.needs())
        model = max(model, fitting_bytes(job.target) if fit else 0)
    check_room(taken, limits, model)
    together = sorted((need.nbytes for need in taken), reverse=True)[: limits.jobs]
    memory = resident() + SPARE + model + sum(together)
    return Prediction(
        nbytes=payload_bytes(parts) + companion_bytes(job.companions, job.source),
        variant_bytes=sum(_size(job.target.spec(n)) for n in names),
        fixed=fixed,
        seconds=seconds / limits.jobs,
        timed=all(_is_tried(method) for method, _ in entries.values()),
        memory=min(memory, limits.memory or memory),
        model=model,
    )


def _terms(job: Job, name: str, spec: Spec, method: Method) -> Iterator[Term]:
    shape = tuple(spec.shape)
    if name not in job.source or not shape:
        yield Exact(dtype=spec.dtype)
        return
    planned, step = method.plan(shape, spec.dtype), block_rows(shape)
    base_rows = job.source.spec(name).shape[0]
    added = max(shape[0] - base_rows, 0)
    for number, term in enumerate(planned):
        if added:
            yield Rows(inner=term, added=0 if number else added, dtype=spec.dtype)
        elif step and is_blockwise(method):
            yield Blocks(step, (term,))
        else:
            yield term


def _is_fixed(term: Term) -> bool:
    if isinstance(term, Blocks):
        return all(map(_is_fixed, term.inner))
    if isinstance(term, Rows):
        return _is_fixed(term.inner)
    return isinstance(term, _FIXED)


def _is_tried(method: Method) -> bool:
    """Whether a method can code random numbers, without evidence and a look at the model."""
    return not method.needs and not looks_around(method)


def _seconds_an_entry(method: Method) -> float:
    """Coding and reading back a matrix of random numbers, a weight's share; 0 of what is not tried."""
    if not _is_tried(method):
        return 0.0
    _seconds(method, 64)  # compiles, the first time on a machine
    return _seconds(method, _TRIED) / _TRIED**2


def _seconds(method: Method, side: int) -> float:
    """What becomes of a matrix when it is packed, but for reading and writing."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(side, side, generator=draw).mul(0.02).to(torch.bfloat16)
    variant = (base.float() + torch.randn(side, side, generator=draw) * 0.001).to(torch.bfloat16)
    pair, context = Pair.of(variant, base), Context("tried", base, variant)
    began = time.perf_counter()
    for tensor in (base, variant):
        dtypes.sha256(tensor)
    fast.totals(pair)
    if isinstance(method, PairMethod) and is_blockwise(method):
        encoded = method.encode_pair(pair, context)
    else:
        encoded = method.encode(pair.delta(), context)
    for term, parts in encoded:
        if isinstance(term, MeasuredTerm):
            term.missed(pair, parts)
        else:
            term.decode(parts, (side, side), Context("tried", base))
    payload_digest(parts for _, parts in encoded)
    return time.perf_counter() - began


def _size(spec: Spec) -> int:
    return math.prod(spec.shape) * dtypes.TORCH[spec.dtype].itemsize


def _nowhere(tensor: torch.Tensor) -> Place:
    raise AssertionError("a prediction writes nothing")
