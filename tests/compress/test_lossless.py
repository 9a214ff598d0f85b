"""The lossless coder: every bit comes back, and close to as few bytes as entropy allows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from checkpoints import bits
from hypothesis import given
from hypothesis import strategies as st
from term_checks import check_bit_exact

from deltafold.compress import DeltafoldError, rans, symbols
from deltafold.compress.terms import Context, Lossless, LosslessStreams
from deltafold.compress.terms import lossless as module


def pair(count: int, step: float, dtype=torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of standard deviation 0.02, and the same moved by `step` of that."""
    draw = torch.Generator().manual_seed(0)
    base = (torch.randn(count, generator=draw) * 0.02).to(dtype)
    moved = base.float() + torch.randn(count, generator=draw) * 0.02 * step
    return base, moved.to(dtype)


def size(term, base, variant) -> int:
    encoded = term.encode(torch.empty(0), Context("w", base, variant))
    return sum(part.numel() for part in encoded.parts.values())


def entropy(sigma: float) -> float:
    """Bits of a normal number of this deviation, rounded to whole numbers."""
    edges = np.arange(-4000, 4001) + 0.5
    below = np.array([0.5 * math.erfc(-e / sigma / math.sqrt(2)) for e in edges])
    share = np.diff(below)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def test_the_size_is_close_to_what_entropy_allows():
    count, step = 2**20, 1e-2
    base, variant = pair(count, step)
    # A word of exponent e is 2^(e - 7) wide, and the step is as wide everywhere.
    exponents = np.floor(np.log2(np.maximum(base.float().abs().numpy(), 1e-38)))
    floor = 0.0
    for e in np.unique(exponents):
        many = int((exponents == e).sum())
        if many > 100:
            floor += many * entropy(0.02 * step / 2.0 ** (e - 7))
    found = 8 * size(Lossless(), base, variant)
    assert floor < found < 1.06 * floor


@pytest.mark.parametrize("step", [1e-3, 3e-3, 1e-2])
def test_it_beats_streams_by_a_quarter(step):
    base, variant = pair(2**18, step)
    assert size(Lossless(), base, variant) < 0.75 * size(LosslessStreams(), base, variant)


def test_what_the_base_says_nothing_of_is_coded_without_it():
    base, _ = pair(2**14, 1.0)
    other = base[torch.randperm(len(base), generator=torch.Generator().manual_seed(3))] * 40
    encoded = Lossless().encode(torch.empty(0), Context("w", base, other))
    assert encoded.term.mode == "raw"
    assert size(Lossless(), base, other) < 0.8 * other.numel() * 2


def test_noise_is_stored_as_it_is():
    noise = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)
    encoded = Lossless().encode(torch.empty(0), Context("w", None, torch.from_numpy(noise)))
    assert encoded.term.mode == "plain"
    assert size(Lossless(), None, torch.from_numpy(noise)) == 4096


def test_an_equal_tensor_is_nearly_nothing():
    base, _ = pair(2**18, 1.0)
    assert size(Lossless(), base, base.clone()) < 2**18 // 100


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_do_not_change_a_byte(monkeypatch, threads):
    base, variant = pair(5000, 1e-2, torch.float32)
    context = Context("w", base, variant)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 1)
    alone = Lossless(block=700).encode(torch.empty(0), context)
    monkeypatch.setattr(module.os, "cpu_count", lambda: threads)
    many = Lossless(block=700).encode(torch.empty(0), context)
    assert many.term == alone.term
    assert {k: bits(v) for k, v in many.parts.items()} == {
        k: bits(v) for k, v in alone.parts.items()
    }
    found = many.term.restore(many.parts, (5000,), torch.float32, Context("w", base))
    assert bits(found) == bits(variant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_pattern_against_every_kind_of_base(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    draw = torch.Generator().manual_seed(1)
    for base in (every.flip(0), every[torch.randperm(2**16, generator=draw)], every ^ 1, every):
        check_bit_exact(Lossless(), base.view(dtype), every.view(dtype))
    check_bit_exact(Lossless(), None, every.view(dtype))


@given(st.binary(min_size=1, max_size=400), st.sampled_from(list(symbols.WORDS)), st.booleans())
def test_words_survive_their_symbols(data, width, leading):
    words = np.frombuffer(data[: len(data) // width * width], symbols.WORDS[width])
    found = symbols.split(words, leading=leading)
    low = symbols.unpack_low(
        symbols.pack_low(words, found, leading=leading), found, width, leading=leading
    )
    assert np.array_equal(symbols.join(found, low, leading=leading), words)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 255)), min_size=1, max_size=300),
    st.integers(1, 40),
)
def test_symbols_survive_their_code(pairs, lanes):
    keys = np.array([c << 8 | s for c, s in pairs], np.uint16)
    table = rans.table_for(np.bincount(keys, minlength=1024).reshape(4, 256))
    assert table.sound()
    states, words = rans.encode(keys, table, min(lanes, len(keys)))
    found = rans.decode((keys >> 8).astype(np.uint8), table, states, words)
    assert np.array_equal(found, (keys & 255).astype(np.uint8))


def test_damage_is_noticed_without_a_checksum():
    base, variant = pair(3000, 1e-2)
    encoded = Lossless(block=1000).encode(torch.empty(0), Context("w", base, variant))
    reading = Context("w", base)

    def code(**changes) -> str:
        with pytest.raises(DeltafoldError) as caught:
            encoded.term.restore({**encoded.parts, **changes}, (3000,), torch.bfloat16, reading)
        return caught.value.code

    for key in ("tables", "states", "words"):
        part = encoded.parts[key].clone()
        part[len(part) // 2] ^= 64
        assert code(**{key: part}) == "checksum"
    with pytest.raises(DeltafoldError) as caught:
        encoded.term.restore(
            encoded.parts, (5000,), torch.bfloat16, Context("w", torch.cat([base] * 2)[:5000])
        )
    assert caught.value.code == "checksum"
    with pytest.raises(DeltafoldError) as caught:
        encoded.term.restore(encoded.parts, (3000,), torch.bfloat16, Context("w", base.float()))
    assert caught.value.code == "base-mismatch"


def test_a_small_frame_may_not_claim_to_be_a_huge_table():
    import zstandard

    base, variant = pair(3000, 1e-2)
    encoded = Lossless().encode(torch.empty(0), Context("w", base, variant))
    bomb = zstandard.ZstdCompressor().compress(bytes(256 + 512 * 10**5))
    tables = torch.from_numpy(np.frombuffer(bomb, np.uint8).copy())
    with pytest.raises(DeltafoldError, match="no sound size"):
        encoded.term.restore(
            {**encoded.parts, "tables": tables}, (3000,), torch.bfloat16, Context("w", base)
        )


def test_sizes_cost_nothing_to_promise():
    # A forged manifest may name any shape; what it promises is compared before anything is read.
    specs = Lossless(mode="difference", block=1, depth=1).parts((2**40, 2**20))
    assert specs["states"].shape == (4 * 2**60,)
    assert Lossless(mode="raw", block=10, depth=4).parts((25,))["states"].shape == (4 * 8,)
