"""The main promise: a mixed batch answers as separately restored dense models do.

Everything through the engine, in float32: base and six variants of six codecs share the batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo_models

from deltafold.runtime import Chunk, EmbeddedEngine, Output, Request, Sampling

PROMPTS = {"short": "hi", "long": "the quick brown fox jumps over it 12345 times, and again"}
NEW = 16


@pytest.fixture(scope="module", params=list(zoo_models.FAMILIES))
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> zoo_models.Models:
    return zoo_models.make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def engine(made: zoo_models.Models) -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine.open(made.base, zoo=made.zoo, device="cpu", prefill_chunk=16) as opened:
        yield opened


def dense_answer(model: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens of one prompt alone, and their log-probabilities."""
    tokens, logprobs = list(ids), []
    with torch.inference_mode():
        for _ in range(NEW):
            last = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            token = int(last.argmax())
            logprobs.append(float(last[token]))
            tokens.append(token)
    return tokens[len(ids) :], logprobs


def test_mixed_batch_equals_restored_dense_models(
    made: zoo_models.Models, engine: EmbeddedEngine
) -> None:
    names = ["base", *made.variants]
    sampling = Sampling(max_tokens=NEW, logprobs=0, ignore_eos=True)
    requests = [Request(n, p, sampling) for p in PROMPTS.values() for n in names]
    outputs = list(engine.generate(requests))
    answers: dict[str, set[tuple[int, ...]]] = {p: set() for p in PROMPTS.values()}
    for request, out in zip(requests, outputs, strict=True):
        assert isinstance(request.prompt, str)
        ids = engine.encode(request.variant, request.prompt)
        tokens, logprobs = dense_answer(made.plain(request.variant), ids)
        assert list(out.token_ids) == tokens, request.variant
        worst = max(abs(a.logprob - b) for a, b in zip(out.logprobs, logprobs, strict=True))
        assert worst < 1e-4, request.variant
        answers[request.prompt].add(out.token_ids)
    # The variants really differ, or the comparison would prove little.
    assert all(len(seen) > len(names) // 2 for seen in answers.values())


def test_the_batches_were_mixed(made: zoo_models.Models, engine: EmbeddedEngine) -> None:
    before = engine.stats()
    names = ["base", *made.variants]
    sampling = Sampling(max_tokens=NEW, ignore_eos=True)
    list(engine.generate([Request(n, "abc", sampling) for n in names]))
    steps = engine.stats().steps - before.steps
    # Apart, the requests would take NEW steps each.
    assert steps < 3 * NEW
    assert engine.stats().base_only_steps == before.base_only_steps


def _logprobs(outputs: list[Output]) -> list[list[float]]:
    return [[t.logprob for t in out.logprobs] for out in outputs]


def test_base_rows_are_bit_identical_whatever_shares_their_batch(engine: EmbeddedEngine) -> None:
    """The same rows in the same places, once with the others' deltas at 0 and once at full scale."""
    seen = []
    for scale in (0.0, 1.0):
        own = Sampling(max_tokens=NEW, logprobs=0, ignore_eos=True)
        others = Sampling(max_tokens=NEW, logprobs=0, ignore_eos=True, scale=scale)
        requests = [Request("base", p, own) for p in ("abcdef", "uvwxyz")]
        requests += [Request(n, "ghijkl", others) for n in ("sign1", "sign3", "dare", "int4")]
        before = engine.stats().base_only_steps
        outputs = list(engine.generate(requests))
        assert engine.stats().base_only_steps == before
        seen.append((_logprobs(outputs), [o.token_ids for o in outputs]))
    plain, mixed = seen
    assert plain[0][:2] == mixed[0][:2]
    assert plain[1][:2] == mixed[1][:2]
    assert plain[0][2:] != mixed[0][2:]


def test_a_scaled_delta_and_a_plain_one_share_a_batch(engine: EmbeddedEngine) -> None:
    plain = Sampling(max_tokens=4, logprobs=0, ignore_eos=True)
    off = Sampling(max_tokens=4, logprobs=0, ignore_eos=True, scale=0.0)
    base, scaled, full = engine.generate(
        [
            Request("base", "abc", plain),
            Request("sign1", "abc", off),
            Request("sign1", "abc", plain),
        ]
    )
    assert base.token_ids == scaled.token_ids
    assert _logprobs([base]) == _logprobs([scaled])
    assert _logprobs([full]) != _logprobs([base])


def test_digest_and_stream(made: zoo_models.Models, engine: EmbeddedEngine) -> None:
    chunks: list[Chunk] = []
    import threading

    done = threading.Event()

    def on_chunk(chunk: Chunk) -> None:
        chunks.append(chunk)
        if chunk.finish_reason:
            done.set()

    ticket = engine.submit(
        Request("rank8", "abc", Sampling(max_tokens=5, ignore_eos=True)), on_chunk
    )
    assert done.wait(30)
    assert ticket.digest == engine.resolve("rank8").digest
    assert sum(len(c.token_ids) for c in chunks) == 5
    assert [c.finish_reason for c in chunks][-1] == "length"
    assert engine.stats().resident["rank8"] > 0
