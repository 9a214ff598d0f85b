"""The small files beside a model's weights: configuration, tokenizer, chat template, processors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltafold.compress.errors import DeltafoldError

_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".bpe")
_NOT = ("adapter_config.json", "trainer_state.json", "delta_config.json", "base_tensors.json")
_NOT_SUFFIXES = (".index.json",)
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
#: What defines how text becomes tokens, most telling first.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tiktoken.model",
)
_LARGEST = 200 * 2**20


def companion_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that belong to the model besides its weights, sorted.

    Code (`*.py`) is never taken: nothing in a delta repo is executable.
    """
    found = []
    for path in sorted(folder.iterdir()):
        name = path.name
        wanted = name in _LICENCES or path.suffix in _SUFFIXES
        unwanted = name in _NOT or name.endswith(_NOT_SUFFIXES)
        if wanted and not unwanted and path.is_file() and path.stat().st_size <= _LARGEST:
            found.append(path)
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        found += sorted(p for p in templates.glob("*.jinja") if p.is_file())
    return found


def named(folder: Path) -> dict[str, Path]:
    """`companion_files` by their name within the folder."""
    return {p.relative_to(folder).as_posix(): p for p in companion_files(folder)}


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy each file to its name within `folder`."""
    for name, path in files.items():
        copy = folder / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def vocabulary(folder: Path) -> tuple[int | None, bool | None]:
    """By a checkpoint's `config.json`: how many words it knows, and whether its tables are tied.

    None where it does not say.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        text = config.get("text_config") or {}
        words = config.get("vocab_size", text.get("vocab_size"))
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    except (OSError, ValueError, AttributeError):
        return None, None
    return words if isinstance(words, int) else None, tied if isinstance(tied, bool) else None


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder brings a tokenizer of its own."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def is_tokenizer_file(name: str) -> bool:
    """Whether a companion file says how text becomes tokens, chat templates included."""
    starts = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "additional_chat")
    ends = (".model", ".tiktoken", ".spm", ".bpe")
    return name in _VOCABULARIES or name.startswith(starts) or name.endswith(ends)


def check_tokenizer(base: Path, variant: Path, *, accepted: bool) -> bool:
    """Whether the fine-tune's tokenizer makes other tokens than the base's.

    Raises:
        DeltafoldError: `tokenizer-changed` where it does and that was not accepted.
    """
    if not (has_tokenizer(base) and has_tokenizer(variant)):
        return False
    changed = [n for n in _VOCABULARIES if _differs(base / n, variant / n)]
    if changed and not accepted:
        raise DeltafoldError(
            "tokenizer-changed",
            f"the fine-tune in {variant} has another tokenizer than the base in {base}.",
            facts=[("files", ", ".join(changed))],
            fix="if that is meant (added tokens, say), pack with --accept tokenizer: requests to "
            "this variant then use its own",
        )
    return bool(changed)


def _differs(first: Path, second: Path) -> bool:
    # A folder may keep an old format beside tokenizer.json; only what both have is compared.
    if not (first.is_file() and second.is_file()):
        return False
    if first.suffix == ".json":
        return bool(_canonical(first) != _canonical(second))
    return first.read_bytes() != second.read_bytes()


def _canonical(path: Path) -> Any:
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DeltafoldError("not-a-checkpoint", f"{path} is not JSON: {error}.") from error
    if isinstance(data, dict):
        # Set by whoever tokenised last, without effect on which tokens there are.
        data = {k: v for k, v in data.items() if k not in ("truncation", "padding")}
    return data
