"""The lossless coder in C and its portable twin: the same bytes, the same refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import bits

from deltafold.compress import DeltafoldError, coded_blocks, dtypes, rans, symbols
from deltafold.compress.coded_blocks import Block, Coding
from deltafold.compress.terms import Context, Lossless
from deltafold.compress.terms import lossless as module

DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.uint8, torch.int16, torch.int32, torch.int64,
]  # fmt: skip
needs_c = pytest.mark.skipif(
    coded_blocks._library() is None, reason="needs AVX2, BMI2 and a C compiler"
)


@pytest.fixture
def portable(monkeypatch):
    def without(function, *args):
        with monkeypatch.context() as m:
            m.setattr(coded_blocks, "_library", lambda: None)
            return function(*args)

    return without


def same_both_ways(portable, term, base, variant) -> str:
    """Code and decode a tensor on both paths. Returns the mode."""
    writing, reading = Context("w", base, variant), Context("w", base)
    found = term.encode(torch.empty(0), writing)
    expected = portable(term.encode, torch.empty(0), writing)
    assert found.term == expected.term
    for key, part in expected.parts.items():
        assert torch.equal(found.parts[key], part), key
    what = (found.parts, tuple(variant.shape), variant.dtype, reading)
    assert bits(found.term.restore(*what)) == bits(variant)
    assert bits(portable(found.term.restore, *what)) == bits(variant)
    return found.term.mode


def patterns(dtype, count: int, spread: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Words of every kind, NaN payloads among them, and others up to about `spread` words off."""
    rng, size = np.random.default_rng(count), dtype.itemsize
    word = symbols.WORDS[size]
    base = rng.integers(0, 2 ** (8 * size) - 1, count, dtype=np.uint64).astype(word)
    step = (rng.standard_normal(count) * spread).astype(np.int64).astype(word)
    return tuple(torch.from_numpy(w.view(np.uint8)).view(dtype) for w in (base, base + step))


@needs_c
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_paths_write_and_read_the_same_bytes(dtype, portable):
    modes = set()
    for count in (1, 7, 255, 257, 2049, 5000):
        for spread in (0, 2, 300):
            base, variant = patterns(dtype, count, spread)
            for block in (2**22, 700):
                modes.add(same_both_ways(portable, Lossless(block=block), base, variant))
    base, variant = patterns(dtype, 20000, 2)
    modes.add(same_both_ways(portable, Lossless(block=9001), base, variant))
    few = (torch.arange(3000) // 750).to(torch.uint8)
    few = few.view(dtype)
    modes.add(same_both_ways(portable, Lossless(), None, few))
    assert modes == {"difference", "raw", "plain"}


@needs_c
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point], ids=str)
@pytest.mark.parametrize("far", [False, True])
def test_both_paths_use_the_same_contexts(dtype, far, portable):
    """Exponents that are neighbours, and such as are far apart."""
    draw = torch.Generator().manual_seed(4)
    base = torch.randn(20_003, generator=draw)
    wide = torch.finfo(dtype).max > 1e30
    if far:
        size = 2.0 ** (20 if wide else 4)
        base = base.sign() * torch.where(torch.arange(20_003) % 2 > 0, 1 / size, size)
    base = base.to(dtype)
    words = words_of(base)
    step = (torch.randn(20_003, generator=draw) * 3).round().numpy().astype(words.dtype)
    variant = torch.from_numpy((words + step).view(np.uint8)).view(dtype)
    found = module._plan(Lossless(dtype=dtypes.NAMES[dtype]), "difference", words + step, words)
    assert int(found.own.max()) >= 2
    span = np.flatnonzero(found.own)
    assert (span[-1] - span[0] >= 32) == (far and wide)
    assert same_both_ways(portable, Lossless(), base, variant) == "difference"


def words_of(tensor: torch.Tensor):
    return dtypes.raw_bytes(tensor).numpy().view(symbols.WORDS[tensor.dtype.itemsize])


@needs_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int16], ids=str)
def test_both_paths_agree_on_every_pattern(dtype, portable):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    draw = torch.Generator().manual_seed(1)
    for base in (every.flip(0), every[torch.randperm(2**16, generator=draw)], every ^ 1, every):
        same_both_ways(portable, Lossless(), base.view(dtype), every.view(dtype))
        coded_alone(portable, base.view(dtype), every.view(dtype))
    same_both_ways(portable, Lossless(), None, every.view(dtype))


def coded_alone(portable, base: torch.Tensor | None, variant: torch.Tensor) -> None:
    """Code a block on both paths, whether it pays or not, with depths that give odd rows."""
    dtype = module.dtypes.NAMES[variant.dtype]
    words = module._words(variant)
    below = None if base is None else module._words(base)
    own = np.zeros(256, np.uint8)
    if below is not None:
        own = (np.arange(256) % 5).astype(np.uint8)
        exponents = coded_blocks.count_exponents(below, dtype)
        assert np.array_equal(exponents, portable(coded_blocks.count_exponents, below, dtype))
    counts = coded_blocks.count(words, below, dtype, own)
    assert np.array_equal(counts, portable(coded_blocks.count, words, below, dtype, own))
    coding = Coding(dtype, own, rans.table_for(counts))
    # The portable path takes a step for every row.
    for lanes in {-(-len(words) // 3001), 13 * (len(words) // 3001), 2050, len(words)}:
        block = coded_blocks.encode(words, below, coding, lanes, counts)
        other = portable(coded_blocks.encode, words, below, coding, lanes, counts)
        assert all(np.array_equal(a, b) for a, b in zip(block, other, strict=True))
        for decode in (coded_blocks.decode, lambda *a: portable(coded_blocks.decode, *a)):
            out = np.zeros_like(words)
            decode(block, below, coding, out)
            assert np.array_equal(out, words)


@needs_c
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_low_bits(dtype, portable):
    size = dtype.itemsize
    shifts = torch.arange(3001) % (8 * size)
    steps = (np.uint64(2**64 - 1) >> (63 - shifts.numpy().astype(np.uint64))) // np.uint64(2)
    base, _ = patterns(dtype, 3001, 0)
    moved = module._words(base) + steps.astype(symbols.WORDS[size])
    variant = torch.from_numpy(moved.view(np.uint8)).view(dtype)
    coded_alone(portable, base, variant)
    coded_alone(portable, None, variant)


@needs_c
def test_tensors_may_begin_at_any_byte(portable):
    base, variant = patterns(torch.float32, 3000, 20)
    raws = [np.empty(4 * 3000 + 1, np.uint8) for _ in range(2)]
    shifted = []
    for raw, tensor in zip(raws, (base, variant), strict=True):
        raw[1:] = tensor.view(torch.uint8).numpy()
        shifted.append(raw[1:].view(np.uint32))
    own = np.zeros(256, np.uint8)
    counts = coded_blocks.count(shifted[1], shifted[0], "F32", own)
    coding = Coding("F32", own, rans.table_for(counts))
    block = coded_blocks.encode(shifted[1], shifted[0], coding, 12, counts)
    out = np.zeros(3000, np.uint32)
    coded_blocks.decode(block, shifted[0], coding, out)
    assert np.array_equal(out, module._words(variant))


@needs_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_both_paths_refuse_the_same_streams(dtype, portable):
    """Cut short, lengthened, changed: the same words, or the same refusal with the same reason."""
    base, variant = patterns(dtype, 3000, 200)
    words, below = module._words(variant), module._words(base)
    own = (np.arange(256) % 3).astype(np.uint8)
    name = module.dtypes.NAMES[dtype]
    counts = coded_blocks.count(words, below, name, own)
    coding = Coding(name, own, rans.table_for(counts))
    whole = coded_blocks.encode(words, below, coding, 13, counts)
    rng = np.random.default_rng(0)
    refused = 0

    def outcome(decode, block):
        out = np.zeros_like(words)
        try:
            decode(block, below, coding, out)
        except ValueError as error:
            return str(error)
        return out.tobytes()

    for trial in range(150):
        parts = [part.copy() for part in whole]
        which = trial % 3
        unit = (4, 2, 1)[which]
        if trial % 2:
            at = int(rng.integers(len(parts[which])))
            parts[which][at] ^= 1 << int(rng.integers(8))
        elif trial % 4:
            parts[which] = parts[which][: int(rng.integers(len(parts[which]) // unit)) * unit]
        else:
            extra = rng.integers(0, 256, unit * int(rng.integers(1, 9)), dtype=np.uint8)
            parts[which] = np.concatenate([parts[which], extra])
        block = Block(*parts)
        found = outcome(coded_blocks.decode, block)
        expected = outcome(lambda *a: portable(coded_blocks.decode, *a), block)
        if len(block.states):
            assert found == expected
        assert isinstance(found, str) == isinstance(expected, str)
        refused += isinstance(found, str)
    assert refused > 100


@needs_c
def test_a_stranger_s_table_and_states_stay_in_bounds(portable):
    """Contexts that have no frequencies, and states that no coder leaves."""
    base, variant = patterns(torch.bfloat16, 5000, 30)
    words, below = module._words(variant), module._words(base)
    rng = np.random.default_rng(4)
    frequencies = np.zeros((256, 256), np.uint16)
    frequencies[::2, 255] = rans.TOTAL
    coding = Coding("BF16", np.arange(256, dtype=np.uint8), rans.Table(frequencies))
    for states in (np.zeros(40, np.uint8), np.full(40, 255, np.uint8), rng.bytes(20000)):
        raw = np.frombuffer(states, np.uint8) if isinstance(states, bytes) else states
        for many in (0, 2, 20000):
            block = Block(raw, np.frombuffer(rng.bytes(many), np.uint8), np.empty(0, np.uint8))
            for decode in (coded_blocks.decode, lambda *a: portable(coded_blocks.decode, *a)):
                with pytest.raises(ValueError, match=r"words|states"):
                    decode(block, below, coding, np.zeros_like(words))


@needs_c
def test_a_cut_stream_is_a_checksum_error():
    base, variant = patterns(torch.bfloat16, 4000, 200)
    encoded = Lossless(block=1500).encode(torch.empty(0), Context("w", base, variant))
    assert encoded.term.mode == "difference"
    for key in ("states", "words", "low"):
        cut = {**encoded.parts, key: encoded.parts[key][:-4]}
        with pytest.raises(DeltafoldError) as caught:
            encoded.term.restore(cut, (4000,), torch.bfloat16, Context("w", base))
        assert caught.value.code == "checksum"


@needs_c
def test_a_tensor_that_changes_while_it_is_coded_is_an_error():
    base, variant = patterns(torch.bfloat16, 3000, 200)
    words, below = module._words(variant), module._words(base)
    own = np.zeros(256, np.uint8)
    counts = coded_blocks.count(words, below, "BF16", own)
    coding = Coding("BF16", own, rans.table_for(counts))
    with pytest.raises(RuntimeError, match="changed while"):
        coded_blocks.encode(words[::-1].copy(), below, coding, 12, counts)
