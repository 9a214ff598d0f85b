"""Requests, outputs, and the protocol that every engine fulfils.

An engine hosts one base model and any number of variants. `submit` is thread-safe and refuses an
unknown or broken variant *before* the request is queued; chunks arrive on the engine's own thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]

#: `{"role": "user", "content": "..."}`, as in the OpenAI API.
Message: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, eq=False, slots=True)
class Embeddings:
    """Input embeddings that the caller has computed, float `[positions, hidden]`.

    They mean what transformers' `inputs_embeds` means for the model: what its input embedding would
    have given. Whose variant reads them decides nothing about them.
    """

    values: torch.Tensor


#: Text, token ids, chat messages (rendered with the variant's own chat template), input embeddings, or
#: token ids and input embeddings in turn. Models that read images or sounds also take a mapping:
#: `text`, `images` and `audio` for the variant's own processor, or the model's own inputs as tensors
#: for a batch of one.
Prompt: TypeAlias = (
    str
    | Sequence[int]
    | Sequence[Message]
    | Embeddings
    | Sequence[int | Embeddings]
    | Mapping[str, Any]
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Defaults are greedy.

    Attributes:
        max_tokens: most tokens to generate; None means up to the model's context length.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keep this many likeliest tokens; 0 keeps all.
        seed: makes a sampled request repeatable whatever shares its batch.
        stop: texts that end the output; they are not part of it.
        stop_token_ids: tokens that end the output besides the variant's own EOS.
        ignore_eos: go on until `max_tokens` (benchmarks).
        logprobs: None for none, else how many likeliest alternatives to report besides the
            chosen token (0 reports the chosen one alone). Values are of the raw model
            distribution, before temperature and truncation.
        echo: report the prompt's tokens and log-probabilities as well (`/v1/completions`).
        scale: multiplies the variant's delta: 1 is the fine-tune, 0 the base, in between
            interpolates, above extrapolates (EXPO, arXiv 2404.16792).
    """

    max_tokens: int | None = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    echo: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One generation.

    Attributes:
        variant: a served name; the base answers to "base" and its own name. Or a weighted mixture of
            variants: `{"sql": 0.7, "law": 0.3}`, which is the name `sql*0.7+law*0.3`.
        prompt: see `Prompt`.
        sampling: how tokens are chosen.
    """

    variant: str | Mapping[str, float]
    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability (natural log) and the likeliest alternatives."""

    token_id: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step added to one request. The last chunk carries `finish_reason`."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """A finished request."""

    variant: str
    digest: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Ticket:
    """An accepted request: what is known of it before the first token."""

    id: str
    variant: str
    digest: str
    prompt_ids: tuple[int, ...]
    #: Filled before the first chunk when `Sampling.echo` asked for log-probabilities.
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class VariantInfo:
    """A served model as `/v1/models` lists it. The base has `parent` None and digest = its own.

    Attributes:
        applied: "delta" where the variant's rows run on the shared model, "rebuilt" where it has a
            dense model of its own, "refused" where it would need one and may not. None for the base.
        obstacle: what keeps its delta from being applied: a tensor, or the keys of `config.json` that
            differ from the base's; empty otherwise.
        root: the delta's own name where `name` is an alias of it, else empty.
    """

    name: str
    digest: str
    parent: str | None
    codec: str = ""
    delta_bytes: int = 0
    variant_bytes: int = 0
    coverage: float = 1.0
    tier: Literal["disk", "host", "device"] = "disk"
    created: int = 0
    quality: Mapping[str, Any] = field(default_factory=dict)
    applied: Literal["delta", "rebuilt", "refused"] | None = None
    obstacle: str = ""
    root: str = ""


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the engine started, and gauges of this moment."""

    running: int
    waiting: int
    steps: int
    base_only_steps: int
    prompt_tokens: int
    generated_tokens: int
    batch_variants: int
    kv_tokens: int
    kv_capacity: int
    running_by_variant: Mapping[str, int]
    resident: Mapping[str, int]


OnChunk: TypeAlias = Callable[[Chunk], None]


class Served(Protocol):
    """What all engines have: one base model and its variants."""

    base_name: str

    def variants(self) -> list[VariantInfo]:
        """The base and every variant of the zoo, sorted by name, the base first."""
        ...

    def resolve(self, name: str) -> VariantInfo:
        """The variant behind a name; `variant-not-found` names near ones."""
        ...

    def encode(self, variant: str, prompt: Prompt) -> list[int]:
        """Token ids by the variant's own tokenizer and chat template."""
        ...

    def decode(self, variant: str, token_ids: Sequence[int]) -> str:
        """Text by the variant's own tokenizer."""
        ...

    def stats(self) -> Stats:
        """A snapshot for metrics."""
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens, prompt and output together, that a request may have."""
        ...

    def close(self) -> None:
        """Finish the running step, fail what is left with `cancelled`, free memory."""
        ...


class Engine(Served, Protocol):
    """An engine that generates."""

    def submit(self, request: Request, on_chunk: OnChunk) -> Ticket:
        """Accept a request; may block while a variant is read from disk.

        `on_chunk` is called from the engine's thread and must not block; it sees the last chunk
        exactly once, also after `cancel` or an error.

        Raises:
            DeltafoldError: `variant-not-found`, `context-length`, `bad-argument`, and every code
                that loading a delta can give.
        """
        ...

    def cancel(self, ticket_id: str) -> None:
        """Stop a request; unknown or finished ids are ignored."""
        ...

    def generate(self, requests: Sequence[Request]) -> Iterator[Output]:
        """Run requests together and yield outputs in the requests' order."""
        ...
