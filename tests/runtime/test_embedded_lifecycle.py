"""How requests begin and end: refusals, cancelling, failures, fairness and closing."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import pico
import pytest
import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.embedded import EmbeddedEngine
from deltafold.runtime.engine import Chunk, Request, Sampling
from deltafold.runtime.host import Row

PROMPT = [5, 6, 7, 8]
LONG = Sampling(max_tokens=400)


def submit(engine: EmbeddedEngine, name: str, sampling: Sampling = LONG) -> tuple[str, pico.Watch]:
    watch = pico.Watch()
    return engine.submit(Request(name, PROMPT, sampling), watch).id, watch


# Refusals.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 2.5),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("seed", "x"),
        ("stop", "END"),
        ("stop", ("",)),
        ("stop_token_ids", ("x",)),
        ("logprobs", -1),
        ("logprobs", True),
        ("scale", math.inf),
    ],
)
def test_bad_sampling_values_are_refused_by_name(
    field: str, value: Any, start: Callable[..., EmbeddedEngine]
) -> None:
    with pytest.raises(DeltafoldError) as caught:
        start().submit(Request("base", PROMPT, Sampling(**{field: value})), pico.Watch())
    assert caught.value.code == "bad-argument"
    assert ("field", field) in caught.value.facts


@pytest.mark.parametrize("prompt", [[], "", [1, pico.VOCABULARY], [-1], [1.5], ["x"], 7, [True]])
def test_bad_prompts_are_refused(prompt: Any, start: Callable[..., EmbeddedEngine]) -> None:
    with pytest.raises(DeltafoldError) as caught:
        start().submit(Request("a", prompt), pico.Watch())
    assert caught.value.code == "bad-argument"


def test_unknown_variants_are_refused(start: Callable[..., EmbeddedEngine]) -> None:
    with pytest.raises(DeltafoldError) as caught:
        start().submit(Request("nobody", PROMPT), pico.Watch())
    assert caught.value.code == "variant-not-found"


@pytest.mark.parametrize("name", ["max_batch", "max_model_len", "prefill_chunk"])
def test_bad_limits_are_refused(name: str, host: pico.PicoHost) -> None:
    with pytest.raises(DeltafoldError, match=name):
        EmbeddedEngine(host.model, host, **{name: 0})


def test_what_cannot_fit_is_refused_and_none_takes_what_is_left(
    start: Callable[..., EmbeddedEngine],
) -> None:
    engine = start(max_model_len=20)
    assert engine.max_model_len == 20
    for prompt, tokens in (([3] * 15, 6), ([3] * 20, None), ([3] * 21, 0)):
        with pytest.raises(DeltafoldError) as caught:
            engine.submit(Request("a", prompt, Sampling(max_tokens=tokens)), pico.Watch())
        assert caught.value.code == "context-length"
    watch = pico.Watch()
    engine.submit(Request("a", [3] * 15, Sampling(max_tokens=None)), watch)
    assert watch.wait().finish_reason == "length"
    assert len(watch.tokens) == 5


def test_the_models_context_is_the_limit(start: Callable[..., EmbeddedEngine]) -> None:
    assert start().max_model_len == 512
    assert start(max_model_len=100_000).max_model_len == 512


def test_a_model_without_a_cache_is_refused(host: pico.PicoHost) -> None:
    model = pico.model("OpenAIGPT", attention="eager", n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(DeltafoldError) as caught:
        EmbeddedEngine(model, host)
    assert caught.value.code == "engine-unsupported"


# Ends.


def test_stop_tokens_end_the_output(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    plain = pico.plain_greedy(host.model, host, PROMPT, 12, Row(host.variant("a")))
    stop = plain[5]
    _, watch = submit(start(), "a", Sampling(max_tokens=12, stop_token_ids=(stop,)))
    assert watch.wait().finish_reason == "stop"
    assert watch.tokens == plain[: plain.index(stop) + 1]


def test_the_variants_own_eos_ends_the_output_unless_ignored(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    rows = {n: Row(host.variant(n)) for n in ("base", "a", "b")}
    plain = {n: pico.plain_greedy(host.model, host, PROMPT, 12, r) for n, r in rows.items()}
    pico.config_files(host.base_folder, eos=plain["base"][3])
    pico.config_files(host.base_folder / "a", eos=[9999, plain["a"][6]])
    engine = start()
    for name, eos in (("base", plain["base"][3]), ("a", plain["a"][6])):
        _, watch = submit(engine, name, Sampling(max_tokens=12))
        assert watch.wait().finish_reason == "stop"
        assert watch.tokens == plain[name][: plain[name].index(eos) + 1]
        _, watch = submit(engine, name, Sampling(max_tokens=12, ignore_eos=True))
        assert watch.wait().finish_reason == "length"
        assert watch.tokens == plain[name]
    assert host.base_folder.joinpath("b").exists() is False
    _, watch = submit(engine, "b", Sampling(max_tokens=12))
    watch.wait()
    if plain["base"][3] not in plain["b"]:
        assert watch.tokens == plain["b"]


def test_cancelling_a_running_request_leaves_the_others_alone(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    engine = start()
    doomed, watch = submit(engine, "a")
    _, other = submit(engine, "b", Sampling(max_tokens=60))
    assert watch.first.wait(30)
    engine.cancel(doomed)
    assert watch.wait().finish_reason == "cancelled"
    assert len(watch.tokens) < 400
    other.wait()
    row = Row(host.variant("b"))
    assert other.tokens == pico.plain_greedy(host.model, host, PROMPT, 60, row)
    engine.cancel(doomed)
    engine.cancel("never was")


def test_cancelling_a_waiting_request(start: Callable[..., EmbeddedEngine]) -> None:
    engine = start(max_batch=1)
    first, running = submit(engine, "a")
    waiting, watch = submit(engine, "a")
    assert running.first.wait(30)
    engine.cancel(waiting)
    assert watch.wait().finish_reason == "cancelled"
    assert watch.tokens == []
    engine.cancel(first)
    running.wait()


def test_cancelling_while_the_prompt_is_being_read(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    engine = start(prefill_chunk=1)
    watch = pico.Watch()
    ticket = engine.submit(Request("a", [5] * 500, Sampling(max_tokens=5)), watch)
    while not engine.stats().steps:
        pass
    engine.cancel(ticket.id)
    assert watch.wait().finish_reason == "cancelled"
    assert watch.tokens == []
    assert len(host.batches) < 500


def fail_on(host: pico.PicoHost, bad: Callable[[list[Row]], bool]) -> None:
    """Make the forward pass of some batches fail half way through the model."""
    layer = host.model.model.layers[1].mlp
    plain = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if bad(host.batches[-1]):
            raise RuntimeError("a kernel broke")
        out: torch.Tensor = plain(x)
        return out

    layer.forward = forward


def test_a_failing_pass_fails_its_batch_and_the_engine_lives_on(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine], caplog: pytest.LogCaptureFixture
) -> None:
    broken = threading.Event()
    fail_on(host, lambda _: broken.is_set())
    engine = start()
    watches = [submit(engine, n)[1] for n in ("a", "b", "base")]
    for watch in watches:
        assert watch.first.wait(30)
    with caplog.at_level(logging.ERROR):
        broken.set()
        for watch in watches:
            last = watch.wait()
            assert last.finish_reason == "error"
            assert isinstance(last.error, RuntimeError)
    assert "a kernel broke" in caplog.text
    broken.clear()
    plain = pico.plain_greedy(host.model, host, PROMPT, 9, Row(host.variant("a")))
    _, watch = submit(engine, "a", Sampling(max_tokens=9))
    watch.wait()
    assert watch.tokens == plain


def test_a_prompt_that_fails_does_not_touch_running_rows(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    engine = start()
    _, running = submit(engine, "b", Sampling(max_tokens=60))
    assert running.first.wait(30)
    fail_on(host, lambda rows: any(r.scale == 7.0 for r in rows))
    _, bad = submit(engine, "a", Sampling(scale=7.0))
    assert bad.wait().finish_reason == "error"
    assert running.wait().finish_reason == "length"
    row = Row(host.variant("b"))
    assert running.tokens == pico.plain_greedy(host.model, host, PROMPT, 60, row)


def test_logits_that_are_not_numbers_fail_their_own_row(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    variant = host.variant("a")
    assert variant is not None
    variant.deltas["lm_head"][3] = torch.nan
    engine = start()
    _, other = submit(engine, "b", Sampling(max_tokens=30))
    _, bad = submit(engine, "a")
    error = bad.wait().error
    assert isinstance(error, DeltafoldError)
    assert error.code == "not-finite"
    assert other.wait().finish_reason == "length"


def test_a_broken_receiver_ends_its_own_request_only(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    engine, calls = start(), []

    def receiver(chunk: Chunk) -> None:
        calls.append(chunk)
        raise RuntimeError("nobody listens")

    engine.submit(Request("a", PROMPT, LONG), receiver)
    _, other = submit(engine, "b", Sampling(max_tokens=30))
    assert other.wait().finish_reason == "length"
    assert len(calls) == 1
    assert engine.stats().running == 0


def test_generate_raises_what_failed_and_cancels_the_rest(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    fail_on(host, lambda rows: any(r.scale == 7.0 for r in rows))
    engine = start()
    requests = [
        Request("a", PROMPT, Sampling(max_tokens=5)),
        Request("a", PROMPT, Sampling(scale=7.0)),
        Request("b", PROMPT, LONG),
    ]
    # The failing pass may take its companions along, so the first is run by itself.
    assert next(iter(engine.generate(requests[:1]))).finish_reason == "length"
    with pytest.raises(RuntimeError, match="a kernel broke"):
        list(engine.generate(requests[1:]))


def test_generate_takes_more_requests_than_rows_and_keeps_their_order(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    engine = start(max_batch=2)
    requests = [Request("ab"[i % 2], [3 + i], Sampling(max_tokens=1 + i % 5)) for i in range(30)]
    outputs = list(engine.generate(requests))
    assert [len(o.token_ids) for o in outputs] == [1 + i % 5 for i in range(30)]
    assert [o.variant for o in outputs] == [r.variant for r in requests]
    assert max(len(rows) for rows in host.batches) == 2


def test_leaving_generate_early_cancels_the_rest(start: Callable[..., EmbeddedEngine]) -> None:
    engine = start()
    outputs = engine.generate(
        [Request("a", PROMPT, Sampling(max_tokens=1)), Request("b", PROMPT, LONG)]
    )
    next(outputs)
    outputs.close()  # type: ignore[attr-defined]
    while engine.stats().running or engine.stats().waiting:
        pass
    assert engine.stats().generated_tokens < 300


# Fairness.


def test_a_variant_that_waits_gets_the_next_free_row(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    engine = start(max_batch=2)
    order: list[str] = []

    def receiver(name: str) -> Callable[[Chunk], None]:
        return lambda c: order.append(name) if c.finish_reason else None

    with pico.hold(engine):
        for i in range(6):
            request = Request("a", PROMPT, Sampling(max_tokens=10))
            engine.submit(request, receiver(f"a{i}"))
        last = pico.Watch()
        engine.submit(Request("b", PROMPT, Sampling(max_tokens=10)), receiver("b"))
        engine.submit(Request("a", PROMPT, Sampling(max_tokens=10)), last)
    last.wait()
    assert order.index("b") < 2
    assert [n for n in order if n != "b"] == [f"a{i}" for i in range(6)], "first come, first served"


def test_no_variant_holds_all_rows_while_another_waits(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    engine = start(max_batch=2)
    long = [submit(engine, "a") for _ in range(2)]
    for _, watch in long:
        assert watch.first.wait(30)
    _, short = submit(engine, "b", Sampling(max_tokens=3))
    short.wait()
    assert not any(w.last.is_set() for _, w in long), "it did not have to wait for an end"
    # The row that was given up goes on where it was.
    assert [w.wait().finish_reason for _, w in long] == ["length"] * 2
    plain = pico.plain_greedy(host.model, host, PROMPT, 400, Row(host.variant("a")))
    assert [w.tokens for _, w in long] == [plain] * 2


# State.


def test_stats(host: pico.PicoHost, start: Callable[..., EmbeddedEngine]) -> None:
    engine = start(max_batch=2, max_model_len=450)
    running = [submit(engine, n) for n in ("a", "b")]
    for _, watch in running:
        assert watch.first.wait(30)
    waiting, _ = submit(engine, "a")
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.batch_variants) == (2, 1, 2)
    assert stats.running_by_variant == {"a": 1, "b": 1}
    assert stats.kv_tokens >= 8
    assert stats.kv_capacity == 900
    assert stats.resident == {"a": 1, "b": 1}
    assert stats.prompt_tokens == 8
    assert stats.base_only_steps == 0
    for ticket in (waiting, *(t for t, _ in running)):
        engine.cancel(ticket)
    for _, watch in running:
        watch.wait()
    before = engine.stats().steps
    _, watch = submit(engine, "base", Sampling(max_tokens=4))
    watch.wait()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens) == (0, 0, 0)
    assert stats.steps - before == stats.base_only_steps == 4


def test_memory_follows_the_rows(start: Callable[..., EmbeddedEngine]) -> None:
    """Columns that only a finished row needed are given up."""
    engine, columns, done = start(), [], threading.Event()

    def receiver(chunk: Chunk) -> None:
        cache = engine._lanes.shared._cache
        columns.append(cache.columns if cache else 0)
        if chunk.finish_reason:
            done.set()

    watch = pico.Watch()
    with pico.hold(engine):
        engine.submit(Request("a", PROMPT, Sampling(max_tokens=300)), receiver)
        engine.submit(Request("b", [5] * 400, Sampling(max_tokens=5)), watch)
    watch.wait()
    assert done.wait(60)
    assert max(columns) > 400
    assert columns[-1] == len(PROMPT) + 299
    with pico.hold(engine):
        assert engine._lanes.shared.cache_capacity == (0, 0), "an idle engine holds no memory"


def test_closing_cancels_what_runs_and_what_waits(
    host: pico.PicoHost, start: Callable[..., EmbeddedEngine]
) -> None:
    engine = start(max_batch=1)
    watches = [submit(engine, "a")[1] for _ in range(4)]
    assert watches[0].first.wait(30)
    engine.close()
    assert [w.wait().finish_reason for w in watches] == ["cancelled"] * 4
    assert not +host.held
    engine.close()
    with pytest.raises(DeltafoldError) as caught:
        submit(engine, "a")
    assert caught.value.code == "busy"
    assert not +host.held


def test_closing_from_a_receiver_does_not_hang(start: Callable[..., EmbeddedEngine]) -> None:
    engine, done = start(), threading.Event()

    def receiver(chunk: Chunk) -> None:
        if chunk.finish_reason:
            assert chunk.finish_reason == "cancelled"
            done.set()
        else:
            engine.close()

    engine.submit(Request("a", PROMPT, LONG), receiver)
    assert done.wait(30)


def test_a_bug_in_the_engine_leaves_nobody_waiting(
    start: Callable[..., EmbeddedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    _, watch = submit(engine, "a")
    assert watch.first.wait(30)

    def broken(_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine._lanes.shared, "_trim", broken)
    monkeypatch.setattr(engine._lanes.shared, "_drop_cancelled", lambda: broken(0))
    assert watch.wait().finish_reason == "error"
    with pytest.raises(DeltafoldError):
        submit(engine, "a")
