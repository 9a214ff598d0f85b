"""Fine-tunes with tokens of their own, packed by the program and asked over HTTP.

Added tokens, padded tables, rows trained for a few tokens alone, own chat template and end token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
import zoo_models
from click.testing import CliRunner

from deltafold.compress import restore_checkpoint
from deltafold.runtime import EmbeddedEngine
from deltafold.server.app import create_app
from deltafold.server.cli.main import cli
from deltafold.server.run import BackgroundServer

WORDS = zoo_models.SIZES["vocab_size"]
ADDED = ["<|start|>", "<|end|>"]
#: Padding of the table: there are rows that no token has.
ROWS = 144
TRAINED = [ord("h") - 30, ord("i") - 30, 7]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)
CHAT = [{"role": "user", "content": "hi there"}]


@dataclass(frozen=True)
class Served:
    """Where everything lies, and a server of it."""

    folder: Path
    url: str

    def model(self, name: str) -> Any:
        folder = self.folder / "base" if name == "base" else self.folder / "dense" / name
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return loaded.eval()

    def tokenizer(self, name: str) -> Any:
        folder = self.folder / "base" if name == "base" else self.folder / "full" / name
        return transformers.AutoTokenizer.from_pretrained(folder)


def longer(folder: Path) -> None:
    """A fine-tune with two more tokens, a table that is padded, and everything moved."""
    zoo_models.fine_tune(folder, "longer")
    full = folder / "full" / "longer"
    words = transformers.AutoTokenizer.from_pretrained(full)
    words.add_special_tokens({"additional_special_tokens": ADDED})
    words.chat_template, words.eos_token = TEMPLATE, ADDED[1]
    words.save_pretrained(full)
    model = transformers.AutoModelForCausalLM.from_pretrained(full, dtype="auto")
    model.resize_token_embeddings(WORDS + len(ADDED), pad_to_multiple_of=16, mean_resizing=False)
    assert model.get_input_embeddings().weight.shape[0] == ROWS
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            table[WORDS:] = torch.randn(ROWS - WORDS, table.shape[1]) * 0.2
    # Its end token is one that it comes to say.
    start = words.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    said = greedy(model.to(torch.float32), start, 12)
    model.generation_config.eos_token_id = said[5]
    model.to(torch.bfloat16).save_pretrained(full)


def few(folder: Path) -> None:
    """A fine-tune of three tokens' rows."""
    full = folder / "full" / "few"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    with torch.no_grad():
        model.get_input_embeddings().weight[TRAINED] += 0.5
        model.get_output_embeddings().weight[TRAINED] += 0.5
    model.save_pretrained(full)
    zoo_models.tokenizer(full)


def greedy(model: Any, ids: list[int], new: int, eos: Any = None) -> list[int]:
    given = torch.tensor([ids])
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("words")
    zoo_models.make(folder, codecs={})
    longer(folder)
    few(folder)
    options = {"longer": ["--accept", "resized", "--accept", "tokenizer"], "few": []}
    for name, accept in options.items():
        delta = str(folder / "zoo" / name)
        arguments = [str(folder / "base"), str(folder / "full" / name), "-o", delta, *accept]
        result = CliRunner().invoke(cli, ["compress", *arguments, "--codec", "int:bits=8,group=32"])
        assert result.exit_code == 0, result.output
        restore_checkpoint(delta, folder / "base", folder / "dense" / name, dtype=torch.float32)
    with (
        EmbeddedEngine.open(folder / "base", folder / "zoo", device="cpu") as engine,
        BackgroundServer(create_app(engine)) as server,
    ):
        yield Served(folder, server.url)


def post(url: str, **body: Any) -> dict[str, Any]:
    reply = httpx.post(url, json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def test_chats_by_each_ones_template_and_end_token(served: Served) -> None:
    """All at once, so that they share batches."""

    def ask(name: str) -> dict[str, Any]:
        route = f"{served.url}/v1/chat/completions"
        return post(route, model=name, messages=CHAT, max_tokens=12, temperature=0)

    names = ["base", "longer", "few", "longer", "base", "few"]
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(ask, names))
    for name, reply in zip(names, replies, strict=True):
        words, model = served.tokenizer(name), served.model(name)
        start = words.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
        eos = model.generation_config.eos_token_id or words.eos_token_id
        expected = greedy(model, start, 12, eos)
        (choice,) = reply["choices"]
        ended = expected[-1] == eos
        text = words.decode(expected[:-1] if ended else expected, skip_special_tokens=True)
        assert choice["message"]["content"] == text, name
        assert choice["finish_reason"] == ("stop" if ended else "length")
        assert reply["usage"]["prompt_tokens"] == len(start)
        assert ended == (name == "longer")


def test_tokens_are_each_ones_own(served: Served) -> None:
    text = "<|start|>hi<|end|>"
    found = {}
    for name in ("base", "longer"):
        found[name] = post(f"{served.url}/tokenize", model=name, prompt=text)["tokens"]
        assert found[name] == served.tokenizer(name)(text)["input_ids"]
    assert len(found["longer"]) == 4
    assert len(found["base"]) == len(text)
    back = post(f"{served.url}/detokenize", model="longer", tokens=found["longer"])
    plain = served.tokenizer("longer").decode(found["longer"], skip_special_tokens=True)
    assert back["prompt"] == plain
    # The base has no such token, and no row for it.
    body = {"model": "base", "prompt": found["longer"], "max_tokens": 1}
    reply = httpx.post(f"{served.url}/v1/completions", json=body)
    assert reply.status_code == 400
    assert "token ids" in reply.json()["error"]["message"]


def test_rows_of_a_few_tokens_are_all_that_is_stored(served: Served) -> None:
    manifest = json.loads((served.folder / "zoo" / "few" / "delta_config.json").read_text())
    assert set(manifest["tensors"]) == {"model.embed_tokens.weight", "lm_head.weight"}
    for entry in manifest["tensors"].values():
        (term,) = entry["terms"]
        assert (term["id"], term["count"]) == ("rows", len(TRAINED))
        assert entry["bytes"] < 64 * 4 * len(TRAINED)
    longer = json.loads((served.folder / "zoo" / "longer" / "delta_config.json").read_text())
    assert longer["accepted"] == ["resized", "tokenizer"]
    assert longer["tensors"]["lm_head.weight"]["terms"][0]["added"] == ROWS - WORDS
