"""What a packing run would write and take, from names, dtypes and shapes alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deltafold.compress import dtypes, fast
from deltafold.compress.budget.options import Part
from deltafold.compress.budget.size import companion_bytes, payload_bytes
from deltafold.compress.checkpoint import Checkpoint, Spec
from deltafold.compress.encode import is_blockwise
from deltafold.compress.fast import Pair
from deltafold.compress.limits import SPARE, Limits, check_room, needs
from deltafold.compress.memory import resident
from deltafold.compress.methods import Method, PairMethod
from deltafold.compress.methods.chain import looks_around
from deltafold.compress.model_memory import evidence_bytes, fitting_bytes, on_cpu
from deltafold.compress.payload import payload_digest, payload_key
from deltafold.compress.shapes import rows_and_columns
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
#: Bytes of each model that are read to know how fast they can be.
_SAMPLE = 32 * 2**20


@dataclass(frozen=True)
class Prediction:
    """What a run would come to.

    Attributes:
        nbytes: of the delta, as `Totals.delta_bytes` counts, if every tensor differs from the base's.
        variant_bytes: of the fine-tune's tensors.
        fixed: whether that is so to the byte; where codecs depend on the data it is an estimate.
        seconds: that reading, hashing and coding would take on this machine as busy as it is now;
            writing and checking the delta is left out.
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
    """Look at headers, read a sample of both models for its speed, try codecs on random numbers.

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
    entries: dict[str, tuple[Method, list[tuple[int, int]]]] = {}
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
        known = entries.setdefault(spec_of(method), (method, []))
        known[1].append(rows_and_columns(spec.shape))
    names = job.target.names()
    taken = needs(coder, names, job.recipe)
    coding = 0.0
    for method, sizes in entries.values():
        speed = _speed(method) if _is_tried(method) else Speed()
        coding += sum(speed.seconds(rows, columns) for rows, columns in sizes)
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
        seconds=coding / limits.jobs + _reading(job),
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


@dataclass(frozen=True)
class Speed:
    """How long a codec takes.

    Attributes:
        entry: seconds an entry of a matrix whose sides are `_TRIED`.
        grows: whether an entry takes longer in proportion to the shorter side, as it does where
            matrices are multiplied or decomposed.
    """

    entry: float = 0.0
    grows: bool = False

    @classmethod
    def of(cls, small: float, large: float) -> Speed:
        """From the seconds of two square matrices, the sides of the larger twice the other's."""
        # Four times the entries take four times as long, or eight times; the border is between them.
        return cls(large / _TRIED**2, large > 2**2.5 * small > 0)

    def seconds(self, rows: int, columns: int) -> float:
        """What a matrix takes."""
        times = min(rows, columns) / _TRIED if self.grows else 1.0
        return rows * columns * self.entry * times


def _speed(method: Method) -> Speed:
    """From coding and reading back matrices of random numbers."""
    _seconds(method, 64)  # compiles, the first time on a machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as packing does
    try:
        return Speed.of(_seconds(method, _TRIED // 2), _seconds(method, _TRIED))
    finally:
        torch.set_num_threads(threads)


def _reading(job: Job) -> float:
    """Seconds that reading both models takes, by a sample of each."""
    seconds = 0.0
    for model in (job.source.checkpoint, job.target):
        if not isinstance(model, Checkpoint):
            continue
        name = max(model.names(), key=model.nbytes, default=None)
        if name is None or not model.nbytes(name):
            continue
        rows = rows_and_columns(model.spec(name).shape)[0]
        width = model.nbytes(name) // max(rows, 1)
        count = min(rows, max(_SAMPLE // max(width, 1), 1))
        began = time.perf_counter()
        model.matrix_rows(name, 0, count)
        seconds += (time.perf_counter() - began) / (count * width) * model.nbytes()
    return seconds


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
