"""Calibration sets: a file of texts, prompts with completions, chats or token ids, as rows of tokens.

Text becomes tokens by the fine-tune's own tokenizer and chat template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafold.compress.calibration.batches import (
    IGNORED,
    Batch,
    Row,
    in_batches,
    make_row,
    of_one_length,
)
from deltafold.compress.companions import has_tokenizer, vocabulary
from deltafold.compress.errors import DeltafoldError

_FORMS = "text; prompt and completion; messages; or input_ids"


@dataclass(frozen=True)
class CalibrationSet:
    """Rows of tokens for running a model.

    Attributes:
        name: where they come from, as manifests record it: a file's name, or `builtin:NAME`.
        rows: the examples, in order.
        answers: whether some rows have a part (a completion) that alone is to be predicted.
        skipped: rows that were left out: too short, or cut before anything was to be predicted.
    """

    name: str
    rows: tuple[Row, ...]
    answers: bool = False
    skipped: int = 0

    @classmethod
    def from_ids(cls, name: str, ids: Iterable[Sequence[int]]) -> CalibrationSet:
        """A set of rows of token ids, all of whose tokens but the first are to be predicted."""
        return cls(name, tuple(make_row(row) for row in ids))

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.rows))

    @property
    def predicted(self) -> int:
        """Tokens that the model is to predict."""
        return sum(row.predicted for row in self.rows)

    @property
    def sha256(self) -> str:
        """Hex digest of the token ids and labels."""
        total = hashlib.sha256()
        for row in self.rows:
            text = json.dumps([row.ids.tolist(), row.labels.tolist()], separators=(",", ":"))
            total.update(text.encode() + b"\n")
        return total.hexdigest()

    def record(self) -> dict[str, Any]:
        """What a manifest says about the set."""
        return {
            "name": self.name,
            "rows": len(self.rows),
            "tokens": self.tokens,
            "predicted": self.predicted,
            "sha256": self.sha256,
        }

    def batches(self, size: int = 8) -> Iterator[Batch]:
        """Batches in order, padded on the right."""
        return in_batches(self.rows, size)

    def unpadded(self, size: int = 8) -> Iterator[Batch]:
        """Batches of rows of equal length, in an order of their own."""
        return of_one_length(self.rows, size)

    def windows(self, length: int) -> CalibrationSet:
        """The same tokens in rows of up to `length`; rows of which nothing is asked are left out."""
        rows: list[Row] = []
        for row in self.rows:
            for start in range(0, len(row), length):
                labels = row.labels[start : start + length].clone()
                labels[0] = IGNORED
                rows.append(Row(row.ids[start : start + length], labels))
        return CalibrationSet(self.name, tuple(r for r in rows if r.predicted), self.answers)


def read_calibration(
    path: str | Path, model: str | Path, *, rows: int = 64, length: int = 512
) -> CalibrationSet:
    """Read a calibration file.

    A `.jsonl` file holds one JSON object a line, with `text`; `prompt` and `completion`; `messages`
    (roles and contents, for the chat template); or `input_ids`. Of a completion, or an assistant's
    last message, only its own tokens are to be predicted. A `.txt` file is one text, cut into rows.

    Args:
        path: the file.
        model: folder of the fine-tune, for its tokenizer and configuration.
        rows: most rows taken, from the start of the file.
        length: most tokens of a row; the rest is cut off.

    Raises:
        DeltafoldError: `not-found`; `bad-argument` where the file cannot be used, naming the line;
            `missing-extra` without transformers.
    """
    file, folder = Path(path), Path(model)
    if rows < 1 or length < 2:
        raise DeltafoldError("bad-argument", "calibration takes at least one row of two tokens.")
    text = _read(file)
    reader = _Reader(file, folder, length)
    if file.suffix == ".txt":
        found = reader.plain(text, rows)
    elif file.suffix == ".jsonl":
        found = reader.lines(text, rows)
    else:
        raise _unusable(file, "is neither .jsonl nor .txt")
    kept = tuple(row for row in found if row.predicted)
    if not kept:
        raise _unusable(
            file, "holds no row of which anything could be predicted", [("rows read", len(found))]
        )
    words, _ = vocabulary(folder)
    highest = max(int(row.ids.max()) for row in kept)
    lowest = min(int(row.ids.min()) for row in kept)
    if lowest < 0 or (words is not None and highest >= words):
        raise _unusable(
            file,
            "has token ids that the model does not know",
            [("ids", f"{lowest} to {highest}"), ("vocabulary", words)],
        )
    return CalibrationSet(file.name, kept, reader.answers, len(found) - len(kept))


class _Reader:
    """One file on its way to rows; the tokenizer is loaded when text is first met."""

    def __init__(self, file: Path, folder: Path, length: int) -> None:
        self.file, self.folder, self.length = file, folder, length
        self.answers = False
        self._tokenizer: Any = None

    def plain(self, text: str, rows: int) -> list[Row]:
        """Rows of `length` tokens each, the last perhaps shorter."""
        ids = self._tokens(text)
        starts = range(0, len(ids), self.length)[:rows]
        return [make_row(ids[start : start + self.length]) for start in starts]

    def lines(self, text: str, rows: int) -> list[Row]:
        """One row for each of the first lines that are not empty."""
        found: list[Row] = []
        for number, line in enumerate(text.splitlines(), 1):
            if len(found) == rows:
                break
            if line.strip():
                found.append(self._line(line, f"line {number}"))
        return found

    def _line(self, line: str, where: str) -> Row:
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise _unusable(self.file, f"{where} is not JSON ({error})") from error
        if not isinstance(entry, Mapping):
            raise _unusable(self.file, f"{where} is not a JSON object")
        if "input_ids" in entry:
            return self._ids(entry["input_ids"], where)
        if "messages" in entry:
            return self._chat(entry["messages"], where)
        texts = [entry.get(key) for key in ("text", "prompt", "completion")]
        if isinstance(texts[0], str):
            return self._cut(self._tokens(texts[0]))
        if isinstance(texts[1], str) and isinstance(texts[2], str):
            return self._pair(texts[1], texts[2])
        raise _unusable(
            self.file,
            f"{where} has none of the known fields",
            [("found", ", ".join(map(str, entry)) or "nothing"), ("known", _FORMS)],
        )

    def _ids(self, ids: Any, where: str) -> Row:
        # bool is an int to Python, not to us.
        if not isinstance(ids, list) or any(type(i) is not int for i in ids):
            raise _unusable(self.file, f"{where}: input_ids must be a list of whole numbers")
        return self._cut(ids)

    def _pair(self, prompt: str, completion: str) -> Row:
        before = self._tokens(prompt)
        after = self._tokens(completion, special=False)
        end = self._load().eos_token_id
        # Where to stop is part of what a fine-tune has learnt.
        after = after if end is None else [*after, int(end)]
        self.answers = True
        return self._cut([*before, *after], len(before))

    def _chat(self, messages: Any, where: str) -> Row:
        tokenizer = self._load()
        if not getattr(tokenizer, "chat_template", None):
            raise _unusable(
                self.file, f"{where} is a chat, and the tokenizer has no chat template", fix=_PLAIN
            )
        try:
            whole = self._rendered(messages, answer=False)
            answered = messages[-1]["role"] == "assistant"
            before = self._rendered(messages[:-1], answer=True) if answered else []
        except Exception as error:  # templates raise whatever their authors chose
            raise _unusable(
                self.file, f"{where}: the chat template refuses these messages ({error})"
            ) from error
        if before and whole[: len(before)] == before:
            self.answers = True
            return self._cut(whole, len(before))
        return self._cut(whole)

    def _rendered(self, messages: Any, *, answer: bool) -> list[int]:
        text = self._load().apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer
        )
        return self._tokens(text, special=False)

    def _cut(self, ids: Sequence[int], prompt: int = 1) -> Row:
        return make_row(ids[: self.length], prompt)

    def _tokens(self, text: str, *, special: bool = True) -> list[int]:
        return list(self._load()(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _load(self) -> Any:
        if self._tokenizer is None:
            if not has_tokenizer(self.folder):
                raise _unusable(
                    self.file,
                    f"holds text, and {self.folder} has no tokenizer",
                    fix='give rows of token ids: {"input_ids": [1, 2, 3]}',
                )
            try:
                from transformers import AutoTokenizer
            except ImportError as error:
                raise needs_transformers() from error
            self._tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        return self._tokenizer


_PLAIN = "give texts, or prompts with completions, in place of messages"


def needs_transformers() -> DeltafoldError:
    """The error for calibration without transformers."""
    return DeltafoldError(
        "missing-extra",
        "calibration runs the model, which needs transformers.",
        fix="pip install 'deltafold[hf]'",
    )


def _read(file: Path) -> str:
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise DeltafoldError("not-found", f"{file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise _unusable(file, "is not UTF-8 text") from error
    if not text.strip():
        raise _unusable(file, "is empty")
    return text


def _unusable(
    file: Path,
    why: str,
    facts: Sequence[tuple[str, object]] = (),
    fix: str = f"one JSON object a line, with {_FORMS}; or plain text in a .txt file",
) -> DeltafoldError:
    return DeltafoldError(
        "bad-argument", f"the calibration file {file}: {why}.", facts=facts, fix=fix
    )
