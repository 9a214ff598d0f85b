"""Requests that bring input embeddings, against what transformers makes of `inputs_embeds`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import zoo_models

from deltafold.compress import DeltafoldError, Recipe, merge_deltas, parse_spec
from deltafold.compress.merges import Task
from deltafold.runtime.embedded import EmbeddedEngine
from deltafold.runtime.engine import Embeddings, Request, Sampling

NEW = 6
GREEDY = Sampling(max_tokens=NEW, ignore_eos=True)


def vectors(count: int, hidden: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)) * 0.5


def expected(model: Any, pieces: list[Any]) -> list[int]:
    """What `model.generate` gives for embeddings put together by hand."""
    table = model.get_input_embeddings()
    parts = [
        piece.values if isinstance(piece, Embeddings) else table(torch.tensor([piece]))
        for piece in pieces
    ]
    with torch.inference_mode():
        embedded = torch.cat([p.reshape(-1, p.shape[-1]) for p in parts]).unsqueeze(0)
        out = model.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0].tolist()


@pytest.mark.parametrize("family", ["Llama", "Gemma", "Gemma3Text"])
def test_equal_to_inputs_embeds(tmp_path: Path, family: str) -> None:
    model = pico.model(family, **pico.FAMILIES.get(family, {}))
    host = pico.PicoHost(model, tmp_path)
    prompts: list[Any] = [
        Embeddings(vectors(9, 32)),
        [5, 6, Embeddings(vectors(4, 32, 1)), 7, Embeddings(vectors(2, 32, 2)), 8],
        [3, 4, 5],
        [9, *[Embeddings(vectors(1, 32, i)) for i in range(40)], 11],
    ]
    with EmbeddedEngine(model, host, prefill_chunk=16) as engine:
        outputs = list(engine.generate([Request("base", p, GREEDY) for p in prompts]))
    for prompt, out in zip(prompts, outputs, strict=True):
        pieces = [prompt] if isinstance(prompt, Embeddings) else prompt
        assert list(out.token_ids) == expected(model, pieces)
    assert [out.prompt_tokens for out in outputs] == [9, 10, 3, 42]


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_embedding_tokens_by_hand_changes_nothing(tmp_path: Path, family: str) -> None:
    model = pico.model(family, **pico.FAMILIES[family])
    ids = pico.prompts([20])[0]
    with torch.inference_mode():
        table = model.get_input_embeddings()(torch.tensor(ids))
    with EmbeddedEngine(model, pico.PicoHost(model, tmp_path), prefill_chunk=8) as engine:
        requests = [Request("base", ids, GREEDY), Request("base", Embeddings(table), GREEDY)]
        plain, embedded = engine.generate(requests)
    assert plain.token_ids == embedded.token_ids


def test_variants_embed_their_own_tokens(tmp_path: Path) -> None:
    made = zoo_models.make(tmp_path, codecs={"sign1": "bitdelta", "rank8": "svd:rank=8"})
    prompt: list[Any] = [40, 41, Embeddings(vectors(3, 64)), 42]
    names = ["base", "sign1", "rank8"]
    with EmbeddedEngine.open(made.base, zoo=made.zoo, device="cpu") as engine:
        outputs = list(engine.generate([Request(n, prompt, GREEDY) for n in names]))
    for name, out in zip(names, outputs, strict=True):
        assert list(out.token_ids) == expected(made.plain(name), prompt)
    assert len({out.token_ids for out in outputs}) == 3


def test_merged_deltas_and_mixtures_take_embeddings(tmp_path: Path) -> None:
    """Deltas of two language models joined, and embeddings of a picture before the text."""
    made = zoo_models.make(tmp_path, codecs={"a": "lossless", "b": "lossless"})
    recipe = Recipe(default=parse_spec("exact"))
    parents = [made.zoo / "a", made.zoo / "b"]
    merge_deltas(made.base, parents, made.zoo / "both", method=Task(scale=0.5), recipe=recipe)
    joined, first, second = (made.plain(name) for name in ("base", "a", "b"))
    with torch.no_grad():
        for parameter, one, two in zip(
            joined.parameters(), first.parameters(), second.parameters(), strict=True
        ):
            parameter.copy_(0.5 * one + 0.5 * two)
    prompt: list[Any] = [40, Embeddings(vectors(5, 64)), 42, 43]
    with EmbeddedEngine.open(made.base, zoo=made.zoo, device="cpu") as engine:
        requests = [Request(name, prompt, GREEDY) for name in ("both", "a*0.5+b*0.5", "a")]
        both, mixed, one = (list(out.token_ids) for out in engine.generate(requests))
    assert both == mixed == expected(joined, prompt)
    assert one == expected(first, prompt) != both


def test_a_row_that_was_given_up_reads_them_again(tmp_path: Path) -> None:
    model = pico.llama()
    host = pico.PicoHost(model, tmp_path)
    prompts: list[Any] = [[3, Embeddings(vectors(30, 32, i)), 4] for i in range(4)]
    long = Sampling(max_tokens=60, ignore_eos=True)
    with EmbeddedEngine(model, host) as engine:
        roomy = [o.token_ids for o in engine.generate([Request("base", p, long) for p in prompts])]
    with EmbeddedEngine(model, host, max_batch_tokens=200) as engine:
        tight = [o.token_ids for o in engine.generate([Request("base", p, long) for p in prompts])]
    assert tight == roomy


@pytest.mark.parametrize(
    "prompt",
    [
        Embeddings(torch.zeros(3, 31)),
        Embeddings(torch.zeros(32)),
        Embeddings(torch.zeros(0, 32)),
        Embeddings(torch.zeros(2, 32, dtype=torch.int64)),
        Embeddings(torch.full((2, 32), float("nan"))),
        [Embeddings(torch.zeros(2, 32)), "text"],
    ],
)
def test_what_is_refused(start: Callable[..., EmbeddedEngine], prompt: Any) -> None:
    with pytest.raises(DeltafoldError) as caught:
        start().submit(Request("base", prompt), lambda chunk: None)
    assert caught.value.code == "bad-argument"


def test_there_is_nothing_to_echo(start: Callable[..., EmbeddedEngine]) -> None:
    request = Request("base", Embeddings(torch.zeros(2, 32)), Sampling(echo=True, logprobs=0))
    with pytest.raises(DeltafoldError, match="no tokens to echo"):
        start().submit(request, lambda chunk: None)
