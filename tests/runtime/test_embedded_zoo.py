"""The embedded engine on the real host: packed deltas in mixed batches against dense models."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch
import zoo_models

from deltafold.compress import Checkpoint, DeltafoldError
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.embedded import EmbeddedEngine
from deltafold.runtime.embedded.pooling import PoolingEngine
from deltafold.runtime.engine import Request, Sampling


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> zoo_models.Models:
    folder = tmp_path_factory.mktemp("zoo")
    codecs = {"sign": "bitdelta", "int": "int:bits=4,group=32", "exact": "lossless"}
    return zoo_models.make(folder, "Qwen3", codecs=codecs)


def dense(made: zoo_models.Models, name: str, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = made.plain(name).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def test_every_variant_answers_as_its_dense_model_does(made: zoo_models.Models) -> None:
    names = ["base", *made.variants] * 2
    prompts = [
        [t % 120 for t in p] for p in pico.prompts([3, 30, 11, 50, 7, 1, 24, 9][: len(names)])
    ]
    requests = [
        Request(n, p, Sampling(max_tokens=12, ignore_eos=True))
        for n, p in zip(names, prompts, strict=True)
    ]
    model = made.plain()
    deltas = Deltas(model, Checkpoint.open(made.base), made.zoo)
    with EmbeddedEngine(model, deltas, max_batch=6, prefill_chunk=32) as engine:
        outputs = list(engine.generate(requests))
        assert engine.stats().base_only_steps < engine.stats().steps
    for request, prompt, output in zip(requests, prompts, outputs, strict=True):
        assert list(output.token_ids) == dense(made, request.variant, prompt, 12), request.variant
        assert output.digest == deltas.resolve(request.variant).digest


def test_chat_goes_through_the_variants_template(made: zoo_models.Models, tmp_path: Path) -> None:
    model = made.plain()
    deltas = Deltas(model, Checkpoint.open(made.base), made.zoo)
    with EmbeddedEngine(model, deltas) as engine:
        chat = [{"role": "user", "content": "hi"}]
        request = Request("sign", chat, Sampling(max_tokens=4, ignore_eos=True))
        output = next(iter(engine.generate([request])))
        assert engine.encode("sign", chat) == engine.encode("sign", "hi:")
        assert output.prompt_tokens == 3
        assert output.text == engine.decode("sign", output.token_ids)


def test_a_zoo_that_is_not_there_is_refused_before_the_base_is_loaded(tmp_path):
    for engine in (EmbeddedEngine, PoolingEngine):
        with pytest.raises(DeltafoldError, match=r"the zoo .* is not a folder"):
            engine.open(tmp_path / "no-base", zoo=tmp_path / "no-zoo")
