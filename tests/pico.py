"""Tiny random models, tokenizers and hosts, all made on the spot."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.engine import Chunk, Request, Sampling, VariantInfo
from deltafold.runtime.host import Row

# Threads of a pool cost more than they bring on matrices this small.
torch.set_num_threads(1)

VOCABULARY = 320
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}


def model(family: str, *, seed: int = 0, attention: str = "sdpa", **changes: Any) -> Any:
    """A random float32 model of one family, e.g. "Llama" or "Qwen3"."""
    sizes = {k: v for k, v in {**_SIZES, **changes}.items() if v is not ...}
    config = getattr(transformers, f"{family}Config")(**sizes)
    config._attn_implementation = attention
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def llama(**changes: Any) -> Any:
    return model("Llama", **changes)


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Mistral": {"sliding_window": 9},
    "Gemma3Text": {
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def tokenizer(folder: Path, *, chat: bool = True, vocabulary: int = VOCABULARY) -> Any:
    """Train a byte-level BPE tokenizer on a few lines, save it to `folder` and return it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["the cat sat on the mat", "hello world, hello there"], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    if chat:
        made.chat_template = (
            "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
    made.save_pretrained(folder)
    return made


def config_files(folder: Path, *, vocabulary: int = VOCABULARY, eos: Any = None) -> None:
    """A model folder's configuration, as far as the text side reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": vocabulary})
    )
    if eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))


@dataclass(frozen=True, eq=False)
class PicoVariant:
    """Dense differences for a few linear layers."""

    name: str
    digest: str
    folder: Path
    deltas: dict[str, torch.Tensor] = field(default_factory=dict)
    model: Any | None = None


class PicoHost:
    """A host of variants that are dense differences, added row by row.

    Attributes:
        held: acquires minus releases by name.
        batches: the rows of every batch so far.
    """

    base_name = "pico"

    def __init__(self, model: Any, folder: Path, names: Sequence[str] = ()) -> None:
        self.base_folder = folder
        self.held: Counter[str] = Counter()
        self.batches: list[list[Row]] = []
        self.lock = threading.Lock()
        self._rows: Sequence[Row] | None = None
        self.model = model
        self._variants = {name: self._make(name, i) for i, name in enumerate(names)}

    def _make(self, name: str, number: int) -> PicoVariant:
        noise = torch.Generator().manual_seed(100 + number)
        deltas = {}
        if number == 0:
            for path in ("lm_head", "model.layers.0.self_attn.v_proj"):
                self._wrap(path)
        for path in ("lm_head", "model.layers.0.self_attn.v_proj"):
            shape = self.model.get_submodule(path).weight.shape
            deltas[path] = torch.randn(shape, generator=noise) * 0.2
        return PicoVariant(name, f"sha256:{name}", self.base_folder / name, deltas)

    def _wrap(self, path: str) -> None:
        linear = self.model.get_submodule(path)
        plain = linear.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = plain(x)
            if self._rows is None:
                return y
            assert len(self._rows) == x.shape[0], "one row per batch row"
            for i, (variant, scale) in enumerate(self._rows):
                if variant is not None:
                    y[i] += scale * (x[i] @ variant.deltas[path].T)
            return y

        linear.forward = forward

    def variants(self) -> list[VariantInfo]:
        return [self.resolve("base"), *(self.resolve(n) for n in sorted(self._variants))]

    def resolve(self, name: str) -> VariantInfo:
        if name in ("base", self.base_name):
            return VariantInfo(self.base_name, "sha256:base", None)
        if name not in self._variants:
            raise DeltafoldError("variant-not-found", f"no variant is called {name!r}.")
        return VariantInfo(name, self._variants[name].digest, self.base_name)

    def acquire(self, name: str) -> PicoVariant | None:
        name = self.resolve(name).name
        with self.lock:
            self.held[name] += 1
        return self._variants.get(name)

    def release(self, variant: Any) -> None:
        with self.lock:
            self.held[variant.name if variant else self.base_name] -= 1

    @contextlib.contextmanager
    def batch(self, rows: Sequence[Row]) -> Iterator[None]:
        self.batches.append(list(rows))
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def variant(self, name: str) -> PicoVariant | None:
        """The variant behind a name without acquiring it; None for the base."""
        return self._variants.get(name)

    def resident(self) -> dict[str, int]:
        return dict.fromkeys(self._variants, 1)


def plain_greedy(
    model: Any, host: PicoHost, prompt: Sequence[int], new: int, row: Row | None = None
) -> list[int]:
    """What `model.generate` gives for one prompt alone, under one row's variant."""
    if not new:
        return []
    ids = torch.tensor([list(prompt)])
    with host.batch([row or Row(None)]):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


@contextlib.contextmanager
def hold(engine: Any) -> Iterator[None]:
    """Keep the engine from stepping, so that what is submitted meanwhile arrives at once."""
    go, held = threading.Event(), threading.Event()

    def on_chunk(_: Chunk) -> None:
        held.set()
        assert go.wait(60)

    engine.submit(Request("base", [3], Sampling(max_tokens=1)), on_chunk)
    assert held.wait(60)
    try:
        yield
    finally:
        go.set()


class Watch:
    """Collects one request's chunks."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.first = threading.Event()
        self.last = threading.Event()

    def __call__(self, chunk: Chunk) -> None:
        assert not self.last.is_set(), "a chunk after the last one"
        self.chunks.append(chunk)
        self.first.set()
        if chunk.finish_reason is not None:
            self.last.set()

    def wait(self) -> Chunk:
        """The last chunk, once it is there."""
        assert self.last.wait(60)
        return self.chunks[-1]

    @property
    def tokens(self) -> list[int]:
        return [t for c in self.chunks for t in c.token_ids]

    @property
    def text(self) -> str:
        return "".join(c.text for c in self.chunks)


def prompts(lengths: Sequence[int], *, seed: int = 0) -> list[list[int]]:
    """Random token ids of given lengths."""
    noise = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=noise).tolist() for n in lengths]
