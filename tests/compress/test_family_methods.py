"""Every family method by itself: shapes, zeros, determinism, and what its members decode to."""

from __future__ import annotations

import math

import pytest
import term_checks as checks
import torch

from deltafold.compress.families import FAMILIES, parse_family
from deltafold.compress.spec import spec_of
from deltafold.compress.terms import Context, Encoded, Shared

#: Specs, and the largest relative error of three independent normal deltas of 64 x 256.
SPECS = {
    "emr": 0.65,
    # Two of three rows share their mean, which for independent ones lacks half of both: sqrt(1/3),
    # and a little less as the two are those that are most alike.
    "row-groups": 3**-0.5,
    "row-groups:groups=3": 0.0,
    # The rest has 2/3 of the squares, of which one bit loses 1 - 2/pi.
    "shift-scale": (2 / 3 * (1 - 2 / math.pi)) ** 0.5 + 0.01,
    "shift-scale:rest=(int:bits=4,group=16),scale=0.9": 0.11,
}
SHAPES = [(1, 1), (1, 37), (7, 13), (16, 64), (33, 130)]
every_spec = pytest.mark.parametrize("spec", SPECS)


def drawn(shape: tuple[int, int], count: int = 3) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=draw) * 0.01 for _ in range(count)]


def coded(spec: str, deltas: list[torch.Tensor]) -> tuple[torch.Tensor, list[list[Encoded]]]:
    """The shared tensor and every member's terms, as a packing run makes them."""
    method = parse_family(spec)
    table = method.share(deltas)
    term, members = method.term(len(deltas)), []
    for delta in deltas:
        own, taken = method.weigh(delta, table[: delta.shape[0]])
        shared = Shared(groups=term.groups, masked=term.masked, scale=own / taken if taken else 1.0)
        context = Context("w", shared=lambda family, key: table)
        encoded = shared.encode(delta, context)
        left = delta - encoded.term.decode(encoded.parts, tuple(delta.shape), context)
        members.append([encoded, *method.remainder(left, context)])
    return table, members


def decoded(table: torch.Tensor, terms: list[Encoded], shape: tuple[int, int]) -> torch.Tensor:
    context = Context("w", shared=lambda family, key: table)
    return sum((t.decode(p, shape, context) for t, p in terms), torch.zeros(shape))


def test_every_family_has_a_spec():
    assert {spec.partition(":")[0] for spec in SPECS} == set(FAMILIES)


@every_spec
def test_specs_come_back(spec):
    assert parse_family(spec_of(parse_family(spec))) == parse_family(spec)


@every_spec
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_inputs_runs_and_zeros(spec, shape):
    deltas = drawn(shape)
    before = [checks.bits(d) for d in deltas]
    groups = parse_family(spec).term(len(deltas)).groups
    table, members = coded(spec, deltas)
    assert (table.dtype, tuple(table.shape)) == (torch.float32, (groups * shape[0], shape[1]))
    assert [checks.bits(d) for d in deltas] == before
    again, same = coded(spec, [d.clone() for d in deltas])
    assert checks.bits(again) == checks.bits(table)
    for terms, others in zip(members, same, strict=True):
        assert [e.term for e in terms] == [e.term for e in others]
        for one, other in zip(terms, others, strict=True):
            assert all(checks.bits(p) == checks.bits(other.parts[k]) for k, p in one.parts.items())
            specs = {k: (p.dtype, tuple(p.shape)) for k, p in one.parts.items()}
            assert specs == {k: tuple(s) for k, s in one.term.parts(shape).items()}
        assert bool(torch.isfinite(decoded(table, terms, shape)).all())
    table, members = coded(spec, [torch.zeros(shape)] * 3)
    assert not any(decoded(table, terms, shape).any() for terms in members)


@every_spec
def test_members_come_as_close_as_is_promised(spec):
    shape = (64, 256)
    deltas, most = drawn(shape), SPECS[spec]
    table, members = coded(spec, deltas)
    missed = sum(
        float((decoded(table, terms, shape) - delta).square().sum())
        for terms, delta in zip(members, deltas, strict=True)
    )
    error = (missed / sum(float(d.square().sum()) for d in deltas)) ** 0.5
    assert error <= most
    assert error > 0.75 * most or not most
