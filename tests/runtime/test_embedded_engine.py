"""Outputs of the embedded engine against the plain model, one request at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers

from deltafold.runtime.embedded import EmbeddedEngine
from deltafold.runtime.engine import Chunk, Output, Request, Sampling
from deltafold.runtime.host import Row

LENGTHS = [3, 40, 17, 1, 25, 90, 8]
NAMES = ["base", "a", "b", "a", "base", "b", "a"]


def greedy(names: list[str], prompts: list[list[int]], new: int, **more: Any) -> list[Request]:
    return [
        Request(n, p, Sampling(max_tokens=new, **more)) for n, p in zip(names, prompts, strict=True)
    ]


def expected(host: pico.PicoHost, requests: list[Request]) -> list[list[int]]:
    return [
        pico.plain_greedy(
            host.model,
            host,
            r.prompt,  # type: ignore[arg-type]
            r.sampling.max_tokens or 0,
            Row(host.variant(r.variant), r.sampling.scale),
        )
        for r in requests
    ]


def ids(outputs: list[Output]) -> list[list[int]]:
    return [list(o.token_ids) for o in outputs]


def together(engine: EmbeddedEngine, requests: list[Request]) -> list[Output]:
    return list(engine.generate(requests))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", list(pico.FAMILIES))
def test_a_mixed_crowd_gets_what_each_gets_alone(
    family: str, attention: str, tmp_path: Path
) -> None:
    model = pico.model(family, attention=attention, **pico.FAMILIES[family])
    host = pico.PicoHost(model, tmp_path, ["a", "b"])
    requests = greedy(NAMES, pico.prompts(LENGTHS), 14)
    with EmbeddedEngine(model, host, max_batch=5, prefill_chunk=64) as engine:
        outputs = together(engine, requests)
    assert ids(outputs) == expected(host, requests)
    assert {o.finish_reason for o in outputs} == {"length"}
    assert [o.prompt_tokens for o in outputs] == LENGTHS
    assert not +host.held
    assert any(len({r.variant for r in rows}) == 3 for rows in host.batches), "truly mixed"


@pytest.mark.parametrize("family", ["Lfm2", "Qwen3_5Text"])
def test_models_with_recurrent_layers(family: str, tmp_path: Path) -> None:
    if not hasattr(transformers.cache_utils, "LinearAttentionLayer"):
        pytest.skip("this release of transformers has no cache for recurrent layers")
    kinds = {"Lfm2": "conv", "Qwen3_5Text": "linear_attention"}
    changes: dict[str, Any] = {"layer_types": [kinds[family], "full_attention"]}
    if family == "Qwen3_5Text":
        changes |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
        changes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    model = pico.model(family, **changes)
    host = pico.PicoHost(model, tmp_path)
    requests = greedy(["base"] * 7, pico.prompts(LENGTHS), 9)
    with EmbeddedEngine(model, host, max_batch=3, prefill_chunk=16) as engine:
        assert ids(together(engine, requests)) == expected(host, requests)


@pytest.mark.parametrize("chunk", [1, 7, 33, 1000])
def test_reading_prompts_in_pieces_changes_nothing(
    chunk: int, host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    requests = greedy(NAMES, pico.prompts(LENGTHS), 6)
    assert ids(together(start(prefill_chunk=chunk), requests)) == expected(host, requests)


def test_requests_join_and_leave_in_mid_flight(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    """Each request is submitted when its predecessor has made some tokens."""
    engine = start(max_batch=3)
    prompts = pico.prompts([5, 60, 2, 30, 9])
    requests = [
        Request(n, p, Sampling(max_tokens=k))
        for n, p, k in zip("abaab", prompts, [40, 3, 25, 9, 14], strict=True)
    ]
    made: list[list[int]] = [[] for _ in requests]
    done = threading.Event()
    submitted = 0
    finished = 0

    def submit_next() -> None:
        nonlocal submitted
        number, submitted = submitted, submitted + 1
        helper = threading.Thread(target=engine.submit, args=(requests[number], watch(number)))
        helper.start()

    def watch(number: int) -> Callable[[Chunk], None]:
        def on_chunk(chunk: Chunk) -> None:
            nonlocal finished
            made[number] += chunk.token_ids
            if len(made[number]) == 2 and submitted < len(requests):
                submit_next()
            if chunk.finish_reason:
                finished += 1
                if finished == len(requests):
                    done.set()

        return on_chunk

    submit_next()
    assert done.wait(30)
    assert made == expected(host, requests)


def test_rows_that_outgrow_the_memory_start_over(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    engine = start(max_batch=6, max_batch_tokens=400)
    requests = greedy(["a", "base", "b", "a", "a"], pico.prompts([20, 30, 10, 25, 5]), 90)
    outputs = together(engine, requests)
    assert ids(outputs) == expected(host, requests)
    stats = engine.stats()
    assert stats.prompt_tokens == 90, "read again, counted once"
    assert stats.generated_tokens == 450
    assert stats.kv_capacity == engine.max_model_len == 400
    rows = max(len(rows) for rows in host.batches)
    assert 1 < rows < 5


def test_scale_reaches_the_rows(host: pico.PicoHost, start: Callable[..., EmbeddedEngine]) -> None:
    prompt = pico.prompts([6])[0]
    requests = [
        Request("a", prompt, Sampling(max_tokens=8, scale=scale)) for scale in (0.0, 0.5, 1.0, 2.0)
    ]
    outputs = together(start(), requests)
    assert ids(outputs) == expected(host, requests)
    assert outputs[0].token_ids != outputs[2].token_ids


def forced(host: pico.PicoHost, row: Row, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of every position of one plain forward pass."""
    with torch.inference_mode(), host.batch([row]):
        logits = host.model(input_ids=torch.tensor([tokens])).logits
    return logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", ["base", "a"])
def test_logprobs_equal_a_plain_forward_pass(
    name: str, host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    requests = greedy([name, "b", name], pico.prompts([12, 40, 3]), 10, logprobs=4)
    outputs = together(start(prefill_chunk=16), requests)
    for request, output in list(zip(requests, outputs, strict=True))[::2]:
        prompt = list(request.prompt)  # type: ignore[arg-type]
        table = forced(host, Row(host.variant(name)), [*prompt, *output.token_ids])
        assert len(output.logprobs) == 10
        for i, found in enumerate(output.logprobs):
            row = table[len(prompt) - 1 + i]
            assert found.token_id == output.token_ids[i]
            assert found.logprob == pytest.approx(row[found.token_id].item(), abs=1e-4)
            values, tokens = row.topk(4)
            assert [t.token_id for t in found.top] == tokens.tolist()
            assert [t.logprob for t in found.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("chunk", [4, 256])
@pytest.mark.parametrize("new", [0, 3])
def test_echo_reports_the_prompts_logprobs(
    chunk: int, new: int, host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    prompts = pico.prompts([11, 1, 30])
    requests = greedy(["a", "base", "b"], prompts, new, logprobs=2, echo=True)
    outputs = together(start(prefill_chunk=chunk), requests)
    assert ids(outputs) == expected(host, requests)
    for request, output, prompt in zip(requests, outputs, prompts, strict=True):
        table = forced(host, Row(host.variant(request.variant)), prompt)
        assert len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        for i, found in enumerate(output.prompt_logprobs[1:]):
            assert found is not None
            assert found.token_id == prompt[i + 1]
            assert found.logprob == pytest.approx(table[i, prompt[i + 1]].item(), abs=1e-4)
            assert [t.token_id for t in found.top] == table[i].topk(2).indices.tolist()


def test_echo_without_logprobs_costs_nothing(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    output = together(start(), greedy(["a"], pico.prompts([9]), 2, echo=True))[0]
    assert output.prompt_logprobs == ()


def test_a_seed_repeats_alone_and_in_a_crowd(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    prompts = pico.prompts([7, 30, 4, 12])
    sampling = Sampling(max_tokens=15, temperature=1.0, top_p=0.9, seed=11)
    mine = Request("a", prompts[0], sampling)
    alone = together(start(), [mine])[0].token_ids
    crowd = [
        Request(n, p, Sampling(max_tokens=20, temperature=1.0))
        for n, p in zip(["b", "base", "a"], prompts[1:], strict=True)
    ]
    for at in range(4):
        outputs = together(start(), [*crowd[:at], mine, *crowd[at:]])
        assert outputs[at].token_ids == alone
    other = Request("a", prompts[0], Sampling(max_tokens=15, temperature=1.0, seed=12))
    assert together(start(), [other])[0].token_ids != alone


def test_base_rows_are_bit_identical_to_the_plain_model(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    """Same shapes, same bits: the logits behind the log-probabilities, prompt and decoding."""
    prompts = pico.prompts([20, 20, 20])
    engine, watches = start(), [pico.Watch() for _ in prompts]
    with pico.hold(engine):
        for request, watch in zip(
            greedy(["base"] * 3, prompts, 5, logprobs=0), watches, strict=True
        ):
            engine.submit(request, watch)
    for watch in watches:
        watch.wait()
    engine.close()
    # The same weights at another address may already round differently, so no second model.
    tokens, cache = torch.tensor(prompts), None
    for i in range(5):
        with torch.inference_mode():
            out = host.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, rows = out.past_key_values, out.logits[:, -1].log_softmax(-1)
        tokens = rows.argmax(-1, keepdim=True)
        for row, watch in zip(rows, watches, strict=True):
            assert watch.chunks[i].logprobs[0].logprob == row.max().item()


def test_a_smaller_vocabulary_hides_the_rest(tmp_path: Path) -> None:
    """A variant whose folder states fewer tokens than the batch's logits have never gets them."""
    model = pico.llama()
    host = pico.PicoHost(model, tmp_path, ["small"])
    pico.config_files(tmp_path / "small", vocabulary=40)
    with EmbeddedEngine(model, host) as engine:
        request = Request("small", [5, 6], Sampling(max_tokens=30, temperature=9.0, logprobs=50))
        output = together(engine, [request, Request("base", [7], Sampling())])[0]
    assert max(output.token_ids) < 40
    best = [t for t in output.logprobs[0].top if t.logprob > -1e30]
    assert len(best) == 40
