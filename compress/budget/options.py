"""Every candidate tried on every tensor: its bytes, and what it loses.

One tensor at a time is in memory; only sizes and errors stay. Errors of tensors must add up and
compare, so they are given in one of two units:

* Without calibration: `||D - D^||^2 / ||W||^2`, the codec's squared error over the squared norm of
  the fine-tune's own tensor. For inputs without a preferred direction this is the share of noise in
  what the tensor computes.
* With calibration: the geometric mean of that and `sum F (D - D^)^2`, where F is the mean squared
  gradient of the loss (the diagonal of the empirical Fisher information), which is half of what the
  loss rises by as long as errors are small and independent. By itself it sees nothing but the
  neighbourhood of the fine-tune, which a small budget leaves; hence the mean of both.
"""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from deltafold.compress import dtypes
from deltafold.compress.budget.allocate import Option
from deltafold.compress.budget.goal import Budget
from deltafold.compress.checkpoint import Spec, TensorSource
from deltafold.compress.encode import encode_tensor, settled_value
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Evidence, EvidenceSource, check_needs, follower
from deltafold.compress.methods import Method, spec_of
from deltafold.compress.payload import payload_key
from deltafold.compress.progress import OnProgress, Progress, ignore
from deltafold.compress.recipe import Recipe
from deltafold.compress.repo import pad_rows
from deltafold.compress.terms import Context, Encoded, is_exact


@dataclass(frozen=True, slots=True)
class Part:
    """A part as the payload will hold it."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tried:
    """One codec on one tensor.

    Attributes:
        option: what the allocation sees.
        parts: what the payload would hold.
        squared: `||D - D^||_F^2`.
    """

    option: Option
    parts: tuple[Part, ...]
    squared: float


@dataclass(frozen=True)
class TensorTrial:
    """All that was tried on one tensor.

    Attributes:
        name: of the tensor.
        free: whether the budget chooses its codec, rather than the recipe.
        tried: at least one.
        squared: `||D||_F^2`.
    """

    name: str
    free: bool
    tried: tuple[Tried, ...]
    squared: float


@dataclass(frozen=True)
class Trial:
    """What is tried: base, fine-tune, the user's recipe, and the budget (None: the recipe alone).

    Attributes:
        told: candidates that must see the whole model first, as they are once they have, by spec.
        settled: where evidence is sequential, what the tensors tried before are coded with; None
            leaves them the fine-tune's.
    """

    source: TensorSource
    target: TensorSource
    recipe: Recipe
    budget: Budget | None
    evidence: EvidenceSource | None = None
    progress: OnProgress = ignore
    told: Mapping[str, Method] = field(default_factory=dict)
    settled: Recipe | None = None

    def run(self) -> Iterator[TensorTrial]:
        """Tensor by tensor, those that equal the base's left out."""
        names = self.target.names()
        in_base = set(self.source.names())
        follows = follower(self.evidence)
        for done, name in enumerate(follows.order(names) if follows else names, 1):
            value = self.target.tensor(name)
            base = self.source.tensor(name) if name in in_base else None
            if not same(value, base):
                trial = self._tensor(name, value, base)
                if follows and self.settled:
                    encoded, _ = encode_tensor(name, value, base, self.settled, self.evidence)
                    follows.settle(name, settled_value(name, encoded, value, base))
                yield trial
            size = value.numel() * value.element_size()
            self.progress(Progress("plan", name, done, len(names), size))

    def _tensor(self, name: str, value: torch.Tensor, base: torch.Tensor | None) -> TensorTrial:
        methods = self._methods(name, value, base)
        delta = value.to(torch.float32)
        padded = pad_rows(base, tuple(value.shape))
        if padded is not None:
            delta = delta - padded.to(torch.float32)
        known = self.evidence.of(name) if self.evidence is not None else None
        weigh = _Weigh(value.to(torch.float32), known)
        tried: list[Tried] = []
        refused: DeltafoldError | None = None
        for method in methods or (None,):
            used = None if method is None else self.told.get(spec_of(method), method)
            recipe = self.recipe if used is None else with_codec(self.recipe, name, used)
            try:
                encoded, _ = encode_tensor(name, value, base, recipe, self.evidence)
            except DeltafoldError as error:
                # One codec cannot store it (NaN, a shape); another may.
                refused = error
                continue
            error_of = _lost(name, encoded, delta, base)
            shape = tuple(value.shape)
            dtype = dtypes.NAMES[value.dtype]
            chosen = method or self.recipe.method_for(name, shape, floating=dtype in dtypes.FLOATS)
            tried.append(_tried(name, spec_of(chosen), encoded, error_of, weigh))
        if not tried:
            assert refused is not None
            raise refused
        squared = float(delta.to(torch.float64).square().sum())
        return TensorTrial(name, bool(methods), tuple(tried), squared)

    def _methods(
        self, name: str, value: torch.Tensor, base: torch.Tensor | None
    ) -> tuple[Method, ...]:
        """The candidates; none where the recipe decides."""
        spec = Spec(dtypes.NAMES[value.dtype], tuple(value.shape))
        if self.budget is None or base is None or not is_free(self.recipe, name, spec):
            return ()
        methods = self.budget.codecs(tuple(value.shape))
        for method in methods:
            check_needs(method.needs, self.evidence, spec_of(method))
        return methods


def is_free(recipe: Recipe, name: str, spec: Spec) -> bool:
    """Whether a budget chooses the codec of a tensor that the base has too."""
    floating = spec.dtype in dtypes.FLOATS
    return len(spec.shape) >= 2 and floating and not recipe.overrides_for(name)


def with_codec(recipe: Recipe, name: str, method: Method) -> Recipe:
    """The recipe with one tensor's codec fixed."""
    return replace(recipe, overrides=(*recipe.overrides, (glob.escape(name), method)))


@dataclass(frozen=True)
class _Weigh:
    """How much an error of a tensor counts."""

    weight: torch.Tensor
    evidence: Evidence | None

    def __call__(self, error: torch.Tensor) -> tuple[float, float]:
        """The squared error, plain and as the plan counts it."""
        squared = float(error.to(torch.float64).square().sum())
        norm = float(self.weight.to(torch.float64).square().sum())
        relative = squared / norm if norm > 0 and math.isfinite(norm) else squared
        if self.evidence is None or self.evidence.fisher is None:
            return squared, relative
        fisher = self.evidence.fisher.to(torch.float64)
        rise = float((fisher * error.to(torch.float64).square()).sum())
        return squared, math.sqrt(relative * rise)


def _lost(
    name: str, encoded: Sequence[Encoded], delta: torch.Tensor, base: torch.Tensor | None
) -> torch.Tensor | None:
    """What the terms miss of the delta; None where they miss nothing."""
    if len(encoded) == 1 and is_exact(encoded[0].term):
        return None
    context = Context(name, pad_rows(base, tuple(delta.shape)))
    missing = delta.clone()
    for term, parts in encoded:
        missing -= term.decode(parts, tuple(delta.shape), context)
    return missing


def _tried(
    name: str, spec: str, encoded: Sequence[Encoded], lost: torch.Tensor | None, weigh: _Weigh
) -> Tried:
    parts = tuple(
        Part(payload_key(name, index, key), part.dtype, tuple(part.shape))
        for index, (_, found) in enumerate(encoded)
        for key, part in found.items()
    )
    squared, error = (0.0, 0.0) if lost is None else weigh(lost)
    return Tried(Option(spec, sum(map(_part_bytes, parts)), error), parts, squared)


def _part_bytes(part: Part) -> int:
    """Bytes of a part and of its line in the header, for which its offsets are guessed high."""
    line = {"dtype": dtypes.NAMES[part.dtype], "shape": part.shape, "data_offsets": [10**9, 10**9]}
    head = len(json.dumps({part.key: line}, separators=(",", ":"))) - 1
    return head + math.prod(part.shape) * part.dtype.itemsize


def same(value: torch.Tensor, base: torch.Tensor | None) -> bool:
    """Whether a fine-tune's tensor is the base's, bit for bit."""
    if base is None or base.dtype != value.dtype or base.shape != value.shape:
        return False
    return bool(torch.equal(dtypes.raw_bytes(value), dtypes.raw_bytes(base)))
