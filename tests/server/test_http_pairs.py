"""A model with an encoder behind the same HTTP API: `deltafold serve` on a T5."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import arch_sequences
import openai
import pairs
import pytest
import torch

from deltafold.runtime import EmbeddedEngine
from deltafold.server.app import create_app
from deltafold.server.run import BackgroundServer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs.t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def engine(made: Path) -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine.open(made / "base", zoo=made / "zoo", device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def client(engine: EmbeddedEngine) -> Iterator[openai.OpenAI]:
    with (
        BackgroundServer(create_app(engine)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened,
    ):
        yield opened


def test_completions_are_the_dense_models(
    client: openai.OpenAI, engine: EmbeddedEngine, made: Path
) -> None:
    texts = set()
    for name in ("base", "sign", "exact", "more"):
        whole = client.completions.create(model=name, prompt="hello", max_tokens=8, temperature=0)
        ids = engine.encode(name, "hello")
        inputs = {"input_ids": torch.tensor([ids])}
        tokens = arch_sequences.greedy(pairs.plain(made / name), inputs, 8)
        assert whole.choices[0].text == engine.decode(name, tokens)
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 8)
        stream = client.completions.create(
            model=name, prompt="hello", max_tokens=8, temperature=0, stream=True
        )
        pieces = [event.choices[0].text for event in stream if event.choices]
        assert "".join(pieces) == whole.choices[0].text
        texts.add(whole.choices[0].text)
    assert len(texts) > 2


def test_what_a_pair_of_models_cannot_do_is_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="base", prompt="hello", max_tokens=2, echo=True, logprobs=1)
