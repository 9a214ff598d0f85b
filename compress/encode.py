"""One tensor: choose its method, code it, and measure what was lost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import torch

from deltafold.compress import dtypes, fast
from deltafold.compress.coded import TensorStats
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import EvidenceSource, check_needs
from deltafold.compress.fast import Pair, Totals
from deltafold.compress.fingerprint import TensorDigest
from deltafold.compress.methods import Chain, ExactMethod, Method
from deltafold.compress.placing import placed
from deltafold.compress.recipe import Recipe
from deltafold.compress.repo import pad_rows
from deltafold.compress.shapes import rows_and_columns
from deltafold.compress.terms import (
    Context,
    Encoded,
    Exact,
    ExactTerm,
    Rows,
    SharedSource,
    is_exact,
)
from deltafold.compress.terms.blocks import block_context, block_rows, join

CPU: Final = torch.device("cpu")


def encode_tensor(
    name: str,
    value: torch.Tensor,
    base: torch.Tensor | None,
    recipe: Recipe,
    evidence: EvidenceSource | None = None,
    delta: torch.Tensor | None = None,
    device: torch.device = CPU,
) -> tuple[list[Encoded], torch.Tensor]:
    """Code one tensor of a fine-tune.

    Args:
        name: its name in the checkpoint.
        value: the fine-tune's tensor in its own dtype.
        base: the base's tensor, None where the base has none; rows may be fewer or more.
        recipe: which method for which tensor.
        evidence: what a calibration run found out; None without one.
        delta: the float32 difference, where `value` is no more than that difference rounded.
        device: where codecs run that say so (see `placing.placed`); all tensors are on the CPU.

    Returns:
        The terms, and the float32 delta that they stand for.

    Raises:
        DeltafoldError: `not-finite` where a lossy method would have to store NaN or infinity;
            `needs-calibration` where the method needs evidence that is not there.
    """
    shape = tuple(value.shape)
    dtype = dtypes.NAMES[value.dtype]
    method = placed(recipe.method_for(name, shape, floating=dtype in dtypes.FLOATS), device)
    if not shape:
        # Codecs are for vectors and more; edits are for all.
        method = method.for_scalars() if isinstance(method, Chain) else ExactMethod()
    if base is None:
        rounded = difference(value, base)
        return [Exact().encode(rounded, Context(name, base, value))], rounded
    planned, context = method.plan(shape, dtype), context_of(name, value, base, method, evidence)
    exact = all(is_exact(term) for term in planned)
    if delta is None or exact:
        delta = difference(value, base)
    if not exact:
        pair = _pair(delta)
        refuse_not_finite(name, pair, fast.totals(pair), method)
    added = max(shape[0] - base.shape[0], 0) if shape else 0
    if added or (rows_count(shape) and _few_rows(delta, base.shape[0])):
        rows = Rows(inner=planned[0], added=added, dtype=dtype)
        return _encode_rows(rows, method, delta, context), delta
    return encode_matrix(method, delta, context), delta


def rows_count(shape: tuple[int, ...]) -> bool:
    """Whether rows that did not change may be left out of a tensor of this shape."""
    # Of a large stack of matrices, blocks of rows are coded, and its first dimension counts others.
    return len(shape) == 2 or (len(shape) > 2 and not block_rows(shape))


def is_blockwise(method: Method) -> bool:
    """Whether a method codes each row of a matrix without looking at others."""
    return bool(getattr(method, "blockwise", False))


def encode_matrix(method: Method, delta: torch.Tensor, context: Context) -> list[Encoded]:
    """A method's terms, in blocks of rows where the tensor is large and the method allows it."""
    shape = tuple(delta.shape)
    step = block_rows(shape)
    if not (step and is_blockwise(method)):
        return method.encode(delta, context)
    matrix = delta.reshape(rows_and_columns(shape))
    blocks = [
        method.encode(matrix[start : start + step], block_context(context, start, step, number))
        for number, start in enumerate(range(0, matrix.shape[0], step))
    ]
    return [join(step, pieces) for pieces in zip(*blocks, strict=True)]


def _encode_rows(
    rows: Rows, method: Method, delta: torch.Tensor, context: Context
) -> list[Encoded]:
    """Every term of a method on the changed rows alone; added rows go with the first."""
    others: list[Encoded] = []

    def first(changed: torch.Tensor, below: Context) -> Encoded:
        encoded, *rest = encode_matrix(method, changed, below)
        others.extend(rest)
        return encoded

    made = rows.encode_with(first, delta, context)
    index = made.parts["index"]
    terms = [made]
    for term, parts in others:
        inner = {f"inner.{key}": part for key, part in parts.items()}
        again = Rows(inner=term, count=index.numel(), dtype=rows.dtype)
        terms.append(Encoded(again, {"index": index.clone(), **inner}))
    return terms


def difference(value: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """A tensor minus the base's, float32; rows that the base lacks count as zero."""
    padded = pad_rows(base, tuple(value.shape))
    delta = value.to(torch.float32, copy=True)
    return delta if padded is None else delta.sub_(padded.to(torch.float32))


def context_of(
    name: str,
    value: torch.Tensor,
    base: torch.Tensor,
    method: Method,
    evidence: EvidenceSource | None,
) -> Context:
    """What a method may look at. Raises `needs-calibration` where that is not all that it needs."""
    context = Context(name, pad_rows(base, tuple(value.shape)), value)
    if not method.needs:
        return context
    check_needs(method.needs, evidence, method.id)
    assert evidence is not None
    return replace(context, evidence=evidence.of(name))


def settled_value(
    name: str, encoded: list[Encoded], value: torch.Tensor, base: torch.Tensor | None
) -> torch.Tensor:
    """What the compressed model holds in place of a tensor, float32."""
    if base is None or is_exact(encoded[0].term):
        return value.to(torch.float32)
    shape = tuple(value.shape)
    padded = pad_rows(base, shape)
    assert padded is not None
    context = Context(name, padded)
    return sum((t.decode(p, shape, context) for t, p in encoded), padded.to(torch.float32))


def measure(
    name: str,
    encoded: list[Encoded],
    delta: torch.Tensor,
    base: torch.Tensor | None,
    shared: SharedSource | None = None,
) -> TensorStats:
    """Decode what was just coded and compare; raises `not-finite` where the codec overflowed."""
    shape = tuple(delta.shape)
    padded = pad_rows(base, shape)
    context = Context(name, padded, shared=shared)
    missed = delta.clone()
    for term, parts in encoded:
        missed -= term.decode(parts, shape, context)
    found, lost = fast.totals(_pair(delta)), fast.square_sum(missed.reshape(1, -1))
    if not math.isfinite(lost) and math.isfinite(found.square):
        raise too_large(name)
    error = math.sqrt(lost / found.square) if found.square > 0 else 0.0
    weights = 0.0 if padded is None else fast.square_sum(padded.reshape(1, -1))
    count = max(delta.numel(), 1)
    return TensorStats(
        mean_abs=found.magnitude / count,
        max_abs=found.largest,
        relative=math.sqrt(found.square / weights) if weights > 0 else 0.0,
        error=error if math.isfinite(error) else 0.0,
        changed=found.changed / count,
    )


def check_exact(
    name: str,
    encoded: list[Encoded],
    value: torch.Tensor,
    base: torch.Tensor | None,
    digest: TensorDigest,
) -> None:
    """Rebuild a tensor that is stored exactly; raises `not-lossless` unless it has its sha256."""
    if len(encoded) != 1 or not is_exact(encoded[0].term):
        return
    term, parts = encoded[0]
    assert isinstance(term, ExactTerm)
    shape = tuple(value.shape)
    restored = term.restore(parts, shape, value.dtype, Context(name, pad_rows(base, shape)))
    if dtypes.sha256(restored) != digest.sha256:
        raise not_lossless(name)


def not_lossless(name: str) -> DeltafoldError:
    """The error for a tensor that would come back otherwise."""
    return DeltafoldError(
        "not-lossless",
        f"{name} would not come back bit for bit.",
        fix="pack again; if no file changed during the run, this is a bug",
    )


def too_large(name: str) -> DeltafoldError:
    """The error for a tensor that a lossy codec makes infinite."""
    return DeltafoldError(
        "not-finite",
        f"{name} has entries that are too large for its codec.",
        fix=f"check the fine-tune, or keep this tensor as it is: --set '{name}=lossless'",
    )


def refuse_not_finite(name: str, pair: Pair, totals: Totals, method: Method) -> None:
    """Raises `not-finite` where a lossy method would have to store NaN or infinity."""
    # A sum tells most of the time; it may overflow, and then every entry is asked.
    if math.isfinite(totals.magnitude):
        return
    if not bool(torch.isfinite(pair.delta()).all()):
        raise DeltafoldError(
            "not-finite",
            f"{name} has NaN or infinite entries, which {method.id} cannot store.",
            fix=f"check the fine-tune, or keep this tensor as it is: --set '{name}=lossless'",
        )


def _few_rows(delta: torch.Tensor, base_rows: int) -> bool:
    """Whether so many rows are unchanged that an index of the others pays (4 bytes a row)."""
    if delta.shape[0] != base_rows or delta.shape[0] == 0:
        return False
    changed = (delta.reshape(delta.shape[0], math.prod(delta.shape[1:])) != 0).any(dim=1)
    return int(changed.sum()) < 0.9 * delta.shape[0]


def _pair(delta: torch.Tensor) -> Pair:
    return Pair.of(delta.reshape(1, -1))
