"""What a LoRA folder says besides its weights: how it names the base's tensors, and its small files."""

from __future__ import annotations

import json
from pathlib import Path

from deltafold.compress.adapter import Adapter
from deltafold.compress.checkpoint import Checkpoint
from deltafold.compress.companions import has_tokenizer, is_tokenizer_file, named, vocabulary
from deltafold.compress.manifest import BaseNames
from deltafold.compress.naming import NamedBase, prefixes


def adapted_names(adapter: Adapter, base: Checkpoint) -> BaseNames | None:
    """The prefix that an adapter's modules have before the base's names, or lack; None for neither.

    A classifier's adapter says `bert.encoder...` where the bare base says `encoder...`. `model.` is
    left to `LoraSource`, which knows it both ways.
    """
    paths = [f"{path}.weight" for path in adapter.loras]
    if not paths or any(name in base for path in paths for name in spellings(path)):
        return None
    first = paths[0]
    longer = [p for p in prefixes(first) if first.removeprefix(p) in base]
    shorter = [n.removesuffix(first) for n in base.names() if n.endswith(f".{first}")]
    schemes = [BaseNames(change="add", prefix=p) for p in longer]
    schemes += [BaseNames(change="remove", prefix=p) for p in shorter]
    fitting = [s for s in schemes if all(path in NamedBase(base, s) for path in paths)]
    return fitting[0] if len(fitting) == 1 else None


def untied_head(adapter: Adapter, base: NamedBase) -> dict[str, str]:
    """The output layer that an adapter saves though its base ties it to the table of tokens, and that
    table; empty for none. PEFT has trained the two apart then, unless it was told to keep the tie.
    """
    words, tied = vocabulary(base.folder)
    if tied is not True or adapter.ties_weights:
        return {}
    shapes = {name: base.spec(name).shape for name in base.names()}
    tables = [n for n, shape in shapes.items() if len(shape) == 2 and shape[0] == words]
    if len(tables) > 1:  # other matrices may have as many rows by chance
        tables = [n for n in tables if "emb" in n.split(".")[-2:][0] or ".wte." in f".{n}"]
    heads = [
        path
        for path, key in adapter.plain.items()
        if len(tables) == 1
        and not any(name in base for name in spellings(path))
        and adapter.file.entries[key].shape == shapes[tables[0]]
    ]
    return {heads[0]: tables[0]} if len(heads) == 1 else {}


def write_untied(config: Path, out: Path) -> None:
    """A copy of a `config.json` that ties no tables."""
    data = json.loads(config.read_text("utf-8"))
    for part in (data, data.get("text_config")):
        if isinstance(part, dict) and (part is data or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    out.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", "utf-8")


def spellings(path: str) -> tuple[str, ...]:
    """A path, and the same with `model.` put in front or taken away."""
    return path, f"model.{path}", path.removeprefix("model.")


def own_class(base: Path, lora: Path) -> bool:
    """Whether a LoRA folder has a `config.json` that names another class than the base's."""
    names = [_architectures(folder / "config.json") for folder in (base, lora)]
    return bool(names[1]) and names[0] != names[1]


def _architectures(path: Path) -> object:
    try:
        return json.loads(path.read_text("utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError):
        return None


def own_companions(lora: Path) -> dict[str, Path]:
    """What a LoRA folder brings besides its weights: a tokenizer, or a chat template."""
    return {name: path for name, path in named(lora).items() if is_tokenizer_file(name)}


def companions_of(base: Path, lora: Path) -> dict[str, Path]:
    """The base's small files, with the LoRA's tokenizer in place of the base's."""
    found = named(base)
    if has_tokenizer(lora):
        # Never two tokenizers in one folder: which one is read would be chance.
        found = {name: path for name, path in found.items() if not is_tokenizer_file(name)}
    if own_class(base, lora):
        found["config.json"] = lora / "config.json"
    return found | own_companions(lora)
