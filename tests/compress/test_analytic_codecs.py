"""What the codecs must reach on normally distributed deltas, and the bytes that they promise."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from deltafold.compress import parse_spec
from deltafold.compress.methods import BitDelta, CodebookMethod, bits_per_weight
from deltafold.compress.methods.impart import ImPart, drop_rates
from deltafold.compress.terms import NM, Banded, Codebook, Context, Encoded, SparseCodes
from deltafold.compress.terms.grids import Scales
from deltafold.compress.terms.lowrank import truncated_svd
from deltafold.compress.terms.patches import basis

SHAPE = (512, 2048)
#: Llama-2-7B: 32 layers of 4 attention and 3 feed-forward matrices, and two tables.
LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def gaussian(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1e-3


def decode(encoded: list[Encoded], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([e.term.decode(e.parts, shape, Context("w")) for e in encoded]).sum(dim=0)


def error(found: torch.Tensor, delta: torch.Tensor) -> float:
    return ((found - delta).norm() / delta.norm()).item()


def error_of(spec: str, delta: torch.Tensor) -> float:
    encoded = parse_spec(spec).encode(delta, Context("w"))
    return error(decode(encoded, tuple(delta.shape)), delta)


def stored_bits(encoded: list[Encoded]) -> int:
    return 8 * sum(p.numel() * p.element_size() for e in encoded for p in e.parts.values())


def entropy(share: float) -> float:
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


# Simulated once on other random matrices. Lloyd's are the known optima of the normal distribution:
# sqrt of 0.3634, 0.1175, 0.03454 and 0.009497 (Max 1960, table I).
@pytest.mark.parametrize(
    ("bits", "blocks", "levels"),
    [(1, 0.603, 0.6028), (2, 0.374, 0.3428), (3, 0.235, 0.1858), (4, 0.149, 0.0975)],
)
def test_codebooks_of_normal_deltas(bits, blocks, levels):
    delta = gaussian()
    assert error_of(f"codebook:bits={bits}", delta) == pytest.approx(blocks, abs=0.003)
    assert error_of(f"lloyd:bits={bits}", delta) == pytest.approx(levels, abs=0.001)


@pytest.mark.parametrize("scale", ["tensor", "row"])
def test_one_magnitude_is_bitdelta(scale):
    delta = gaussian((48, 96))
    signs = decode(BitDelta(scale=scale).encode(delta, Context("w")), (48, 96))
    blocks = decode(CodebookMethod(bits=1, scale=scale).encode(delta, Context("w")), (48, 96))
    torch.testing.assert_close(blocks, signs, rtol=1e-3 if scale == "row" else 1e-6, atol=0)


@pytest.mark.parametrize("scale", ["tensor", "row"])
@pytest.mark.parametrize("name", ["codebook", "lloyd"])
def test_more_magnitudes_have_less_error(name, scale):
    delta = gaussian((64, 512))
    errors = [error_of(f"{name}:bits={bits},scale={scale}", delta) for bits in range(1, 7)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_blocks_have_equal_counts_and_their_means():
    delta = gaussian((64, 256))
    encoded = Codebook(levels=8).encode(delta, Context("w"))
    _, index = encoded.term.split(encoded.parts, (64, 256))
    assert torch.bincount(index.reshape(-1)).tolist() == [64 * 256 // 8] * 8
    ranked = delta.abs().reshape(-1).sort().values.reshape(8, -1)
    torch.testing.assert_close(encoded.parts["table"][0], ranked.mean(dim=1), rtol=1e-5, atol=0)


def test_a_factor_other_than_one_costs_squared_error():
    delta = gaussian((64, 256))
    errors = {
        c: error_of(f"bitdelta:factor={c},scale=tensor", delta) for c in (0.5, 0.9, 1, 1.1, 2)
    }
    assert min(errors, key=errors.__getitem__) == 1
    # |D - c a S|^2 = |D|^2 - (2c - c^2) a^2 n, and a^2 n = (2 / pi) |D|^2.
    assert errors[2] == pytest.approx(1.0, abs=0.01)
    assert errors[0.5] == pytest.approx(math.sqrt(1 - 0.75 * 2 / math.pi), abs=0.01)


def test_column_scales_follow_the_columns():
    delta = gaussian((256, 128)) * torch.logspace(-2, 0, 128)
    assert error_of("bitdelta:scale=column", delta) == pytest.approx(0.603, abs=0.01)
    assert error_of("bitdelta:scale=row", delta) > 0.8


def test_a_low_rank_of_the_rest_beats_signs_and_the_other_order():
    draw = torch.Generator().manual_seed(2)
    low = torch.randn(128, 4, generator=draw) @ torch.randn(4, 192, generator=draw)
    delta = gaussian((128, 192)) + 4e-4 * low
    signs = error_of("bitdelta:scale=tensor", delta)
    assert error_of("d-qrelo:rho=0.1", delta) < 0.9 * signs
    assert error_of("d-qrelo:rho=0.1,first=svd", delta) < signs


def test_rank_of_the_rest_is_the_papers():
    ranks = [parse_spec("d-qrelo").plan(shape, "BF16")[1].rank for shape in LAYER[3:5]]
    assert ranks == [128, 187]
    assert bits_per_weight(parse_spec("d-qrelo"), (4096, 4096), "BF16") == pytest.approx(
        2, abs=1e-4
    )


def two_of_four(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A delta, and what its 2:4 codes on DeltaZip's grid (step 2 max / (2^b - 1)) stand for."""
    delta, term = gaussian((256, 4096)), NM(2, 4, bits, scale_format="float32")
    positions = term.largest(delta)
    values = term.pick(delta, positions)
    step = values.abs().amax(dim=1, keepdim=True) * (2 / (2**bits - 1))
    zero = torch.full(step.shape, 2 ** (bits - 1), dtype=torch.uint8)
    coded = term.grid.quantise(values, Scales(step, zero))
    return delta, decode([term.assemble(positions, coded)], (256, 4096))


def test_two_of_four_at_two_bits_without_feedback_is_mostly_zeros():
    delta, found = two_of_four(2)
    shares = torch.stack([(found < 0).double(), (found == 0).double(), (found > 0).double()])
    shares = shares.mean(dim=(1, 2))
    assert shares[1].item() == pytest.approx(0.80, abs=0.01)
    assert -(shares * shares.log2()).sum().item() == pytest.approx(0.92, abs=0.03)
    assert error(found, delta) == pytest.approx(0.72, abs=0.02)
    # A fitted grid does better, and still not as well as two sign planes of the same size.
    assert error_of("nm:bits=2", delta) == pytest.approx(0.48, abs=0.01)


def test_two_of_four_at_four_bits_loses_what_the_mask_drops():
    delta, found = two_of_four(4)
    assert error(found, delta) == pytest.approx(0.378, abs=0.005)
    masked = decode([NM(2, 4, 16).encode(delta, Context("w"))], (256, 4096))
    assert error(masked, delta) == pytest.approx(0.364, abs=0.002)
    assert bool(((masked.reshape(256, 1024, 4) != 0).sum(dim=-1) == 2).all())


@pytest.mark.parametrize("shape", [(256, 1024), (64, 1000)])
def test_one_of_a_group_keeps_the_expected_delta(shape):
    delta = torch.ones(shape)
    term = parse_spec("stratified:bits=16,of=16")
    found = decode(term.encode(delta, Context("w")), shape)
    # Every group adds up to its own width, so a row of ones sums to its length.
    assert found.sum(dim=1).tolist() == pytest.approx([shape[1]] * shape[0], rel=1e-3)
    hits = torch.stack([(found[:, i::16] != 0).float().mean() for i in range(16)])
    assert hits.min() > 0.5 / 16
    assert hits.max() < 2.0 / 16
    other = parse_spec("stratified:bits=16,seed=1").encode(delta, Context("w"))
    assert not torch.equal(decode(other, shape), found)


def test_one_of_a_group_errs_as_a_random_drop_of_the_same_share():
    delta = gaussian()
    # sqrt(G - 1), as of dropping 15 of 16 at random.
    assert error_of("stratified:bits=16", delta) == pytest.approx(math.sqrt(15), rel=0.02)


def test_a_shift_and_a_rest_are_what_they_say():
    """Both terms by hand: `shift * B`, then `scale` times the codec of what that leaves."""
    delta = gaussian((64, 256))
    spec = "shift-scale:vector=(svd:rank=4),rest=(bitdelta:scale=tensor),shift=0.5,scale=1.5"
    first, second = parse_spec(spec).encode(delta, Context("w"))
    ((term, parts),) = parse_spec("svd:rank=4").encode(delta, Context("w"))
    vector = term.decode(parts, (64, 256), Context("w"))
    found = first.term.decode(first.parts, (64, 256), Context("w"))
    torch.testing.assert_close(found, 0.5 * vector, rtol=1e-5, atol=1e-8)
    left = delta - 0.5 * vector
    expected = 1.5 * left.abs().mean() * left.sign()
    found = second.term.decode(second.parts, (64, 256), Context("w"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_a_shift_by_signs_and_a_low_rank_of_the_rest_are_d_qrelo():
    delta = gaussian((64, 256))
    ours = parse_spec("shift-scale:vector=(bitdelta:scale=tensor),rest=(svd:rank=4)")
    theirs = parse_spec("d-qrelo:rho=0.0625").encode(delta, Context("w"))
    (signs, low), rank = ours.encode(delta, Context("w")), theirs[1].term.rank
    assert torch.equal(signs.parts["signs"], theirs[0].parts["signs"])
    torch.testing.assert_close(signs.parts["scales"], theirs[0].parts["scales"])
    same = parse_spec(f"shift-scale:vector=(bitdelta:scale=tensor),rest=(svd:rank={rank})")
    again = same.encode(delta, Context("w"))[1]
    assert all(torch.equal(again.parts[k], theirs[1].parts[k]) for k in again.parts)
    assert low.term.rank == 4


@pytest.mark.parametrize(("drop", "bits"), [(0.95, 4), (0.97, 4), (0.99, 4)])
def test_runs_of_zeros_take_little_more_than_their_entropy(drop, bits):
    delta = gaussian((1024, 1024))
    spec = f"quantize-and-drop:drop={drop},bits={bits}"
    encoded = parse_spec(spec).encode(delta, Context("w"))
    kept = (decode(encoded, (1024, 1024)) != 0).double().mean().item()
    assert kept == pytest.approx(1 - drop, abs=1e-4)
    ideal = entropy(drop) + (1 - drop) * bits
    found = stored_bits(encoded) / delta.numel()
    assert ideal < found < 1.03 * ideal
    # The published ratios, 32.89, 50.89 and 132.46, are 16 bits over the ideal.
    assert 16 / ideal == pytest.approx({0.95: 32.89, 0.97: 50.89, 0.99: 132.46}[drop], abs=0.01)
    assert bits_per_weight(parse_spec(spec), (1024, 1024), "BF16") == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("drop", [0.2, 0.5, 0.9, 0.999])
def test_runs_are_never_larger_than_a_bitmap(drop):
    keep = torch.rand(100_000, generator=torch.Generator().manual_seed(4)) >= drop
    delta = torch.where(keep, gaussian((100_000,)), 0.0)
    runs, bitmap = (
        stored_bits(parse_spec(f"sparse:mask={mask}").encode(delta, Context("w")))
        for mask in ("runs", "bitmap")
    )
    assert runs <= bitmap


def test_each_level_loses_the_same_share():
    delta = gaussian()
    encoded = parse_spec("quantize-and-drop:drop=0.75,bits=2").encode(delta, Context("w"))
    found = decode(encoded, SHAPE)
    levels = encoded[0].parts["table"]
    grid = levels * 0.25
    nearest = (delta.unsqueeze(-1) - grid).abs().argmin(dim=-1)
    for i, level in enumerate(levels):
        members = int((nearest == i).sum())
        assert int((found == level).sum()) == pytest.approx(members / 4, abs=1)


def test_the_largest_entries_stay():
    delta = gaussian((64, 64))
    found = decode(parse_spec("topk:keep=0.25").encode(delta, Context("w")), (64, 64))
    kept = found != 0
    assert int(kept.sum()) == 1024
    assert delta[kept].abs().min() > delta[~kept].abs().max()


def test_values_with_a_hole_around_zero_spend_no_level_on_it():
    delta = torch.cat([torch.linspace(1, 2, 500), -torch.linspace(1, 2, 500)])
    # Two levels a sign are 1 and 2; nothing is further than a half from one of them.
    (encoded,) = parse_spec("sparse:bits=2").encode(delta, Context("w"))
    assert encoded.parts["table"].tolist() == [-2, -1, 1, 2]
    (encoded,) = parse_spec("sparse:bits=1").encode(delta, Context("w"))
    assert encoded.parts["table"].tolist() == pytest.approx([-1.5, 1.5])


def test_patches_of_all_coefficients_are_the_delta():
    delta = gaussian((100, 70))
    assert error_of("dct:share=1,bits=8", delta) < 0.01
    # One frequency a patch is one coefficient, which any grid of its own reaches.
    spectrum = torch.zeros(6, 16, 5, 16)
    spectrum[:, 3, :, 7] = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    waves = basis(16).T @ spectrum.transpose(1, 2) @ basis(16)
    waves = waves.transpose(1, 2).reshape(96, 80)
    assert error_of("dct:share=1,bits=2,match=false", waves) < 1e-3
    assert error_of("int:bits=2", waves) > 0.2


def test_matched_patches_have_the_deltas_mean_magnitude():
    delta = gaussian()
    found = decode(parse_spec("dct").encode(delta, Context("w")), SHAPE)
    assert found.abs().mean().item() == pytest.approx(delta.abs().mean().item(), rel=1e-3)


def test_rates_of_dropped_entries():
    singular = torch.linspace(10, 1, 40)
    drop = drop_rates(singular, 0.8, 1.0)
    assert drop[0] == 0
    assert 0.8 <= float(drop.mean()) < 0.8 + 1 / 40
    alive = drop < 1
    expected = (1 - singular[alive].double() / 10) * 0.8
    torch.testing.assert_close(drop[alive], expected, rtol=1e-6, atol=1e-7)
    assert bool((drop.diff() >= 0).all())


def test_budgets_of_dropped_factors_are_the_papers():
    # Square: alpha = (1 + a) / 2. A 5120 x 13824 matrix: alpha = (0.55 + 1.45 a) / 2 and
    # beta = 1 - 1.45 (1 - beta), which rounds 2 * 13824 / 18944 = 1.4595.
    a, beta = 1 - 1 / 32, 0.7
    method = ImPart(ratio=32, beta=beta)
    rank, gamma = method.budget(4096, 4096)
    assert rank == math.floor(4096 * 0.3)
    assert gamma == pytest.approx(((1 + a) / 2 - beta) / (1 - beta), rel=1e-9)
    rank, gamma = method.budget(5120, 13824)
    wide = 1 - 1.45 * (1 - beta)
    assert rank == pytest.approx(5120 * (1 - wide), rel=0.01)
    assert gamma == pytest.approx(((0.55 + 1.45 * a) / 2 - wide) / (1 - wide), rel=0.001)


@pytest.mark.parametrize("shape", [(96, 96), (64, 160)])
def test_dropped_factors_take_what_was_asked_for(shape):
    delta = gaussian(shape)
    for ratio in (8, 16):
        method = parse_spec(f"impart:ratio={ratio}")
        (encoded,) = method.encode(delta, Context("w"))
        values = sum(encoded.term.counts)
        budget = delta.numel() / ratio
        # Whole entries, whole vectors and a whole rank: each rounds by one at most.
        assert budget - 2 * sum(shape) < values < 1.02 * budget


def test_dropped_factors_keep_the_expected_delta():
    shape = (24, 32)
    delta = gaussian(shape) + 1e-3
    # Vectors that lose everything are left out of what is expected.
    method = ImPart(ratio=2.5, beta=0.5)
    rank, gamma = method.budget(*shape)
    left, singular, right = truncated_svd(delta, rank)
    alive = int((drop_rates(singular, gamma, 1.0) < 1).sum())
    expected = (left[:, :alive] * singular[:alive]) @ right[:alive]
    draws = [replace(method, seed=seed).encode(delta, Context("w")) for seed in range(400)]
    found = torch.stack([decode(encoded, shape) for encoded in draws])
    once = error(found[0], expected)
    assert once > 0.3
    # The mean of 400 draws has a twentieth of one draw's deviation.
    assert error(found.mean(dim=0), expected) < 1.2 * once / math.sqrt(400)


def test_bytes_of_the_bitdelta_layout_of_seven_billion_parameters():
    term = BitDelta(scale="tensor").plan((4096, 4096), "BF16")[0]
    linear = sum(s.nbytes for shape in LAYER * 32 for s in term.parts(shape).values())
    tables, norms = 2 * 2 * 32000 * 4096, 2 * 266_240
    assert linear + tables + norms == pytest.approx(1.334e9, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "ranks", "codes"),
    [((4096, 4096), (2, 32, 968), 1.0), ((11008, 4096), (2, 32, 1428), 0.9942)],
)
def test_bytes_of_the_delta_come_layout(shape, ranks, codes):
    parts = Banded(ranks=ranks, widths=(8, 3, 2)).parts(shape)
    weights = shape[0] * shape[1]
    packed = sum(spec.nbytes for key, spec in parts.items() if key.endswith(".codes"))
    assert 8 * packed / weights == pytest.approx(codes, abs=1e-4)
    rest = sum(spec.nbytes for key, spec in parts.items() if not key.endswith(".codes"))
    # A float16 scale and a zero of 2 bits for 128 of the 0.489 entries that a weight has.
    assert 8 * rest / weights == pytest.approx(0.069, abs=0.002)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        ("bitdelta", 1 + 32 / 4096),
        ("bitdelta:scale=column", 1 + 32 / 4096),
        ("codebook:bits=3", 3.0),
        ("lloyd:bits=4", 4.0),
        ("nm:bits=4", 3 + 16 / 4096),
        ("nm:bits=2", 2 + 16 / 4096),
        ("stratified", 0.5 + 16 / 4096),
        ("stratified:of=8,bits=5", 1.0 + 16 / 4096),
        ("dct", 1 + (16 + 8 + 16 + 2) / 512),
        ("impart:ratio=32", 0.5),
        ("topk:keep=0.1,mask=bitmap", 2.6),
        ("exact", 16.0),
    ],
)
def test_bits_a_weight_are_known_before_any_data(spec, bits):
    assert bits_per_weight(parse_spec(spec), (4096, 4096), "BF16") == pytest.approx(bits, rel=0.01)


def test_a_seeded_mask_takes_no_room():
    parts = SparseCodes(mask="seed", drop=0.5, bits=4).parts((64, 64))
    assert {key: spec.nbytes for key, spec in parts.items()} == {"codes": 1024, "table": 64}
