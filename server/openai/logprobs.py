"""Log-probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from deltafold.runtime.engine import TokenLogprob
from deltafold.server.openai.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprobs,
    TopLogprob,
)

#: JSON has no infinity: the API's own word for "practically impossible".
FLOOR: Final = -9999.0


def finite(logprob: float) -> float:
    """A number that JSON can write; NaN counts as impossible too."""
    return logprob if logprob > FLOOR else FLOOR


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """The shape of `/v1/chat/completions`."""
    return {"content": [_token(token) for token in tokens], "refusal": None}


def _token(token: TokenLogprob) -> TokenLogprobs:
    return {**_top(token), "top_logprobs": [_top(other) for other in token.top]}


def _top(token: TokenLogprob) -> TopLogprob:
    # A replacement character stands for bytes that the text no longer knows.
    known = "\ufffd" not in token.text
    return {
        "token": token.text,
        "logprob": finite(token.logprob),
        "bytes": list(token.text.encode("utf-8", "replace")) if known else None,
    }


def completion_logprobs(
    tokens: Sequence[TokenLogprob | None], offset: int, *, first_text: str = ""
) -> CompletionLogprobs:
    """The shape of `/v1/completions`.

    Args:
        tokens: None for the first token of an echoed prompt, which nothing predicts.
        offset: where the first token begins in the choice's text.
        first_text: the text of a token that is None.
    """
    out: CompletionLogprobs = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for token in tokens:
        text = first_text if token is None else token.text
        out["tokens"].append(text)
        out["token_logprobs"].append(None if token is None else finite(token.logprob))
        out["top_logprobs"].append(None if token is None else _alternatives(token))
        out["text_offset"].append(offset)
        offset += len(text)
    return out


def _alternatives(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, and the chosen one though it be unlikely.

    Two tokens can have one text (pieces of characters): the likelier keeps the place.
    """
    texts: dict[str, float] = {}
    for other in (*token.top, token):
        texts[other.text] = max(finite(other.logprob), texts.get(other.text, FLOOR))
    return texts
