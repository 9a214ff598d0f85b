"""The demo's tasks, tokenizer and training, without a full training run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.server.demo import tasks, train
from deltafold.server.demo.tokenizer import VOCABULARY, build_tokenizer, prompt_of

SHORT = train.Schedule(steps=10, batch=32, lr=3e-3, warmup=2, seed=1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module", autouse=True)
def few_words() -> Iterator[None]:
    """Models trained for a few steps end no answer early, and are slow to measure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "EVALUATION_WORDS", 40)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> train.Trained:
    return train.train_base(tmp_path_factory.mktemp("demo") / "base", SHORT)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("repeat", "hello"),
        ("shout", "HELLO"),
        ("reverse", "olleh"),
        ("rot13", "uryyb"),
        ("no-vowels", "hll"),
        ("title", "Hello"),
    ],
)
def test_every_task_answers_in_its_own_way(task: str, answer: str) -> None:
    assert tasks.apply(task, "hello") == answer


def test_an_unknown_task_is_refused_with_the_known_ones_named() -> None:
    with pytest.raises(DeltafoldError, match="no task 'whisper'") as caught:
        tasks.apply("whisper", "hello")
    assert "no-vowels" in str(caught.value)


def test_words_are_repeatable_well_formed_and_of_their_split() -> None:
    first, again, other = (
        list(itertools.islice(tasks.words("train", seed), 500)) for seed in (3, 3, 4)
    )
    assert first == again != other
    for word in first:
        assert tasks.MIN_LETTERS <= len(word) <= tasks.MAX_LETTERS
        assert set(word) <= set(tasks.LETTERS)
        assert tasks.split_of(word) == "train"
        assert tasks.apply("no-vowels", word) not in ("", word)


def test_held_out_words_are_different_and_never_trained_on() -> None:
    held_out = tasks.held_out_words(300)
    assert len(set(held_out)) == 300
    assert tasks.held_out_words(300) == held_out
    trained = set(itertools.islice(tasks.words("train", seed=1), 20_000))
    assert trained.isdisjoint(held_out)


def test_no_variant_answers_like_the_base_or_like_another() -> None:
    for word in ("hello", "banana", "tarrip"):
        answers = [tasks.apply(task, word) for task in ("repeat", *tasks.VARIANT_TASKS)]
        assert len(set(answers)) == len(answers)


def test_tokens_are_characters_and_go_both_ways(tokenizer: Any) -> None:
    assert len(tokenizer) == len(VOCABULARY) == 64
    ids = tokenizer("Hello, you>")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len("Hello, you>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello, you>"
    assert tokenizer.unk_token_id in tokenizer("h\u00e9llo\n")["input_ids"]


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in tmp_path.iterdir()}
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("hello>")["input_ids"] == tokenizer("hello>")["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    specials = ("pad_token_id", "bos_token_id", "eos_token_id", "padding_side")
    assert all(getattr(loaded, name) == getattr(tokenizer, name) for name in specials)


@pytest.mark.parametrize(
    "earlier",
    [
        [],
        [{"role": "system", "content": "be kind"}],
        [{"role": "user", "content": "zebra"}, {"role": "assistant", "content": "ZEBRA"}],
    ],
)
def test_a_chat_renders_to_the_completion_prompt(
    tokenizer: Any, earlier: list[dict[str, str]]
) -> None:
    chat = [*earlier, {"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.bos_token + prompt_of("hello")
    rendered = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert rendered == tokenizer(prompt_of("hello"))["input_ids"]


def test_an_answer_that_was_begun_can_be_continued(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "HEL"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert text == "<bos>hello>HEL"


def test_a_few_steps_lower_the_loss(base: train.Trained) -> None:
    assert len(base.losses) == SHORT.steps
    assert sum(base.losses[-3:]) < 0.9 * sum(base.losses[:3])


def test_training_is_repeatable_bit_for_bit(base: train.Trained, tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    again = train.train_base(tmp_path / "again", SHORT)
    assert again.losses == base.losses
    weights = "model.safetensors"
    assert (again.folder / weights).read_bytes() == (base.folder / weights).read_bytes()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_a_variant_is_a_full_fine_tune_in_an_ordinary_checkpoint(
    base: train.Trained, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    lines: list[str] = []
    schedule = train.Schedule(steps=3, batch=16, lr=1e-2, warmup=1, seed=2)
    variant = train.train_variant(
        base.folder, "shout", tmp_path / "shout", schedule, progress=lines.append
    )
    before = load_file(base.folder / "model.safetensors")
    after = load_file(variant.folder / "model.safetensors")
    assert before.keys() == after.keys() >= {"lm_head.weight", "model.embed_tokens.weight"}
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16
        assert not torch.equal(weight, before[name]), name
    assert (variant.folder / "generation_config.json").is_file()
    assert [line.split(":")[0] for line in lines] == ["shout", "shout"]


class _Scripted(torch.nn.Module):
    """Answers every prompt with the same tokens."""

    def __init__(self, answer: list[int], prompt_length: int) -> None:
        super().__init__()
        self.head = torch.nn.Parameter(torch.eye(len(VOCABULARY)))
        self.answer, self.prompt_length = answer, prompt_length

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        token = self.answer[input_ids.shape[1] - self.prompt_length]
        logits = self.head[token].expand(*input_ids.shape, -1)
        return type("Output", (), {"logits": logits})


def test_evaluation_counts_exact_answers_only(tokenizer: Any) -> None:
    answer = tokenizer("HELLO<eos>", add_special_tokens=False)["input_ids"]
    model = _Scripted(answer, prompt_length=len(tokenizer(prompt_of("hello"))["input_ids"]))
    assert train.evaluate(model, tokenizer, "shout", ["hello", "world"]) == 0.5
    assert train.evaluate(model, tokenizer, "shout", []) == 0.0


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeltafoldError, match="no demo model"):
        train.train_variant(tmp_path / "nowhere", "shout", tmp_path / "shout")
