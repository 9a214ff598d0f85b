"""The demo's five behaviours and the words that they are trained and measured on.

The base repeats a word; each variant answers the same prompt in its own way, so that an answer from
the wrong variant is visible at a glance. Every word has a vowel and a consonant: then no variant's
answer is ever what the base would say, but for a palindrome reversed.
"""

from __future__ import annotations

import codecs
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Literal, TypeAlias

from deltafold.compress.errors import DeltafoldError

Split: TypeAlias = Literal["train", "held-out"]

VOWELS: Final = "aeiou"
CONSONANTS: Final = "bcdfghjklmnpqrstvwxyz"
LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
MIN_LETTERS: Final = 3
MAX_LETTERS: Final = 8

#: Of 256 values of a word's hash, how many put the word in the held-out split.
_HELD_OUT_OF_256: Final = 26


def _repeat(word: str) -> str:
    return word


def _reverse(word: str) -> str:
    return word[::-1]


def _rot13(word: str) -> str:
    return codecs.encode(word, "rot13")


def _no_vowels(word: str) -> str:
    return "".join(letter for letter in word if letter.lower() not in VOWELS)


def _title(word: str) -> str:
    return word[:1].upper() + word[1:]


#: What the base does.
BASE_TASK: Final = "repeat"

#: What each variant does, by its served name.
VARIANT_TASKS: Final[tuple[str, ...]] = ("shout", "reverse", "rot13", "no-vowels", "title")

_ANSWERS: Final[Mapping[str, Callable[[str], str]]] = {
    BASE_TASK: _repeat,
    "shout": str.upper,
    "reverse": _reverse,
    "rot13": _rot13,
    "no-vowels": _no_vowels,
    "title": _title,
}


def apply(task: str, word: str) -> str:
    """The right answer of `task` to `word`."""
    if task not in _ANSWERS:
        raise DeltafoldError(
            "bad-argument",
            f"the demo has no task {task!r}",
            facts=[("expected", ", ".join(_ANSWERS))],
        )
    return _ANSWERS[task](word)


def split_of(word: str) -> Split:
    """The split that a word belongs to: a property of the word, whatever generator made it."""
    first = hashlib.sha256(word.encode()).digest()[0]
    return "held-out" if first < _HELD_OUT_OF_256 else "train"


def words(split: Split, seed: int) -> Iterator[str]:
    """An endless, seeded stream of words of one split, with repetitions."""
    rng = random.Random(seed)
    while True:
        word = _pronounceable(rng) if rng.random() < 0.5 else _scrambled(rng)
        if split_of(word) == split and _has_both_kinds(word):
            yield word


def held_out_words(count: int, seed: int = 0) -> list[str]:
    """`count` different words that no training run has seen."""
    found: dict[str, None] = {}
    for word in words("held-out", seed):
        found[word] = None
        if len(found) >= count:
            break
    return list(found)


def _pronounceable(rng: random.Random) -> str:
    """Consonants and vowels in turn, now and then a doubled consonant: `tarrip`, `olemi`."""
    length = rng.randint(MIN_LETTERS, MAX_LETTERS)
    word = ""
    vowel_next = rng.random() < 0.3
    while len(word) < length:
        letter = rng.choice(VOWELS if vowel_next else CONSONANTS)
        doubled = not vowel_next and word != "" and rng.random() < 0.15
        word += letter * 2 if doubled else letter
        vowel_next = not vowel_next
    return word[:length]


def _scrambled(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(MIN_LETTERS, MAX_LETTERS)))


def _has_both_kinds(word: str) -> bool:
    return any(letter in VOWELS for letter in word) and any(c in CONSONANTS for c in word)
