"""What a delta repo tells people: the model card, and a table of its tensors."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import yaml

from deltafold.compress.encode import TensorStats
from deltafold.compress.hub import Reference
from deltafold.compress.manifest import Manifest


def write_tensor_table(folder: Path, manifest: Manifest, stats: Mapping[str, TensorStats]) -> None:
    """`report/tensors.csv`: a line a coded tensor."""
    path = folder / "report" / "tensors.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(
            ["tensor", "shape", "dtype", "terms", "bytes", "rel_error"]  # noqa: RUF005
            + ["mean_abs_delta", "max_abs_delta", "delta_over_base", "changed"]
        )
        for name, entry in manifest.tensors.items():
            s = stats[name]
            terms = "+".join(str(t["id"]) for t in entry.terms)
            shape = "x".join(map(str, entry.shape))
            numbers = [s.error, s.mean_abs, s.max_abs, s.relative, s.changed]
            table.writerow(
                [name, shape, entry.dtype, terms, entry.bytes, *(f"{n:.6g}" for n in numbers)]
            )


def write_card(folder: Path, manifest: Manifest, base: Reference) -> None:
    """`README.md`, as `card_text` has it."""
    (folder / "README.md").write_text(card_text(manifest), "utf-8")


def card_text(manifest: Manifest) -> str:
    """The model card: the Hugging Face head, how to use the delta, sizes, quality, recipe, command."""
    head = {
        "base_model": [manifest.base.name],
        "base_model_relation": "adapter" if _is_lora(manifest) else "quantized",
        "library_name": "deltafold",
        "tags": ["delta", "deltafold", *sorted({f"codec-{c}" for c in _codecs(manifest)})],
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{_body(manifest)}"


def _is_lora(manifest: Manifest) -> bool:
    return manifest.codec_summary() == "lora"


def _shared(manifest: Manifest) -> str:
    family = manifest.recipe.get("family")
    if not family:
        return ""
    members = ", ".join(family["members"])
    place = f".families/{str(family['id']).removeprefix('sha256:')}"
    return f"""It shares {family["bytes"]:,} more bytes with other deltas ({members}). They lie in
`{place}` beside this folder, and must go along with it: beside it again, or inside it.

"""


def _codecs(manifest: Manifest) -> set[str]:
    return {str(term["id"]) for e in manifest.tensors.values() for term in e.terms}


def _body(manifest: Manifest) -> str:
    totals = manifest.totals
    name = manifest.base.name + (f"@{manifest.base.revision}" if manifest.base.revision else "")
    by_codec: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for entry in manifest.tensors.values():
        key = "+".join(str(t["id"]) for t in entry.terms)
        by_codec[key][0] += 1
        by_codec[key][1] += entry.bytes
    rows = "\n".join(
        f"| {key} | {count} | {size:,} |" for key, (count, size) in sorted(by_codec.items())
    )
    worst = max((e.rel_error for e in manifest.tensors.values()), default=0.0)
    kind = "A LoRA" if _is_lora(manifest) else "A full fine-tune"
    if "merge" in manifest.recipe:
        kind = "A merge of fine-tunes"
    recipe = yaml.safe_dump(manifest.recipe, sort_keys=False).strip()
    return f"""# {manifest.variant.name}, as a delta against {manifest.base.name}

{kind} in {totals.delta_bytes:,} bytes, {totals.ratio:.1%} of its {totals.variant_bytes:,}
bytes of weights. It needs its base, `{name}`, whose content it knows by fingerprint
(`{manifest.base.fingerprint}`).

```
deltafold serve {name} --zoo FOLDER_THAT_HOLDS_THIS_ONE
deltafold restore THIS_FOLDER --base {name} -o CHECKPOINT
```

{_shared(manifest)}## What is stored

| term | tensors | bytes |
|---|---|---|
{rows or "| none | 0 | 0 |"}

{len(manifest.unchanged)} tensors are equal to the base's and cost nothing. The largest relative error
of a tensor's delta is {worst:.4f}; `report/tensors.csv` has them all. This says how closely the
weights follow the fine-tune's, not how well the model answers.
{_quality(manifest)}
## How it was made

By {manifest.created_by}{f": `{manifest.command}`" if manifest.command else ""}, with the recipe

```yaml
{recipe}
```
"""


#: Figures of `manifest.quality` that the card shows, and what they are.
_FIGURES: Final = {
    "kl_mean": "KL divergence to the fine-tune, nats a token",
    "top1_agreement": "same likeliest token as the fine-tune",
    "loss": "loss",
    "reference_loss": "loss of the fine-tune",
    "perplexity": "perplexity",
    "reference_perplexity": "perplexity of the fine-tune",
}


def _quality(manifest: Manifest) -> str:
    found = {k: manifest.quality[k] for k in _FIGURES if k in manifest.quality}
    if not found:
        return ""
    rows = "\n".join(f"| {_FIGURES[key]} | {value:.4g} |" for key, value in found.items())
    data = manifest.quality.get("data", {})
    where = f"{data.get('name', '?')}, {manifest.quality.get('tokens', '?')} tokens"
    return f"""
## Quality

Measured beside the fine-tune itself on {where}. It says nothing about other data.

| figure | value |
|---|---|
{rows}
"""
