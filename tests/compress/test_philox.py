"""The generator that the format fixes."""

from __future__ import annotations

import numpy as np
import pytest

from deltafold.compress.philox import choose, keep_mask, philox, stream_of, words_of

# Known answers of Philox4x32-10 from the Random123 library: counter, key, output.
KNOWN = [
    (
        [0, 0, 0, 0],
        [0, 0],
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
    ),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    low = np.array([counter[0] | counter[1] << 32], dtype=np.uint64)
    words = philox(low, counter[2] | counter[3] << 32, key[0] | key[1] << 32)
    assert words.dtype == np.uint32
    assert words.tolist() == [expected]


def test_elements_do_not_depend_on_each_other():
    many = philox(np.arange(100, dtype=np.uint64), 5, 6)
    assert np.array_equal(many[40:50], philox(np.arange(40, 50, dtype=np.uint64), 5, 6))


def test_the_stream_of_a_name():
    # sha256("model.norm.weight") begins with these eight bytes.
    assert stream_of("model.norm.weight") == int.from_bytes(
        bytes.fromhex("4e709958f651ec86"), "little"
    )


def test_the_mask_that_every_reader_makes():
    mask = keep_mask(64, drop=0.75, seed=42, name="model.layers.0.mlp.up_proj.weight")
    assert "".join("x" if kept else "." for kept in mask) == (
        "...........xx..x.......xx.x...x.xx.x.....x...x.....xxx......x..."
    )


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1000])
def test_a_shorter_mask_is_the_beginning_of_a_longer_one(count):
    long = keep_mask(1001, drop=0.5, seed=1, name="a")
    assert np.array_equal(keep_mask(count, drop=0.5, seed=1, name="a"), long[:count])


def test_masks_are_made_in_blocks(monkeypatch):
    whole = keep_mask(4 * (1 << 20) + 9, drop=0.9, seed=3, name="a")
    tail = philox(np.arange(1 << 20, (1 << 20) + 3, dtype=np.uint64), stream_of("a"), 3)
    assert np.array_equal(whole[-9:], tail.reshape(-1)[:9] >= round(0.9 * 2**32))


def test_names_and_seeds_give_other_masks():
    masks = [
        keep_mask(256, drop=0.5, seed=seed, name=name).tobytes()
        for seed in (0, 1)
        for name in ("a", "b")
    ]
    assert len(set(masks)) == 4


@pytest.mark.parametrize(("drop", "share"), [(0.0, 1.0), (0.1, 0.9), (0.5, 0.5), (0.99, 0.01)])
def test_the_share_that_is_kept(drop, share):
    count = 200_000
    kept = keep_mask(count, drop=drop, seed=0, name="w").mean()
    assert abs(kept - share) <= 4 * (share * (1 - share) / count) ** 0.5


def test_words_are_those_that_masks_compare():
    words = words_of(1001, seed=42, name="a.weight")
    mask = keep_mask(1001, drop=0.25, seed=42, name="a.weight")
    assert np.array_equal(mask, words >= 2**30)


def test_chosen_elements_have_the_largest_words_of_their_row():
    kept = np.array([0, 1, 5, 9, 10])
    chosen = choose(kept, 10, seed=3, name="a.weight")
    assert chosen.sum(axis=1).tolist() == kept.tolist()
    words = words_of(50, seed=3, name="a.weight").reshape(5, 10)
    for row, mask in zip(words[1:4], chosen[1:4], strict=True):
        assert row[mask].min() > row[~mask].max()


def test_of_equal_words_the_earlier_are_chosen(monkeypatch):
    monkeypatch.setattr(
        "deltafold.compress.philox.words_of", lambda n, **_: np.full(n, 7, dtype=np.uint32)
    )
    assert choose(np.array([2]), 5, seed=0, name="")[0].tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]
