"""What every term must keep, as checks that take a case. A new term adds its cases and is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from checkpoints import bits

from deltafold.compress.terms import (
    Context,
    Encoded,
    SharedSource,
    Term,
    config_of,
    is_exact,
    rows_and_columns,
    term_from_config,
)

#: One row, matrices with widths that fill no byte or group, stacks, convolutions, nothing at all.
SHAPES: tuple[tuple[int, ...], ...] = (
    (1,),
    (37,),
    (7, 13),
    (16, 64),
    (33, 130),
    (3, 5, 33),
    (3, 5, 7),
    (4, 3, 3, 3),
    (6, 0),
    (0, 9),
    (0,),
)


@dataclass(frozen=True)
class Case:
    """A configured term, and what it promises.

    Attributes:
        term: as a user configures it, data-dependent fields not filled in.
        error: largest relative Frobenius error on normally distributed deltas of 64 x 256.
        scalars: whether 0-d tensors are allowed.
        homogeneous: whether a delta that is twice as large decodes to twice as much.
    """

    term: Term
    error: float
    scalars: bool = True
    homogeneous: bool = True

    def __str__(self) -> str:
        config = config_of(self.term)
        return "-".join(str(v) for v in config.values() if not isinstance(v, dict))


def make_context(
    shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0, scale: float = 0.01
) -> tuple[torch.Tensor, Context]:
    """A random delta (float32), and the base and fine-tune that it lies between."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw).mul(0.1).to(dtype)
    step = torch.randn(shape, generator=draw) * scale
    variant = (base.float() + step).to(dtype)
    shared = shared_source(shape, scale)
    return variant.float() - base.float(), Context("some.weight", base, variant, shared=shared)


def shared_source(shape: tuple[int, ...], scale: float = 0.01) -> SharedSource:
    """A family whose keys are numbers of groups; every key but "" has that many rows for each."""
    rows, columns = rows_and_columns(shape)

    def read(family: str, key: str) -> torch.Tensor:
        draw = torch.Generator().manual_seed(9)
        return torch.randn(int(key or 1) * rows, columns, generator=draw) * scale

    return read


def decode(encoded: Encoded, shape: tuple[int, ...], context: Context) -> torch.Tensor:
    """As a reader does it: without the fine-tune."""
    reading = Context(context.name, context.base, shared=context.shared)
    return encoded.term.decode(encoded.parts, shape, reading)


def check_error(case: Case) -> None:
    """The promised accuracy on normally distributed deltas."""
    error = error_of(case.term)
    assert error <= case.error, f"{error:.4f} > {case.error}"


def error_of(term: Term) -> float:
    """Relative Frobenius error on a normally distributed delta of 64 x 256."""
    shape = (64, 256)
    delta, context = make_context(shape, torch.float32)
    found = decode(term.encode(delta, context), shape, context)
    return ((delta - found).norm() / delta.norm()).item()


def check_deterministic(case: Case, shape: tuple[int, ...]) -> None:
    """The same delta gives the same bytes, and the same bytes the same delta."""
    delta, context = make_context(shape)
    first, second = case.term.encode(delta, context), case.term.encode(delta.clone(), context)
    assert first.term == second.term
    assert _bytes(first.parts) == _bytes(second.parts)
    assert bits(decode(first, shape, context)) == bits(decode(second, shape, context))


def check_promise(case: Case, shape: tuple[int, ...]) -> None:
    """Every part has the dtype and shape that the configuration alone promises."""
    delta, context = make_context(shape)
    encoded = case.term.encode(delta, context)
    promised = encoded.term.parts(shape)
    assert sorted(promised) == sorted(encoded.parts)
    for key, spec in promised.items():
        part = encoded.parts[key]
        assert (part.dtype, tuple(part.shape)) == (spec.dtype, spec.shape), key
        assert spec.nbytes == part.numel() * part.element_size(), key
        assert part.is_contiguous(), key


def check_config(case: Case, shape: tuple[int, ...]) -> None:
    """Configurations survive JSON, before and after the data-dependent fields are filled in."""
    delta, context = make_context(shape)
    for term in (case.term, case.term.encode(delta, context).term):
        config = json.loads(json.dumps(config_of(term)))
        assert term_from_config(config) == term
        assert config_of(term_from_config(config)) == config


def check_decoded(case: Case, shape: tuple[int, ...]) -> None:
    """What comes out is finite float32 of the right shape, and leaves its input alone."""
    delta, context = make_context(shape)
    before = bits(delta)
    encoded = case.term.encode(delta, context)
    parts = _bytes(encoded.parts)
    found = decode(encoded, shape, context)
    assert (found.dtype, tuple(found.shape)) == (torch.float32, shape)
    assert bool(torch.isfinite(found).all())
    assert bits(delta) == before
    assert _bytes(encoded.parts) == parts


def check_zero(case: Case, shape: tuple[int, ...]) -> None:
    """No difference in, no difference out."""
    _, context = make_context(shape)
    assert context.base is not None
    context = replace(context, variant=context.base.clone())
    encoded = case.term.encode(torch.zeros(shape), context)
    assert bool((decode(encoded, shape, context) == 0).all())


def check_homogeneous(case: Case, shape: tuple[int, ...]) -> None:
    """A delta four times as large decodes to four times as much."""
    if not case.homogeneous:
        return
    delta, context = make_context(shape, torch.float32)
    once = decode(case.term.encode(delta, context), shape, context)
    assert context.base is not None
    four = replace(context, variant=context.base + 4 * delta)
    more = decode(case.term.encode(4 * delta, four), shape, context)
    torch.testing.assert_close(more, 4 * once, rtol=1e-4, atol=1e-6)


def check_bit_exact(term: Term, base: torch.Tensor | None, variant: torch.Tensor) -> None:
    """`restore` gives back the fine-tune's very bytes, from the parts and the base alone."""
    shape = tuple(variant.shape)
    delta = variant.float() - (0 if base is None else base.float())
    encoded = term.encode(delta, Context("some.weight", base, variant))
    assert is_exact(encoded.term)
    found = encoded.term.restore(encoded.parts, shape, variant.dtype, Context("some.weight", base))
    assert found.dtype == variant.dtype
    assert found.shape == variant.shape
    assert bits(found) == bits(variant)


def _bytes(parts: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {key: bits(value) for key, value in parts.items()}
