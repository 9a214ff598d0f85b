"""Every variant's own tokenizer, chat template and end tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.embedded import EmbeddedEngine
from deltafold.runtime.embedded.stream import Detokenizer
from deltafold.runtime.embedded.text import TextFront, TextFronts
from deltafold.runtime.engine import Request, Sampling

CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    pico.config_files(folder, eos=2)
    pico.tokenizer(folder)
    return folder


@pytest.fixture
def front(base: Path) -> TextFront:
    return TextFronts("pico", base).base()


@pytest.mark.parametrize("text", ["hello world", "naïve café", "日本語 🎉🎉 text", "\n\n  a  b"])
def test_text_survives_token_by_token(text: str, front: TextFront) -> None:
    ids = front.encode(text)
    assert front.decode(ids) == text
    made = Detokenizer(front.decoder)
    parts = [made.push(i) for i in ids]
    assert "".join(parts) + made.flush() == text
    assert not any("\ufffd" in p for p in parts)
    assert "".join(front.piece(i) for i in front.encode("the cat sat")) == "the cat sat"


def test_special_tokens_are_not_text(front: TextFront) -> None:
    ids = [1, *front.encode("hello"), 2]
    assert front.decode(ids) == "hello"
    assert front.piece(2) == "<eos>"


def test_chat_messages_are_rendered_once(front: TextFront) -> None:
    expected = [1, *front.encode("user: hello\nassistant:")]
    assert front.encode(CHAT) == expected
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert front.encode([{"role": "user", "content": parts}]) == expected


@pytest.mark.parametrize(
    "messages",
    [
        [{"content": "hello"}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    ],
)
def test_messages_that_cannot_be_rendered(messages: list[object], front: TextFront) -> None:
    with pytest.raises(DeltafoldError) as caught:
        front.encode(messages)  # type: ignore[arg-type]
    assert caught.value.code == "bad-argument"


def test_a_missing_chat_template_is_named(tmp_path: Path) -> None:
    pico.config_files(tmp_path)
    pico.tokenizer(tmp_path, chat=False)
    with pytest.raises(DeltafoldError, match="chat template") as caught:
        TextFronts("pico", tmp_path).base().encode(CHAT)
    assert caught.value.code == "bad-argument"


def test_a_template_that_raises_is_the_requests_fault(base: Path) -> None:
    made = pico.tokenizer(base)
    made.chat_template = "{{ raise_exception('roles must alternate') }}"
    made.save_pretrained(base)
    with pytest.raises(DeltafoldError, match="roles must alternate"):
        TextFronts("pico", base).base().encode(CHAT)


def test_a_variant_uses_its_own_files_and_falls_back_to_the_bases(
    base: Path, tmp_path: Path
) -> None:
    fronts = TextFronts("pico", base)
    own = tmp_path / "own"
    pico.config_files(own, vocabulary=400, eos=[5, 6])
    made = pico.tokenizer(own)
    made.add_tokens(["<extra>"], special_tokens=True)
    made.chat_template = "{{ messages[0]['content'] }}<extra>"
    made.save_pretrained(own)
    bare = tmp_path / "bare"
    bare.mkdir()

    mine = fronts.get("sha256:own", "own", own)
    assert mine.encode(CHAT)[-1] == made.convert_tokens_to_ids("<extra>")
    assert mine.eos == {5, 6, 2}
    assert mine.vocabulary == 400
    theirs = fronts.get("sha256:bare", "bare", bare)
    assert theirs.encode(CHAT) == fronts.base().encode(CHAT)
    assert theirs.eos == {2}
    assert theirs.vocabulary is None


def test_equal_tokenizers_are_loaded_once(base: Path, tmp_path: Path) -> None:
    fronts = TextFronts("pico", base)
    made = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        for file in base.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": len(made) + 7}))
        made.append(fronts.get(name, name, folder))
    assert made[0]._tokenizer is made[1]._tokenizer is fronts.base()._tokenizer
    assert made[0].eos == {7, 2}
    assert made[1].eos == {8, 2}
    assert fronts.known("one") is made[0]
    assert fronts.known("three") is None


def test_without_a_tokenizer_only_ids_work(tmp_path: Path) -> None:
    front = TextFronts("pico", tmp_path).base()
    assert front.encode([4, 5]) == [4, 5]
    assert front.decode([4, 5]) == front.piece(4) == ""
    for prompt in ("text", CHAT):
        with pytest.raises(DeltafoldError, match="no tokenizer"):
            front.encode(prompt)


# Through the engine.


def test_stop_strings_across_tokens(base: Path) -> None:
    """Whatever text the model writes, cutting it at a stop string equals stopping there."""
    model = pico.llama()
    host = pico.PicoHost(model, base, ["a"])
    with EmbeddedEngine(model, host) as engine:

        def run(**sampling: object) -> pico.Watch:
            watch = pico.Watch()
            settings = Sampling(max_tokens=60, temperature=1.0, seed=3, **sampling)  # type: ignore[arg-type]
            engine.submit(Request("a", "the cat", settings), watch)
            watch.wait()
            return watch

        whole = run()
        assert whole.text == engine.decode("a", whole.tokens)
        parts = [whole.text[i : i + 5] for i in range(10, 40)]
        stop = next(p for i, p in enumerate(parts, 10) if whole.text.index(p) == i)
        stopped = run(stop=("never there", stop))
        assert stopped.chunks[-1].finish_reason == "stop"
        assert stopped.text == whole.text.partition(stop)[0]
        assert stopped.tokens == whole.tokens[: len(stopped.tokens)]
        assert len(stopped.tokens) < len(whole.tokens)


def test_encode_and_decode_belong_to_the_variant(base: Path) -> None:
    host = pico.PicoHost(pico.llama(), base, ["a"])
    pico.config_files(base / "a")
    made = pico.tokenizer(base / "a")
    made.add_tokens(["the cat"])
    made.save_pretrained(base / "a")
    with EmbeddedEngine(host.model, host) as engine:
        assert engine.base_name == "pico"
        assert len(engine.encode("a", "the cat")) < len(engine.encode("base", "the cat"))
        assert engine.decode("a", engine.encode("a", "the cat")) == "the cat"
        assert [v.name for v in engine.variants()] == ["pico", "a"]
        assert engine.resolve("base").parent is None
        output = next(iter(engine.generate([Request("a", CHAT, Sampling(max_tokens=5))])))
        assert output.text == engine.decode("a", output.token_ids)
        assert output.digest == "sha256:a"
        assert output.prompt_tokens == len(engine.encode("a", CHAT))
    assert not +host.held
