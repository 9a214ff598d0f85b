"""Aliases of a zoo: names that stand for a delta by its digest, in one small file.

An alias is how traffic is moved from one delta to the next under a name that clients keep: it is
pointed at another digest, and whoever asks from then on gets that one. Since it holds a digest, not a
folder's name, a delta that was replaced under its name does not slip in behind it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from deltafold.compress.delta_files import read_manifest
from deltafold.compress.durable import write_atomically
from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.zoo_folder import (
    check_name,
    delta_folders,
    is_delta,
    is_variant,
    open_zoo,
    zoo_lock,
)

ALIASES_NAME: Final = "aliases.json"
_FORMAT: Final = "deltafold-aliases"
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


def read_aliases(zoo: Path) -> dict[str, str]:
    """Alias -> the digest that it stands for; empty where the zoo has none.

    Raises:
        DeltafoldError: `bad-manifest` where the file is not as `docs/format.md` has it.
    """
    path = zoo / ALIASES_NAME
    try:
        data = json.loads(path.read_text("utf-8"))
        sound = data["format"] == _FORMAT and data["version"] == 1
        found = {str(alias): str(digest) for alias, digest in data["aliases"].items()}
        for alias in found:
            check_name(alias)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound, found = False, {}
    if not sound or not all(_DIGEST.fullmatch(digest) for digest in found.values()):
        raise DeltafoldError(
            "bad-manifest",
            f"{path} is no list of aliases.",
            fix="remove it, and set the aliases again: deltafold zoo alias ZOO ALIAS NAME",
        )
    return dict(sorted(found.items()))


def set_alias(zoo: str | Path, alias: str, name: str) -> str:
    """Let an alias stand for the delta that has, or is meant by, a name now; returns its digest.

    Args:
        zoo: the zoo's folder.
        alias: a new name, or an alias that is to stand for something else.
        name: a delta of the zoo, or another alias.

    Raises:
        DeltafoldError: `variant-not-found`; `exists` where a variant has the alias for its name;
            `bad-argument`; or what is wrong with the delta's manifest.
    """
    folder = open_zoo(zoo)
    check_name(alias)
    if is_variant(folder / alias):
        raise DeltafoldError(
            "exists",
            f"{alias} is a variant of the zoo {folder}; an alias needs a name of its own.",
            fix="choose another name",
        )
    with zoo_lock(folder):
        aliases = read_aliases(folder)
        digest = _digest_of(folder, name, aliases)
        write_aliases(folder, {**aliases, alias: digest})
    return digest


def remove_alias(zoo: str | Path, alias: str) -> None:
    """Forget an alias; `variant-not-found` where there is none of that name."""
    folder = open_zoo(zoo)
    with zoo_lock(folder):
        aliases = read_aliases(folder)
        if alias not in aliases:
            raise DeltafoldError(
                "variant-not-found",
                f"the zoo {folder} has no alias {alias!r}.",
                facts=[("aliases", name_some(sorted(aliases)) or "none")],
            )
        write_aliases(folder, {a: d for a, d in aliases.items() if a != alias})


def write_aliases(zoo: Path, aliases: dict[str, str]) -> None:
    """Replace the file; the caller holds the zoo's lock."""
    data = {"format": _FORMAT, "version": 1, "aliases": dict(sorted(aliases.items()))}
    write_atomically(zoo / ALIASES_NAME, json.dumps(data, indent=2) + "\n")


def aliases_lost(zoo: Path, name: str) -> list[str]:
    """The aliases that would stand for nothing without a variant."""
    folder = zoo / name
    if not is_delta(folder):
        return []
    aliases = read_aliases(zoo)
    digest = _peek(folder)
    others = {_peek(other) for other in delta_folders(zoo) if other.name != name}
    return [a for a, d in aliases.items() if d == digest and d not in others]


def _peek(folder: Path) -> str | None:
    try:
        return read_manifest(folder).delta_id
    except DeltafoldError:
        return None


def _digest_of(zoo: Path, name: str, aliases: dict[str, str]) -> str:
    folder = next((f for f in delta_folders(zoo) if f.name == name), None)
    if folder is not None:
        return read_manifest(folder).delta_id
    if name in aliases:
        return aliases[name]
    names = [f.name for f in delta_folders(zoo)]
    raise DeltafoldError(
        "variant-not-found",
        f"the zoo {zoo} has no delta called {name!r}.",
        facts=[("deltas", name_some(names) or "none")],
        fix="a LoRA becomes a delta by: deltafold import-lora BASE LORA -o DELTA",
    )
