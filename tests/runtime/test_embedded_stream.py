"""Text that grows token by token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafold.runtime.embedded.stream import Detokenizer, StopStrings


def lossy(ids: Sequence[int]) -> str:
    """One byte a token; the decoder shows an incomplete character as one U+FFFD."""
    return bytes(ids).decode(errors="replace")


def fallback(ids: Sequence[int]) -> str:
    """One byte a token; the decoder shows each byte of an incomplete character as U+FFFD."""
    try:
        return bytes(ids).decode()
    except UnicodeDecodeError as error:
        good = bytes(ids[: error.start]).decode()
        return good + "\ufffd" * (error.end - error.start) + fallback(ids[error.end :])


def spaced(ids: Sequence[int]) -> str:
    """Words; the first one's leading space is dropped."""
    return "".join(f" w{i}" for i in ids)[1:]


def pieces(decode: object, ids: Sequence[int]) -> list[str]:
    made = Detokenizer(decode)  # type: ignore[arg-type]
    return [*(made.push(i) for i in ids), made.flush()]


@pytest.mark.parametrize("decode", [lossy, fallback])
@given(text=st.text(max_size=60))
def test_characters_come_whole(decode: object, text: str) -> None:
    out = pieces(decode, list(text.encode()))
    assert "".join(out) == text
    whole = "".join(out[:-1])
    assert text.startswith(whole)
    if "\ufffd" not in text:
        assert "\ufffd" not in whole
        assert whole == text


@given(st.binary(max_size=200))
def test_any_bytes_give_what_decoding_all_of_them_gives(data: bytes) -> None:
    assert "".join(pieces(lossy, list(data))) == lossy(data)


def test_rubbish_is_not_held_back_for_ever() -> None:
    made = Detokenizer(lossy)
    shown = "".join(made.push(0xFF) for _ in range(1000))
    assert len(shown) >= 997


def test_leading_spaces_survive() -> None:
    ids = list(range(100))
    assert "".join(pieces(spaced, ids)) == spaced(ids)


def test_work_per_token_is_bounded() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "x" * len(ids)

    assert "".join(pieces(decode, [0] * 5000)) == "x" * 5000
    assert longest < 50


def split(text: str, at: Sequence[int]) -> list[str]:
    edges = [0, *sorted(min(a, len(text)) for a in at), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def shown(stops: Sequence[str], parts: Sequence[str]) -> tuple[str, bool]:
    made, out = StopStrings(stops), ""
    for part in parts:
        text, stopped = made.push(part)
        out += text
        if stopped:
            return out, True
    return out + made.flush(), False


@given(
    text=st.text("ab", max_size=30),
    stop=st.text("ab", min_size=1, max_size=5),
    at=st.lists(st.integers(0, 30), max_size=8),
)
def test_a_stop_string_ends_the_text_wherever_it_is_cut(
    text: str, stop: str, at: list[int]
) -> None:
    before, found, _ = text.partition(stop)
    assert shown([stop], split(text, at)) == (before, bool(found))


def test_several_stop_strings() -> None:
    assert shown(["END", "\n\n"], ["one\n", "\ntwo END"]) == ("one", True)
    assert shown(["END", "\n\n"], ["E", "N", "\n", "x"]) == ("EN\nx", False)


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    made = StopStrings(["STOP"])
    assert made.push("go ST") == ("go ", False)
    assert made.push("A") == ("STA", False)
    assert made.push("S") == ("", False)
    assert made.push("STOP now") == ("S", True)


def test_without_stop_strings_text_passes() -> None:
    made = StopStrings(())
    assert made.push("abc") == ("abc", False)
    assert made.flush() == ""
