"""The demo: pack, serve, ask everybody at once, and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltafold.server.demo.ask import Question, Round, ask_all
from deltafold.server.demo.tasks import BASE_TASK, VARIANT_TASKS, apply, held_out_words
from deltafold.server.demo.zoo import CODECS, Codec, variant_name

#: Requests in flight: the engine's batch holds as many.
AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Cell:
    """One variant in one codec.

    Attributes:
        size: bytes over the full copy's.
        match: share of held-out words answered as the task wants.
        agreement: share of answers equal to the fine-tune's own.
    """

    size: float
    match: float
    agreement: float


@dataclass(frozen=True)
class Result:
    """What the demo measured.

    Attributes:
        samples: a few words, and what each served fine-tune answered.
        cells: by task and codec label.
        base_match: how often the base answers a variant's task right: a wrong variant shows.
        mixed: tokens a second while all variants share the batches.
        base_only: the same number of requests for the base alone.
        variants: served variants.
        words: held-out words a variant.
        full_bytes: size of one full copy.
    """

    samples: list[dict[str, str]]
    cells: dict[str, dict[str, Cell]]
    base_match: dict[str, float]
    mixed: float
    base_only: float
    variants: int
    words: int
    full_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)


def measure(
    url: str,
    sizes: dict[str, dict[str, float]],
    full_bytes: int,
    words: int,
    progress: Callable[[str], None],
) -> Result:
    """Ask every variant about held-out words, in mixed batches, and the base as well."""
    asked = held_out_words(words)
    names = [(task, codec) for codec in CODECS for task in VARIANT_TASKS]
    # Word by word over all variants, so that every batch mixes as many as it has rows.
    questions = [Question(variant_name(t, c), w) for w in asked for t, c in names]
    progress(f"{len(questions)} requests for {len(names)} variants, {AT_ONCE} at once ...")
    _warm_up(url, names)
    mixed = ask_all(url, questions, AT_ONCE)
    alone = ask_all(url, [Question("base", q.word) for q in questions], AT_ONCE)
    answers = _by_variant(questions, mixed)
    base_answers = dict(zip([q.word for q in questions], alone.answers, strict=True))
    return Result(
        samples=_samples(asked[:3], answers, base_answers),
        cells={
            t: {c.label: _cell(t, c, asked, answers, sizes) for c in CODECS} for t in VARIANT_TASKS
        },
        base_match={
            t: _share(base_answers[w] == apply(t, w) for w in asked)
            for t in (BASE_TASK, *VARIANT_TASKS)
        },
        mixed=mixed.rate,
        base_only=alone.rate,
        variants=len(names),
        words=words,
        full_bytes=full_bytes,
    )


def shipped_bytes(shipped: Path) -> int:
    """Bytes of one full copy of the demo's model."""
    return (shipped / "base" / "model.safetensors").stat().st_size


def _warm_up(url: str, names: list[tuple[str, Codec]]) -> None:
    """Every variant is read from disk once before the clock starts."""
    ask_all(url, [Question(variant_name(t, c), "warm") for t, c in names], AT_ONCE)


def _by_variant(questions: list[Question], answered: Round) -> dict[tuple[str, str], str]:
    pairs = zip(questions, answered.answers, strict=True)
    return {(q.model, q.word): answer for q, answer in pairs}


def _samples(
    words: list[str], answers: dict[tuple[str, str], str], base: dict[str, str]
) -> list[dict[str, str]]:
    served = CODECS[1]
    return [
        {"prompt": w, "base": base[w]}
        | {task: answers[variant_name(task, served), w] for task in VARIANT_TASKS}
        for w in words
    ]


def _cell(
    task: str,
    codec: Codec,
    words: list[str],
    answers: dict[tuple[str, str], str],
    sizes: dict[str, dict[str, float]],
) -> Cell:
    own = [answers[variant_name(task, codec), w] for w in words]
    true = [answers[variant_name(task, CODECS[0]), w] for w in words]
    return Cell(
        size=sizes[task][codec.label],
        match=_share(a == apply(task, w) for a, w in zip(own, words, strict=True)),
        agreement=_share(a == b for a, b in zip(own, true, strict=True)),
    )


def _share(hits: Iterable[bool]) -> float:
    values = list(hits)
    return sum(values) / len(values)
