"""Text that grows token by token: decoding without half characters, and stop strings.

A token may hold a part of a character, and a stop string may be spread over several tokens. So both
stages here hold text back for as long as it may still change or turn out to be the start of a stop
string, and hand out the rest at once. Work per token does not depend on how long the text is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

Decode: TypeAlias = Callable[[Sequence[int]], str]

_BROKEN: Final = "\ufffd"
#: The longest character takes four bytes; up to three of them may have come so far, and a decoder
#: may show each as a replacement character.
_MOST_HELD: Final = 3
#: Tokens are decoded with some of their predecessors, since spaces and accents depend on them.
_CONTEXT: Final = 8
_WINDOW: Final = 32


class Detokenizer:
    """Turns tokens into pieces of text whose concatenation is the text of all of them."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were handed out

    def push(self, token: int) -> str:
        """The text that is settled now; empty while a character is incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        settled = len(text) - _held(text)
        piece = text[self._sent : settled]
        self._sent = max(self._sent, settled)
        if len(self._window) >= _WINDOW:
            self._move_on(held=len(text) - self._sent)
        return piece

    def flush(self) -> str:
        """What was held back, at the end of the tokens; incomplete characters show as U+FFFD."""
        text = self._decode(self._window)
        piece = text[self._sent :]
        self._sent = len(text)
        return piece

    def _move_on(self, held: int) -> None:
        """Shorten the window: its last tokens end in the same text, whatever came before."""
        self._window = self._window[-_CONTEXT:]
        self._sent = max(0, len(self._decode(self._window)) - held)


def _held(text: str) -> int:
    """Characters at the end that may still become another character."""
    count = 0
    while count < min(_MOST_HELD, len(text)) and text[-1 - count] == _BROKEN:
        count += 1
    return count


class StopStrings:
    """Finds the first of some texts in a stream and hides it, with all that follows."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty; without any, text passes straight through."""
        self._stops = tuple(stops)
        self._longest = max((len(s) for s in stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string has come."""
        if not self._stops or not text:
            return text, False
        text = self._held + text
        found = [at for at in (text.find(s) for s in self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = self._unsure(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when the stream ends without a stop string."""
        text, self._held = self._held, ""
        return text

    def _unsure(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stops):
                return length
        return 0
