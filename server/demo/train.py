"""Trains the demo's models from nothing: one tiny base and five full fine-tunes of it.

Everything is seeded, and the number of threads is fixed while training, so that one machine makes
the same checkpoints every time. Training is in float32; checkpoints are saved in bfloat16, and
what `evaluate` measures is what was saved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.quiet import quiet
from deltafold.server.demo import tasks
from deltafold.server.demo.tokenizer import CONTEXT_TOKENS, build_tokenizer, prompt_of

#: Receives one line of text at a time.
Progress: TypeAlias = Callable[[str], None]

#: Folder of the base's checkpoint; a variant's folder is called like its task.
BASE_FOLDER: Final = "base"

#: Words that a finished checkpoint is measured on, none of them seen in training.
EVALUATION_WORDS: Final = 500

_THREADS: Final = 1
_IGNORED: Final = -100  # the label that cross_entropy skips


@dataclass(frozen=True, slots=True)
class Schedule:
    """How one model is trained.

    Attributes:
        steps: optimizer steps.
        batch: words in one step.
        lr: peak learning rate; a cosine takes it to zero.
        warmup: steps of linear warm-up.
        weight_decay: zero in fine-tuning, which would shrink every tensor and swell the delta.
        seed: of the words, and of the weights where they are new.
    """

    steps: int
    batch: int = 96
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.0
    seed: int = 0


BASE_SCHEDULE: Final = Schedule(steps=500, lr=3e-3, warmup=50, weight_decay=0.05, seed=1)
VARIANT_SCHEDULES: Final[dict[str, Schedule]] = {
    "shout": Schedule(steps=200, seed=2),
    "reverse": Schedule(steps=400, seed=3),
    "rot13": Schedule(steps=200, seed=4),
    "no-vowels": Schedule(steps=300, seed=5),
    "title": Schedule(steps=200, seed=6),
}


@dataclass(frozen=True, slots=True)
class Trained:
    """What came out of one training run.

    Attributes:
        folder: the saved checkpoint.
        exact_match: of the saved checkpoint on held-out words of its own task.
        losses: one for each step.
    """

    folder: Path
    exact_match: float
    losses: tuple[float, ...]


def _quiet(line: str) -> None:
    """The progress callback of callers that want none."""


def train_base(
    out: Path, schedule: Schedule = BASE_SCHEDULE, progress: Progress = _quiet
) -> Trained:
    """Train the base from random weights and save its checkpoint in the folder `out`."""
    with _reproducible(schedule.seed):
        model = _new_model()
        losses = _train(model, tasks.BASE_TASK, schedule, progress)
        return _finish(model, tasks.BASE_TASK, out, losses, progress)


def train_variant(
    base: Path,
    task: str,
    out: Path,
    schedule: Schedule | None = None,
    progress: Progress = _quiet,
) -> Trained:
    """Fine-tune every tensor of the checkpoint `base` on `task` and save it in the folder `out`."""
    tasks.apply(task, "word")  # refuses an unknown task before any work
    chosen = schedule if schedule is not None else VARIANT_SCHEDULES[task]
    model, _ = load(base)
    with _reproducible(chosen.seed):
        losses = _train(model, task, chosen, progress)
        return _finish(model, task, out, losses, progress)


def retrain(out_folder: Path, progress: Progress = _quiet) -> dict[str, Trained]:
    """Train the base and the five variants into folders of `out_folder`; results by folder name."""
    base = out_folder / BASE_FOLDER
    results = {BASE_FOLDER: train_base(base, progress=progress)}
    for task in tasks.VARIANT_TASKS:
        results[task] = train_variant(base, task, out_folder / task, progress=progress)
    return results


def load(folder: Path) -> tuple[Any, Any]:
    """A saved checkpoint in float32, in evaluation mode, and its tokenizer."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    if not (folder / "config.json").is_file():  # the loader would look for it on the hub
        raise DeltafoldError("not-a-checkpoint", f"{folder} holds no demo model: no config.json")
    with quiet():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def evaluate(model: Any, tokenizer: Any, task: str, words: Sequence[str]) -> float:
    """Share of `words` that the model answers exactly right under greedy decoding."""
    right = 0
    # Prompts of one length need no padding, so nothing depends on how a model treats it.
    for _, same_length in itertools.groupby(sorted(words, key=len), key=len):
        batch = list(same_length)
        answers = _greedy(model, tokenizer, [prompt_of(word) for word in batch])
        right += sum(tasks.apply(task, w) == a for w, a in zip(batch, answers, strict=True))
    return right / max(len(words), 1)


def _greedy(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Greedy answers to prompts of equal length, without their end marks."""
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in prompts], device=device)
    start = ids.shape[1]
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(tasks.MAX_LETTERS + 1):
        following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
        following = following.masked_fill(ended, tokenizer.eos_token_id)
        ids = torch.cat([ids, following[:, None]], dim=1)
        ended |= following == tokenizer.eos_token_id
        if bool(ended.all()):
            break
    return [_answer_text(tokenizer, row) for row in ids[:, start:].tolist()]


def _answer_text(tokenizer: Any, ids: list[int]) -> str:
    """The text before the first end mark; one that never ends keeps all of its letters."""
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return str(tokenizer.decode(ids[:end]))


def _new_model() -> Any:
    """Random weights. All sizes are multiples of 32, and the head is not tied to the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def _train(model: Any, task: str, schedule: Schedule, progress: Progress) -> list[float]:
    """Run the schedule on the model in place; the loss of every step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.98)
    )
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, schedule))
    examples = _examples(task, schedule.seed)
    losses: list[float] = []
    model.train()
    for step in range(schedule.steps):
        ids, labels = _batch(list(itertools.islice(examples, schedule.batch)))
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == schedule.steps:
            progress(f"{task}: step {step + 1}/{schedule.steps}, loss {losses[-1]:.4f}")
    model.eval()
    return losses


def _lr_factor(step: int, schedule: Schedule) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(schedule.steps - schedule.warmup, 1)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _examples(task: str, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Endless pairs of a prompt's and its answer's token ids."""
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    for word in tasks.words("train", seed):
        prompt = [tokenizer.bos_token_id, *(ids[c] for c in prompt_of(word))]
        yield prompt, [*(ids[c] for c in tasks.apply(task, word)), tokenizer.eos_token_id]


def _batch(examples: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, padded on the right; only answers are labelled."""
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(ids, _IGNORED)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def _finish(model: Any, task: str, out: Path, losses: list[float], progress: Progress) -> Trained:
    """Save the checkpoint, read it back and measure what was saved."""
    _save(model, out)
    saved, tokenizer = load(out)
    words = tasks.held_out_words(EVALUATION_WORDS)
    score = evaluate(saved, tokenizer, task, words)
    progress(f"{task}: {score:.1%} of {len(words)} unseen words answered exactly right")
    return Trained(folder=out, exact_match=score, losses=tuple(losses))


def _save(model: Any, out: Path) -> None:
    """An ordinary checkpoint folder: bfloat16 weights, both configurations, the tokenizer."""
    from transformers import GenerationConfig

    tokenizer = build_tokenizer()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with quiet():
        model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed torch and fix its threads, and put both back as they were.

    The number of threads decides the order of float sums, hence the last bits of every weight. One
    thread is the number that every machine has, and the only one that a busy machine does not slow
    down out of proportion: matrices this small gain little from a second.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
