"""Every registered term against the shared checks."""

from __future__ import annotations

import math

import pytest
import term_checks as checks
import torch
from term_checks import Case

from deltafold.compress import DeltafoldError
from deltafold.compress.terms import (
    NM,
    REGISTRY,
    Banded,
    Blocks,
    Codebook,
    Codes,
    ColumnPlanes,
    Columns,
    Context,
    Dense,
    Exact,
    Lossless,
    LosslessStreams,
    LowRank,
    Patches,
    Planes,
    Rows,
    Shared,
    Sparse,
    SparseCodes,
    config_of,
    is_exact,
    rows_and_columns,
    scaled,
    term_from_config,
)
from deltafold.compress.terms.base import register

CASES = [
    Case(Blocks(rows=5, inner=(Planes(bits=4),)), error=0.20, scalars=False),
    Case(Blocks(rows=1, inner=(Lossless(),)), error=0.0, scalars=False),
    Case(Blocks(rows=7, inner=(Sparse(mask="bitmap"),)), error=1e-3, scalars=False),
    Case(Banded(), error=0.48),
    Case(Banded(ranks=(8, 56), widths=(16, 8), group=7), error=0.02),
    Case(Banded(ranks=(64,), widths=(4,), group=0, symmetric=True), error=0.25),
    Case(Banded(ranks=(4, 8), widths=(16, 3), masked=True, seed=5), error=0.84),
    Case(NM(), error=0.40),
    Case(NM(keep=1, of=16, bits=4), error=0.87),
    Case(NM(keep=1, of=5, bits=16), error=0.68),
    Case(NM(keep=3, of=4, bits=8, group=5), error=0.18),
    Case(Planes(bits=1, scale="tensor", scale_format="float32"), error=0.61),
    Case(Planes(bits=1, scale="row"), error=0.61),
    Case(Planes(bits=2, scale="row", scale_format="float32"), error=0.37),
    Case(Planes(bits=4, scale="group", group=32), error=0.18),
    Case(Planes(bits=8, scale="group", group=1000), error=0.12),
    Case(Codebook(levels=1), error=0.61),
    Case(Codebook(levels=4, scale="row", table_format="float16"), error=0.24),
    Case(Codebook(levels=128), error=0.04),
    Case(Codes(bits=8), error=0.011),
    Case(Codes(bits=3, group=13), error=0.22),
    Case(Codes(bits=6), error=0.05),
    Case(Codes(bits=4, group=32), error=0.13),
    Case(Codes(bits=4, scale_format="float32"), error=0.16),
    Case(Codes(bits=2, group=7), error=0.50),
    Case(Codes(bits=2, group=10**12), error=0.60),
    Case(ColumnPlanes(), error=0.61),
    Case(ColumnPlanes(bits=3, scale_format="float32"), error=0.25),
    Case(Columns(), error=0.16),
    Case(Columns(inner=Dense()), error=0.0),
    Case(LowRank(rank=4), error=1.0),
    Case(LowRank(rank=64), error=1e-3),
    Case(LowRank(rank=64, factor_format="float32"), error=1e-5),
    Case(Patches(), error=0.76),
    Case(Patches(size=5, widths=(8,), shares=(1.0,)), error=0.01),
    Case(Patches(size=8, widths=(4, 3, 0), shares=(0.25, 0.5, 0.25)), error=0.55),
    # A half of the squares is dropped.
    Case(Sparse(mask="seed", drop=0.5, seed=7), error=0.5**0.5 + 0.02),
    Case(Sparse(mask="seed", drop=0.0, value_format="float32"), error=0.0),
    Case(Sparse(mask="bitmap"), error=1e-3),
    Case(SparseCodes(), error=0.20),
    Case(SparseCodes(mask="seed", drop=0.5, seed=7, bits=3), error=0.76),
    Case(SparseCodes(mask="bitmap", bits=8), error=0.02),
    Case(SparseCodes(bits=16), error=1e-3),
    Case(Dense(), error=0.0),
    Case(Dense(value_format="float16"), error=1e-3),
    Case(Exact(), error=0.0),
    Case(Lossless(), error=0.0),
    Case(Lossless(block=100), error=0.0),
    Case(LosslessStreams(), error=0.0),
    Case(LosslessStreams(level=1), error=0.0),
    Case(Rows(), error=0.16, scalars=False),
    Case(Rows(inner=Planes(bits=4)), error=0.20, scalars=False),
    Case(Rows(inner=Lossless()), error=0.0, scalars=False),
    Case(Rows(inner=Rows(inner=Exact())), error=0.0, scalars=False),
    # Independent normal tensors of one spread: 1 - 2 s/pi + s^2/2 for the half whose signs agree.
    Case(
        Shared(scale=0.75), error=(1 - 1.5 / math.pi + 0.75**2 / 2) ** 0.5 + 0.02, homogeneous=False
    ),
    Case(Shared(key="3", groups=3), error=0.92, homogeneous=False),
]
EXACT = [
    Blocks(rows=3, inner=(Exact(),)),
    Exact(),
    Lossless(),
    LosslessStreams(),
    Rows(inner=Exact()),
    Rows(inner=Lossless()),
]

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_registered_term_has_a_case():
    assert {(type(c.term).id, type(c.term).version) for c in CASES} == set(REGISTRY)


@every_case
def test_error_is_as_promised(case):
    checks.check_error(case)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Sparse(mask="seed", drop=0.5, seed=7), 0.5**0.5),
        (Sparse(mask="seed", drop=0.9, seed=2), 0.9**0.5),
        (Shared(scale=0.75), (1 - 1.5 / math.pi + 0.75**2 / 2) ** 0.5),
        (Shared(scale=1.0), (1 - 2 / math.pi + 0.5) ** 0.5),
    ],
    ids=str,
)
def test_errors_that_can_be_worked_out(case, expected):
    assert checks.error_of(case) == pytest.approx(expected, rel=0.02)


@every_case
@pytest.mark.parametrize(
    "check",
    [
        checks.check_deterministic,
        checks.check_promise,
        checks.check_config,
        checks.check_decoded,
        checks.check_zero,
        checks.check_homogeneous,
    ],
)
def test_shapes(case, check):
    for shape in checks.SHAPES:
        check(case, shape)
    if case.scalars:
        check(case, ())


@every_case
@pytest.mark.parametrize("factor", [0.3, -2.0, 0.0])
def test_a_stored_term_can_be_scaled(case, factor):
    for shape in ((16, 64), (33, 130), (3, 5, 33), (37,)):
        delta, context = checks.make_context(shape)
        encoded = case.term.encode(delta, context)
        if is_exact(encoded.term):
            with pytest.raises(AssertionError, match="exact"):
                scaled(encoded, factor)
            return
        before = {key: part.clone() for key, part in encoded.parts.items()}
        again = scaled(encoded, factor)
        expected = factor * checks.decode(encoded, shape, context)
        found = checks.decode(again, shape, context)
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-8)
        assert {k: p.dtype for k, p in again.parts.items()} == {
            k: p.dtype for k, p in encoded.parts.items()
        }
        assert all(torch.equal(before[key], part) for key, part in encoded.parts.items())


def _patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of a 16-bit dtype, or many of a wider one, as a matrix."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype).reshape(16, 16)
    if dtype.itemsize == 2:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        return every.view(dtype).reshape(256, 256)
    words = torch.int32 if dtype.itemsize == 4 else torch.int64
    draw = torch.Generator().manual_seed(5)
    info = torch.iinfo(words)
    some = torch.randint(info.min, info.max, (64, 64), generator=draw, dtype=words)
    some[0, :8] = torch.tensor([0, info.min, -1, 1, info.max, 2, 3, 4], dtype=words)
    return some.view(dtype)


every_exact = pytest.mark.parametrize(
    "term", EXACT, ids=["blocks", "exact", "lossless", "streams", "rows-exact", "rows-lossless"]
)


@every_exact
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
    ids=str,
)
def test_exact_terms_keep_every_bit(term, dtype):
    variant = _patterns(dtype)
    raw = variant.view(torch.uint8)  # some dtypes cannot be flipped themselves
    for base in (raw.flip(0), raw.flip(1), torch.zeros_like(raw)):
        checks.check_bit_exact(term, base.contiguous().view(dtype), variant)


@every_exact
def test_exact_terms_keep_booleans(term):
    variant = torch.tensor([[True, False, True], [False, False, True]])
    checks.check_bit_exact(term, ~variant, variant)


@pytest.mark.parametrize("term", [Exact(), Lossless(), LosslessStreams()], ids=str)
def test_exact_terms_need_no_base(term):
    checks.check_bit_exact(term, None, _patterns(torch.bfloat16))


@pytest.mark.parametrize("inner", [Exact(), Lossless()], ids=str)
def test_rows_see_what_a_difference_does_not(inner):
    # -0 equals 0, 2**60 + 1 is 2**60 in float32, and NaN differs from itself.
    zeros = torch.zeros(4, 8, dtype=torch.bfloat16)
    negative = zeros.clone()
    negative[2, 3] = -0.0
    checks.check_bit_exact(Rows(inner=inner), zeros, negative)
    large = torch.full((4, 8), 2**60)
    checks.check_bit_exact(Rows(inner=inner), large, large + torch.eye(4, 8, dtype=torch.int64))
    nan = torch.full((4, 8), float("nan"), dtype=torch.bfloat16)
    checks.check_bit_exact(Rows(inner=inner), nan, nan.clone())


def test_rows_keep_an_unchanged_row_in_another_dtype():
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    variant = base.to(torch.bfloat16)
    checks.check_bit_exact(Rows(inner=Exact()), base, variant)


def test_rows_store_changed_rows_only():
    base = torch.zeros(10, 16, dtype=torch.bfloat16)
    variant = base.clone()
    variant[[2, 7]] = 1
    delta = variant.float()
    encoded = Rows(inner=Codes(bits=8)).encode(delta, Context("w", base, variant))
    assert encoded.parts["index"].tolist() == [2, 7]
    assert encoded.parts["inner.codes"].shape == (2, 16)
    torch.testing.assert_close(encoded.term.decode(encoded.parts, (10, 16), Context("w")), delta)


def test_added_rows_are_values():
    base = torch.zeros(4, 8, dtype=torch.bfloat16)
    variant = torch.cat([base, torch.full((2, 8), 3.0, dtype=torch.bfloat16)])
    padded = torch.cat([base, torch.zeros(2, 8, dtype=torch.bfloat16)])
    term = Rows(inner=Planes(), added=2)
    encoded = term.encode(variant.float(), Context("w", padded, variant))
    assert encoded.parts["added"].dtype == torch.bfloat16
    found = encoded.term.decode(encoded.parts, (6, 8), Context("w", padded))
    assert torch.equal(found, variant.float())


def test_exact_inside_rows_is_exact_and_planes_are_not():
    assert is_exact(Rows(inner=Exact()))
    assert not is_exact(Rows(inner=Planes()))
    assert not is_exact(Planes())


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (1, 1)),
        ((5,), (1, 5)),
        ((4, 6), (4, 6)),
        ((2, 3, 32), (6, 32)),
        ((2, 3, 31), (2, 93)),
        ((4, 3, 3, 3), (4, 27)),
        ((2, 3, 4, 64), (2, 768)),
    ],
)
def test_rows_and_columns(shape, expected):
    assert rows_and_columns(shape) == expected


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Planes(bits=0), "bits"),
        (lambda: Planes(bits=9), "bits"),
        (lambda: Planes(scale="group"), "group"),
        (lambda: Planes(scale="row", group=8), "group"),
        (lambda: Planes(scale="all"), "scale"),
        (lambda: Banded(ranks=(1, 2), widths=(8,)), "pairs"),
        (lambda: Banded(ranks=(), widths=()), "pairs"),
        (lambda: Banded(ranks=(0,), widths=(8,)), "ranks"),
        (lambda: Banded(ranks=(1,), widths=(9,)), "widths"),
        (lambda: Banded(ranks=(1.0,), widths=(8,)), "whole numbers"),
        (lambda: Banded(counts=(1, 1)), "counts"),
        (lambda: NM(keep=4, of=4), "keep"),
        (lambda: NM(of=257), "of"),
        (lambda: NM(bits=1), "bits"),
        (lambda: Codebook(levels=3), "levels"),
        (lambda: Codebook(levels=256), "levels"),
        (lambda: Codebook(levels=0), "levels"),
        (lambda: Codes(bits=9), "bits"),
        (lambda: ColumnPlanes(bits=0), "bits"),
        (lambda: Patches(shares=(0.5, 0.6)), "sum to 1"),
        (lambda: Patches(shares=(0.5, float("nan"))), "shares"),
        (lambda: Patches(widths=(1, 0)), "widths"),
        (lambda: Patches(size=1), "size"),
        (lambda: SparseCodes(bits=9), "bits"),
        (lambda: SparseCodes(rice=17), "rice"),
        (lambda: Codes(group=-1), "group"),
        (lambda: LowRank(rank=0), "rank"),
        (lambda: Sparse(drop=1.0), "drop"),
        (lambda: Sparse(drop=float("nan")), "drop"),
        (lambda: Sparse(seed=-1), "seed"),
        (lambda: Sparse(mask="none"), "mask"),
        (lambda: LosslessStreams(level=23), "level"),
        (lambda: LosslessStreams(lengths=(1, 2, 3)), "lengths"),
        (lambda: Lossless(mode="xor"), "mode"),
        (lambda: Lossless(block=0), "block"),
        (lambda: Lossless(depth=0), "depth"),
        (lambda: Lossless(words=(1, 2), low=(1,)), "one a block"),
        (lambda: Exact(dtype="F7"), "dtype"),
        (lambda: Rows(inner="codes"), "inner"),
        (lambda: Shared(family="sha256:1"), "family"),
        (lambda: Shared(groups=257), "groups"),
        (lambda: Shared(scale=float("inf")), "scale"),
    ],
)
def test_impossible_configurations_are_refused(make, field):
    with pytest.raises(DeltafoldError, match=field) as caught:
        make()
    assert caught.value.code == "bad-recipe"


PLANES = config_of(Planes())


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({**PLANES, "id": "waves"}, "unknown-codec"),
        ({**PLANES, "v": 2}, "unknown-codec"),
        ({**PLANES, "v": "1"}, "unknown-codec"),
        ({**PLANES, "colour": 1}, "bad-manifest"),
        ({k: v for k, v in PLANES.items() if k != "bits"}, "bad-manifest"),
        ({**PLANES, "bits": "1"}, "bad-manifest"),
        ({**PLANES, "bits": True}, "bad-manifest"),
        ({**PLANES, "bits": 1.5}, "bad-manifest"),
        ({**PLANES, "bits": None}, "bad-manifest"),
        ({**PLANES, "bits": [1]}, "bad-manifest"),
        ({**PLANES, "bits": 9}, "bad-manifest"),
        ({**config_of(Rows()), "inner": 3}, "bad-manifest"),
        ({**config_of(Rows()), "inner": {"id": "waves", "v": 1}}, "unknown-codec"),
        ({**config_of(LosslessStreams()), "lengths": ["1", "2"]}, "bad-manifest"),
        ({**config_of(Lossless()), "words": ["1"], "low": [1]}, "bad-manifest"),
        ({}, "unknown-codec"),
    ],
)
def test_configurations_from_elsewhere_are_refused(config, code):
    with pytest.raises(DeltafoldError) as caught:
        term_from_config(config, where="some delta")
    assert caught.value.code == code


def test_dropped_entries_of_factors_are_zero_and_the_others_stay():
    _, context = checks.make_context((40, 60))
    term = Banded(ranks=(2, 3), widths=(16, 8), masked=True, seed=3, group=16)
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 60, generator=draw), torch.randn(5, 40, generator=draw)
    kept = torch.tensor([[60, 30, 20, 1, 0], [40, 20, 10, 1, 0]], dtype=torch.int32)
    encoded = term.from_factors(a, b, context, kept)
    assert encoded.term.counts == (90, 60, 21, 11)
    found_a, found_b = encoded.term.factors(encoded.parts, (40, 60), context)
    assert torch.equal((found_a != 0).sum(dim=1).int(), kept[0])
    assert torch.equal((found_b.T != 0).sum(dim=1).int(), kept[1])
    torch.testing.assert_close(found_a, torch.where(found_a != 0, a, 0.0), rtol=0, atol=0.03)
    written = {key: (part.dtype, tuple(part.shape)) for key, part in encoded.parts.items()}
    assert written == {k: tuple(spec) for k, spec in encoded.term.parts((40, 60)).items()}
    too_many = {**encoded.parts, "kept": kept + 1}
    with pytest.raises(DeltafoldError, match="so many entries"):
        encoded.term.decode(too_many, (40, 60), context)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.03, 0.5, 1.0])
def test_runs_of_zeros_come_back(share):
    draw = torch.Generator().manual_seed(1)
    keep = torch.rand(20_000, generator=draw) < share
    keep[0] = keep[-1] = share > 0.01
    delta = torch.where(keep, 1.0 + torch.rand(20_000, generator=draw), 0.0)
    encoded = SparseCodes(bits=16).encode(delta, Context("w"))
    found = encoded.term.decode(encoded.parts, (20_000,), Context("w"))
    assert torch.equal(found != 0, keep)
    torch.testing.assert_close(found, delta, rtol=1e-3, atol=0)


def test_runs_must_fit_the_tensor():
    delta, context = checks.make_context((4, 8))
    encoded = SparseCodes().encode(delta, context)
    wrong = [{"high": torch.zeros(4, dtype=torch.uint8)}]
    for parts in [{**encoded.parts, **w} for w in wrong]:
        with pytest.raises(DeltafoldError, match="runs"):
            encoded.term.decode(parts, (4, 8), context)
    with pytest.raises(DeltafoldError, match="runs"):
        encoded.term.decode(encoded.parts, (4, 7), context)


def test_classes_must_have_their_number_of_patches():
    delta, context = checks.make_context((8, 8))
    encoded = Patches(size=4).encode(delta, context)
    parts = {**encoded.parts, "classes": torch.zeros(1, dtype=torch.uint8)}
    with pytest.raises(DeltafoldError, match="number of patches"):
        encoded.term.decode(parts, (8, 8), context)


def test_positions_must_ascend_within_their_block():
    delta, context = checks.make_context((4, 8))
    encoded = NM().encode(delta, context)
    parts = {**encoded.parts, "positions": torch.zeros(4, 1, dtype=torch.uint8)}
    with pytest.raises(DeltafoldError, match="ascend"):
        encoded.term.decode(parts, (4, 8), context)


def test_two_terms_cannot_share_an_id():
    with pytest.raises(AssertionError, match="share the id"):
        register(Planes)


def test_a_damaged_stream_is_an_error():
    delta, context = checks.make_context((8, 8))
    encoded = LosslessStreams().encode(delta, context)
    for stream in (torch.zeros(9, dtype=torch.uint8), encoded.parts["stream0"][:-3]):
        with pytest.raises(DeltafoldError) as caught:
            encoded.term.decode({**encoded.parts, "stream0": stream}, (8, 8), context)
        assert caught.value.code == "checksum"


def test_a_stream_may_not_inflate_beyond_its_tensor():
    _, context = checks.make_context((2048, 8))
    bomb = LosslessStreams().encode(torch.zeros(2048, 8), context)
    small = Context("w", torch.zeros(1, 8, dtype=torch.bfloat16))
    with pytest.raises(DeltafoldError, match="wrong length"):
        bomb.term.decode(bomb.parts, (1, 8), small)


@pytest.mark.parametrize("index", [[1, 1], [2, 1], [-1, 2], [0, 8]])
def test_an_index_must_ascend_within_the_tensor(index):
    delta, context = checks.make_context((8, 8))
    encoded = Rows().encode(delta * (torch.arange(8) < 2).reshape(8, 1), context)
    parts = {**encoded.parts, "index": torch.tensor(index, dtype=torch.int32)}
    with pytest.raises(DeltafoldError, match="ascend"):
        encoded.term.decode(parts, (8, 8), Context("w"))


def test_a_mask_must_keep_as_many_entries_as_there_are_values():
    delta, context = checks.make_context((4, 8))
    encoded = Sparse(mask="bitmap").encode(delta, context)
    parts = {**encoded.parts, "mask": torch.zeros(4, dtype=torch.uint8)}
    with pytest.raises(DeltafoldError, match="number of entries"):
        encoded.term.decode(parts, (4, 8), Context("w"))
