"""One accepted request on its way: its tokens so far, and what each new token turns into."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from deltafold.runtime.embedded.overlay import Overlay
from deltafold.runtime.embedded.runner import Runner
from deltafold.runtime.embedded.sampler import Choice, RawLogprob, generator
from deltafold.runtime.embedded.stream import Detokenizer, StopStrings
from deltafold.runtime.embedded.text import TextFront
from deltafold.runtime.engine import (
    Chunk,
    FinishReason,
    OnChunk,
    Sampling,
    Ticket,
    TokenLogprob,
)
from deltafold.runtime.host import Row, Variant


@dataclass(slots=True, eq=False)
class Job:
    """State of one request. Only the engine's thread touches it, `cancelled` excepted.

    Attributes:
        order: position in the order of arrival.
        limit: most tokens to generate.
        runner: of the variant's own dense model; None where it runs on the shared one.
        writing: for requests that are written in whole batches; see `batches`.
        overlay: input embeddings in place of some of the prompt's tokens.
        cached: tokens that key-value memory holds; the rest must still be run.
    """

    ticket: Ticket
    sampling: Sampling
    variant: Variant | None
    front: TextFront
    on_chunk: OnChunk
    order: int
    limit: int
    runner: Runner | None = None
    writing: Any | None = None
    overlay: Overlay | None = None
    cancelled: bool = False
    ended: bool = False
    counted: bool = False
    cached: int = 0
    tokens: list[int] = field(init=False)
    random: Random = field(init=False)
    _detokenizer: Detokenizer = field(init=False)
    _stops: StopStrings = field(init=False)
    _end_tokens: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.ticket.prompt_ids)
        self.random = generator(self.sampling.seed)
        self._detokenizer = Detokenizer(self.front.decoder)
        self._stops = StopStrings(self.sampling.stop)
        eos = frozenset() if self.sampling.ignore_eos else self.front.eos
        self._end_tokens = eos | frozenset(self.sampling.stop_token_ids)

    @property
    def row(self) -> Row:
        """What the batch row of this request runs."""
        return Row(self.variant, self.sampling.scale)

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.ticket.prompt_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt's log-probabilities are asked for and not all there yet."""
        asked = self.sampling.echo and self.sampling.logprobs is not None
        return asked and len(self.ticket.prompt_logprobs) < len(self.ticket.prompt_ids)

    def accept(self, choice: Choice) -> Chunk:
        """Take the next token; the chunk has a finish reason if it is the last."""
        self.tokens.append(choice.token)
        if choice.token in self._end_tokens:
            # An end token is no part of the text, but what was held back before it is.
            text, _ = self._stops.push(self._detokenizer.flush())
            return self._chunk(choice, text + self._stops.flush(), "stop")
        text, stopped = self._stops.push(self._detokenizer.push(choice.token))
        if stopped:
            return self._chunk(choice, text, "stop")
        if self.generated >= self.limit:
            rest, stopped = self._stops.push(self._detokenizer.flush())
            rest += self._stops.flush()
            return self._chunk(choice, text + rest, "stop" if stopped else "length")
        return self._chunk(choice, text, None)

    def add_prompt_logprobs(self, found: list[tuple[RawLogprob, tuple[RawLogprob, ...]]]) -> None:
        """Append log-probabilities of the prompt's next tokens; its first token has none."""
        into = self.ticket.prompt_logprobs
        if not into:
            into.append(None)
        into.extend(self._logprob(own, top) for own, top in found)

    def _chunk(self, choice: Choice, text: str, reason: FinishReason | None) -> Chunk:
        logprobs: tuple[TokenLogprob, ...] = ()
        if choice.logprob is not None:
            logprobs = (self._logprob(RawLogprob(choice.token, choice.logprob), choice.top),)
        return Chunk(text, (choice.token,), logprobs, reason)

    def _logprob(self, own: RawLogprob, top: tuple[RawLogprob, ...]) -> TokenLogprob:
        rivals = tuple(TokenLogprob(t, self.front.piece(t), v) for t, v in top)
        return TokenLogprob(own.token, self.front.piece(own.token), own.logprob, rivals)
