"""Refusing requests that cannot be served, before they are queued."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.engine import Sampling, VariantInfo


def check_sampling(sampling: Sampling) -> None:
    """Raises `bad-argument` that names the first field with a value that makes no sense."""
    s = sampling
    _need(s.max_tokens is None or _whole(s.max_tokens, 0), "max_tokens", "0 or more", s.max_tokens)
    _need(_real(s.temperature) and s.temperature >= 0, "temperature", "0 or more", s.temperature)
    _need(_real(s.top_p) and 0 < s.top_p <= 1, "top_p", "above 0 and at most 1", s.top_p)
    _need(_whole(s.top_k, 0), "top_k", "a whole number, 0 for all", s.top_k)
    _need(s.seed is None or _whole(s.seed), "seed", "a whole number", s.seed)
    _need(_texts(s.stop), "stop", "a tuple of texts, none empty", s.stop)
    _need(all(_whole(x) for x in s.stop_token_ids), "stop_token_ids", "ids", s.stop_token_ids)
    _need(s.logprobs is None or _whole(s.logprobs, 0), "logprobs", "0 or more", s.logprobs)
    _need(_real(s.scale), "scale", "a finite number", s.scale)


def check_scale(sampling: Sampling, info: VariantInfo) -> None:
    """Raises `bad-argument` for a scale other than 1 of a variant that was rebuilt."""
    if sampling.scale != 1:
        raise DeltafoldError(
            "bad-argument",
            f"{info.name} is served by a model of its own, at scale 1 alone.",
            facts=[("scale", sampling.scale), ("rebuilt because of", info.obstacle)],
            fix="leave the scale out, or name the base for scale 0",
        )


def check_whole(sampling: Sampling) -> None:
    """Raises `bad-argument` for what requests that are written in whole batches cannot have."""
    if sampling.echo:
        raise DeltafoldError(
            "bad-argument",
            "echo is for models that read and write one text; this one's prompt is not its output.",
            fix="leave echo out",
        )


def check_overlay(embedded: bool, sampling: Sampling) -> None:
    """Raises `bad-argument` where tokens are asked of a prompt that has embeddings instead."""
    if embedded and sampling.echo:
        raise DeltafoldError(
            "bad-argument",
            "a prompt with input embeddings has no tokens to echo.",
            facts=[("field", "echo")],
        )


def check_prompt(token_ids: Sequence[int], vocabulary: int) -> None:
    """Raises `bad-argument` for ids that the embedding has no row for."""
    wrong = [t for t in token_ids if not 0 <= t < vocabulary]
    if wrong:
        raise DeltafoldError(
            "bad-argument",
            "the prompt holds token ids that the model does not know.",
            facts=[("first", wrong[0]), ("known", f"0 to {vocabulary - 1}")],
        )


def output_limit(prompt_tokens: int, max_tokens: int | None, room: int) -> int:
    """Most tokens that a request may generate.

    Args:
        prompt_tokens: length of the prompt.
        max_tokens: what the request asks; None for all that is left.
        room: most tokens of prompt and output together.

    Raises:
        DeltafoldError: `context-length` if that does not fit.
    """
    wanted = 1 if max_tokens is None else max_tokens
    if prompt_tokens + wanted > room:
        raise DeltafoldError(
            "context-length",
            "the prompt and the tokens asked for do not fit into the context.",
            facts=[
                ("prompt tokens", prompt_tokens),
                ("max_tokens", "at least 1" if max_tokens is None else max_tokens),
                ("context", room),
            ],
            fix=f"shorten the prompt, or ask for at most {max(0, room - prompt_tokens)} tokens",
        )
    return room - prompt_tokens if max_tokens is None else max_tokens


def _need(ok: bool, field: str, expected: str, found: Any) -> None:
    if not ok:
        raise DeltafoldError(
            "bad-argument",
            f"{field} must be {expected}.",
            facts=[("field", field), ("found", repr(found))],
        )


def _texts(value: Any) -> bool:
    # A single text is a sequence of texts too, and stopping at each of its letters is a trap.
    return not isinstance(value, str) and all(isinstance(x, str) and x for x in value)


def _whole(value: Any, least: float = -math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
