"""Engines of the real vLLM on tiny random models, and what they answer."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zoo_models

#: Biases on q, k and v and tied embeddings come with Qwen2, norms of q and k with Qwen3. vLLM's CPU
#: attention wants heads of 32 or more.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"head_dim": 32},
    "Qwen2": {"head_dim": ..., "num_attention_heads": 2, "num_key_value_heads": 1},
    "Qwen3": {"head_dim": 32},
    "Qwen3Moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
    },
}
#: Sign words, codes, a sparse and a low-rank delta, and everything exact.
CODECS = {
    "sign1": "bitdelta",
    "int4": "int:bits=4,group=32",
    "dare": "dare:drop=0.5",
    "rank8": "svd:rank=8",
    "exact": "lossless",
}
LONG = list(range(20, 95))
PROMPTS = [[5, 9, 30, 77, 2, 8, 19], [101, 7, 7, 64, 7, 7, 64, 7, 7], LONG, [88, 12]]


def make(
    folder: Path, family: str, codecs: dict[str, str] = CODECS, **changes: Any
) -> zoo_models.Models:
    """A float32 base, its variants and their restored dense checkpoints."""
    changes = {**FAMILIES[family], **changes}
    return zoo_models.make(folder, family, codecs=codecs, dtype=torch.float32, **changes)


@contextmanager
def plain(folder: Path, *, in_process: bool = True, **options: Any) -> Iterator[Any]:
    """vLLM on one checkpoint, in this process or in its own ones."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not in_process))
    given = {"enforce_eager": True, "max_num_seqs": 8, "block_size": 32, "dtype": "float32"}
    llm = LLM(str(folder), max_model_len=160, seed=0, **{**given, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def serving(folder: Path, *, max_loras: int = 3, **options: Any) -> Any:
    """vLLM with deltas on a base; `options` are vLLM's, but for `slots`, `base` and `zoo`."""
    mine = {name: options.pop(name) for name in ("slots", "base", "zoo") if name in options}
    own = {"deltafold": mine}
    return plain(folder, enable_lora=True, max_loras=max_loras, additional_config=own, **options)


@dataclass(frozen=True)
class Answer:
    """What one request got."""

    tokens: list[int]
    logprobs: list[float]
    prompt: list[float]
    cached: int = field(default=0, compare=False)


def ask(
    llm: Any, prompts: Sequence[list[int]], variants: Sequence[Any] | None = None, **changes: Any
) -> list[Answer]:
    """Greedy answers to prompts of token ids, with log-probabilities of all tokens."""
    from vllm import SamplingParams

    wanted = {"max_tokens": 12, "logprobs": 0, "prompt_logprobs": 0, **changes}
    sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **wanted)
    outs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        sampling,
        lora_request=None if variants is None else list(variants),
        use_tqdm=False,
    )
    return [_answer(out) for out in outs]


def _answer(out: Any) -> Answer:
    tokens = list(out.outputs[0].token_ids)
    chosen = [d[t].logprob for d, t in zip(out.outputs[0].logprobs, tokens, strict=True)]
    ids = out.prompt_token_ids
    read = [d[t].logprob for d, t in zip(out.prompt_logprobs or [], ids, strict=False) if d]
    return Answer(tokens, chosen, read, out.num_cached_tokens or 0)


def request(name: str, number: int, path: Path | str) -> Any:
    """A request's variant."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(path))


def requests(made: zoo_models.Models) -> dict[str, Any]:
    """A request's variant by name; None for the base."""
    numbered = enumerate(made.variants, 1)
    return {"base": None} | {n: request(n, i, made.zoo / n) for i, n in numbered}


def dense_answers(
    made: zoo_models.Models, *, base: bool = True, **options: Any
) -> dict[str, list[Answer]]:
    """What plain vLLM answers with each variant's restored checkpoint, one engine each."""
    found = {}
    for name in (*(["base"] if base else []), *made.variants):
        with plain(made.base if name == "base" else made.dense / name, **options) as llm:
            found[name] = ask(llm, PROMPTS)
    return found


def mixed_answers(
    llm: Any, made: zoo_models.Models, *, only_base: bool = False, **changes: Any
) -> dict[str, list[Answer]]:
    """All prompts to the base and every variant at once; or the same batch, all to the base."""
    variants, names = requests(made), ("base", *made.variants)
    jobs = [(name, prompt) for prompt in PROMPTS for name in names]
    chosen = None if only_base else [variants[name] for name, _ in jobs]
    answers = ask(llm, [p for _, p in jobs], chosen, **changes)
    found: dict[str, list[Answer]] = {name: [] for name in names}
    for (name, _), answer in zip(jobs, answers, strict=True):
        found[name].append(answer)
    return found


def check_equal(
    found: dict[str, list[Answer]], expected: dict[str, list[Answer]], within: float = 1e-4
) -> None:
    """The same tokens, and log-probabilities within a bound."""
    for name, answers in found.items():
        for mine, other in zip(answers, expected[name], strict=True):
            assert mine.tokens == other.tokens, name
            apart = zip(mine.logprobs, other.logprobs, strict=True)
            assert max(abs(a - b) for a, b in apart) < within, name
            if mine.prompt:
                apart = zip(mine.prompt, other.prompt, strict=True)
                assert max(abs(a - b) for a, b in apart) < within, name
