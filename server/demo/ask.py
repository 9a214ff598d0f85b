"""Asking every variant through the HTTP API with the official client, all at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from openai import AsyncOpenAI

#: A word and its separator never need more.
_MOST_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Question:
    """A word for one served model."""

    model: str
    word: str


@dataclass(frozen=True, slots=True)
class Round:
    """The answers in the questions' order, tokens generated, and wall-clock seconds."""

    answers: list[str]
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second over the whole round."""
        return self.tokens / self.seconds


def ask_all(url: str, questions: Sequence[Question], at_once: int) -> Round:
    """Send every question, at most `at_once` in flight."""
    return asyncio.run(_ask_all(url, questions, at_once))


async def _ask_all(url: str, questions: Sequence[Question], at_once: int) -> Round:
    gate = asyncio.Semaphore(at_once)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:

        async def one(question: Question) -> tuple[str, int]:
            async with gate:
                reply = await client.chat.completions.create(
                    model=question.model,
                    messages=[{"role": "user", "content": question.word}],
                    temperature=0,
                    max_tokens=_MOST_TOKENS,
                )
            usage = reply.usage
            return reply.choices[0].message.content or "", usage.completion_tokens if usage else 0

        start = time.perf_counter()
        replies = await asyncio.gather(*(one(q) for q in questions))
        seconds = time.perf_counter() - start
    return Round([text for text, _ in replies], sum(n for _, n in replies), seconds)
