"""Each variant's own way from prompts to token ids and back.

A fine-tune may bring added tokens, another chat template, or other end-of-sequence tokens, so
nothing of that is taken from the base where the variant's folder has its own. Most fine-tunes bring
a copy of the base's tokenizer; equal files are loaded once.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.embedded.stream import Decode
from deltafold.runtime.engine import Message, Prompt

#: Files that decide which ids a text becomes; one of `_VOCABULARIES` must be there.
_VOCABULARIES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
_TOKENIZER_FILES: Final = (
    *_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)
_TEMPLATE_FILES: Final = ("chat_template.jinja", "chat_template.json")
#: Front ends kept ready; loading one again takes about a second.
_KEPT: Final = 256


class TextFront:
    """A variant's tokenizer, chat template and end tokens. Without a tokenizer only ids work.

    Attributes:
        eos: token ids that end an output.
        vocabulary: number of token ids the variant knows, or None where its folder does not say.
    """

    def __init__(
        self, name: str, tokenizer: Any | None, eos: frozenset[int], vocabulary: int | None
    ) -> None:
        self.name = name
        self.eos = eos
        self.vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        self._anchor: tuple[list[int], str] | None = None

    @property
    def opening(self) -> tuple[int, ...]:
        """Tokens with which a tokenizer for transcripts opens them (language, task)."""
        return tuple(getattr(self._tokenizer, "prefix_tokens", None) or ())

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            DeltafoldError: `bad-argument` for an empty prompt, messages that cannot be rendered,
                or text without a tokenizer.
        """
        if isinstance(prompt, str):
            ids = self._encode_text(prompt, special=True)
        elif not isinstance(prompt, Sequence):
            raise _bad(f"a prompt must be text, token ids or messages, not {type(prompt).__name__}")
        elif all(isinstance(x, Mapping) for x in prompt) and prompt:
            ids = self._encode_text(self._render(prompt), special=False)  # type: ignore[arg-type]
        else:
            ids = [_token_id(x) for x in prompt]
        if not ids:
            raise _bad("the prompt is empty")
        return ids

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int] | None]:
        """Token ids of two texts as one input, and of which text each is (None: not told apart)."""
        found = self._need_tokenizer()(first, second)
        types = found.get("token_type_ids")
        return list(found["input_ids"]), None if types is None else list(types)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; empty without a tokenizer."""
        return self._decode(token_ids, skip_special=True)

    @property
    def decoder(self) -> Decode:
        """`decode` as a plain function, for a `Detokenizer`."""
        return self.decode

    def piece(self, token_id: int) -> str:
        """One token as it looks inside a text, its leading space included."""
        known = self._pieces.get(token_id)
        if known is None:
            known = self._pieces[token_id] = self._piece(token_id)
        return known

    def _piece(self, token_id: int) -> str:
        # Some decoders drop a text's leading space, so the token is shown to them behind another.
        if self._anchor is None:
            before = self._encode_text("a", special=False)[-1:] if self._tokenizer else []
            self._anchor = (before, self._decode(before, skip_special=False))
        ids, shown = self._anchor
        text = self._decode([*ids, token_id], skip_special=False)
        if text.startswith(shown):
            return text[len(shown) :]
        return self._decode([token_id], skip_special=False)

    def _decode(self, token_ids: Sequence[int], *, skip_special: bool) -> str:
        if self._tokenizer is None or not token_ids:
            return ""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return text

    def _encode_text(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self._need_tokenizer().encode(text, add_special_tokens=special)
        return ids

    def _need_tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise _bad(f"{self.name} has no tokenizer, so its prompts must be token ids")
        return self._tokenizer

    def _render(self, messages: Sequence[Message]) -> str:
        tokenizer = self._need_tokenizer()
        if not tokenizer.chat_template:
            raise DeltafoldError(
                "bad-argument",
                f"{self.name} has no chat template, so it cannot take messages.",
                fix="send a plain prompt, or add chat_template.jinja to the model's folder",
            )
        plain = [_flatten(m, i) for i, m in enumerate(messages)]
        try:
            text: str = tokenizer.apply_chat_template(
                plain, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template is a program of the model's author
            raise _bad(f"the chat template of {self.name} refused the messages: {error}") from error
        return text


def _token_id(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _bad(f"a prompt of token ids holds {value!r}")
    return int(value.__index__())


def _flatten(message: Message, index: int) -> dict[str, Any]:
    """A message whose content is one text."""
    content = message.get("content")
    if "role" not in message:
        raise _bad(f"message {index} has no role")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part_text(part, index) for part in content)
    elif content is not None and not isinstance(content, str):
        raise _bad(f"message {index}: content must be text or a list of text parts")
    return {**message, "content": content}


def _part_text(part: Any, index: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise _bad(f"message {index}: content parts must be text, not {kind!r}")


def _bad(message: str) -> DeltafoldError:
    return DeltafoldError("bad-argument", f"{message}.")


class TextFronts:
    """The front of every variant in use, by the variant's digest. Thread-safe."""

    def __init__(self, base_name: str, base_folder: Path) -> None:
        self._base_name = base_name
        self._base_folder = base_folder
        self._lock = threading.Lock()
        self._fronts: OrderedDict[str, TextFront] = OrderedDict()
        self._tokenizers: dict[str, Any] = {}

    def known(self, digest: str) -> TextFront | None:
        """The front that `get` has made, if it is still kept."""
        with self._lock:
            return self._fronts.get(digest)

    def base(self) -> TextFront:
        """The base's own front."""
        return self.get("", self._base_name, self._base_folder)

    def get(self, digest: str, name: str, folder: Path) -> TextFront:
        """The front of one variant, made on first use. Reads from disk, so not for a hot loop."""
        with self._lock:
            front = self._fronts.get(digest)
            if front is None:
                front = self._fronts[digest] = self._load(name, folder)
                while len(self._fronts) > _KEPT:
                    self._forget_oldest()
            self._fronts.move_to_end(digest)
            return front

    def _forget_oldest(self) -> None:
        self._fronts.popitem(last=False)
        used = {id(f._tokenizer) for f in self._fronts.values()}
        self._tokenizers = {k: t for k, t in self._tokenizers.items() if id(t) in used}

    def _load(self, name: str, folder: Path) -> TextFront:
        own = next((f for f in (folder, self._base_folder) if has_tokenizer(f)), None)
        tokenizer = self._tokenizer(own) if own else None
        eos = _eos(folder) or _eos(self._base_folder)
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            eos |= {int(tokenizer.eos_token_id)}
        return TextFront(name, tokenizer, eos, _vocabulary(folder))

    def _tokenizer(self, folder: Path) -> Any:
        key = content_key(folder) + template_key(folder)
        if key not in self._tokenizers:
            # transformers takes seconds to import; only engines that meet text need this part.
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            # The first call may settle padding and truncation inside; later ones only read, so
            # that threads can share the tokenizer.
            tokenizer.encode("a", add_special_tokens=True)
            self._tokenizers[key] = tokenizer
        return self._tokenizers[key]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's files."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def content_key(folder: Path) -> str:
    """A hash of everything that shapes the tokenizer but its chat template."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        path = folder / name
        if not path.is_file():
            continue
        content = path.read_bytes()
        if name == "tokenizer_config.json":
            settings = json.loads(content)
            settings.pop("chat_template", None)
            content = json.dumps(settings, sort_keys=True).encode()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def template_key(folder: Path) -> str:
    """A hash of a tokenizer's chat template, wherever it is kept."""
    digest = hashlib.sha256()
    for name in _TEMPLATE_FILES:
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    inline = read_json(folder / "tokenizer_config.json").get("chat_template")
    digest.update(json.dumps(inline).encode())
    return digest.hexdigest()


def _eos(folder: Path) -> frozenset[int]:
    """End tokens by the generation config, or else by the model's config."""
    for name in ("generation_config.json", "config.json"):
        config = read_json(folder / name)
        value = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
        if value is not None:
            return frozenset(int(v) for v in (value if isinstance(value, list) else [value]))
    return frozenset()


def _vocabulary(folder: Path) -> int | None:
    config = read_json(folder / "config.json")
    value = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return None if value is None else int(value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
