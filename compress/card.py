"""What a delta repo tells people: the model card with its pictures, and a table of its tensors."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from deltafold.compress.coded import TensorStats
from deltafold.compress.hub import Reference
from deltafold.compress.licences import licence_of
from deltafold.compress.manifest import Manifest
from deltafold.compress.pictures import bars, bytes_by_kind, error_map
from deltafold.compress.sizes import human

#: Pictures that a card shows where they are there: file in `report/` -> what it says.
_PICTURES: Final = {
    "bytes.svg": "where the bytes go",
    "error.svg": "what the codec misses, by layer and projection",
    "frontier.svg": "what other sizes would have given",
}
#: Figures of `manifest.quality` that the card shows, and what they are.
_FIGURES: Final = {
    "kl_mean": "KL divergence to the fine-tune, nats a token",
    "top1_agreement": "same likeliest token as the fine-tune",
    "loss": "loss",
    "reference_loss": "loss of the fine-tune",
    "perplexity": "perplexity",
    "reference_perplexity": "perplexity of the fine-tune",
}


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


def write_card(
    folder: Path, manifest: Manifest, base: Reference, *, variant: Path | None = None
) -> None:
    """`README.md` and the pictures that it shows, in `report/`.

    Args:
        folder: the delta repo, all of its other files being there.
        manifest: its manifest.
        base: not needed any more.
        variant: the fine-tune's folder, whose card or licence file names the licence.
    """
    report = folder / "report"
    report.mkdir(exist_ok=True)
    size = human(manifest.totals.delta_bytes)
    drawn = {
        "bytes.svg": bars({"delta": bytes_by_kind(manifest)}, title=f"Where the {size} go"),
        "error.svg": error_map(manifest),
    }
    for name, picture in drawn.items():
        if picture is not None:
            (report / name).write_text(picture, "utf-8")
    (folder / "README.md").write_text(card_text(manifest, folder, variant=variant), "utf-8")


def card_text(
    manifest: Manifest, folder: Path | None = None, *, variant: Path | None = None
) -> str:
    """The model card.

    Args:
        manifest: all that it tells but for what follows.
        folder: the delta repo: its pictures are shown, and the licence of the card that is there now
            is kept.
        variant: the fine-tune's folder, whose licence it is.
    """
    head: dict[str, Any] = {
        "base_model": [manifest.base.name],
        "base_model_relation": "adapter" if _is_lora(manifest) else "quantized",
        "library_name": "deltafold",
        "tags": ["delta", "deltafold", *sorted({f"codec-{c}" for c in _codecs(manifest)})],
    }
    for place in (variant, folder):
        licence = licence_of(place) if place is not None else {}
        if licence:
            head |= licence
            break
    sections = (
        _intro(manifest),
        _use(manifest),
        _stored(manifest, folder),
        _quality(manifest),
        _limits(manifest),
        _made(manifest),
    )
    body = "\n".join(section for section in sections if section)
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{body}"


def _is_lora(manifest: Manifest) -> bool:
    return manifest.codec_summary() == "lora"


def _codecs(manifest: Manifest) -> set[str]:
    return {str(term["id"]) for e in manifest.tensors.values() for term in e.terms}


def _base_name(manifest: Manifest) -> str:
    return manifest.base.name + (f"@{manifest.base.revision}" if manifest.base.revision else "")


def _intro(manifest: Manifest) -> str:
    totals = manifest.totals
    kind = "A LoRA" if _is_lora(manifest) else "A full fine-tune"
    if "merge" in manifest.recipe:
        kind = "A merge of fine-tunes"
    return f"""# {manifest.variant.name}, as a delta against {manifest.base.name}

{kind} in {totals.delta_bytes:,} bytes, {totals.ratio:.1%} of its {totals.variant_bytes:,}
bytes of weights. It needs its base, `{_base_name(manifest)}`, whose content it knows by fingerprint
(`{manifest.base.fingerprint}`).
{_shared(manifest)}"""


def _shared(manifest: Manifest) -> str:
    family = manifest.recipe.get("family")
    if not family:
        return ""
    members = ", ".join(family["members"])
    place = f".families/{str(family['id']).removeprefix('sha256:')}"
    return f"""
It shares {family["bytes"]:,} more bytes with other deltas ({members}). They lie in
`{place}` beside this folder, and must go along with it: beside it again, or inside it.
"""


def _use(manifest: Manifest) -> str:
    quantization = manifest.base_quantization
    option = "" if quantization is None else f" --base-quantization {quantization.method}"
    name = _base_name(manifest)
    return f"""## How to use it

```
deltafold zoo add ZOO THIS_FOLDER_OR_REPO
deltafold serve {name} --zoo ZOO{option}
```

serves it beside its base and any number of other deltas over the OpenAI API; the `model` of a
request is its name in the zoo. To get a plain checkpoint:

```
deltafold restore THIS_FOLDER --base {name} -o CHECKPOINT
```
"""


def _stored(manifest: Manifest, folder: Path | None) -> str:
    whole = max(manifest.totals.delta_bytes, 1)
    kinds = "\n".join(
        f"| {kind} | {nbytes:,} | {nbytes / whole:.1%} |"
        for kind, nbytes in bytes_by_kind(manifest).items()
    )
    counts: dict[str, int] = {}
    for entry in manifest.tensors.values():
        term = "+".join(str(t["id"]) for t in entry.terms)
        counts[term] = counts.get(term, 0) + 1
    terms = ", ".join(f"{n} as `{term}`" for term, n in sorted(counts.items())) or "none"
    worst = max((e.rel_error for e in manifest.tensors.values()), default=0.0)
    pictures = "".join(
        f"\n![{told}](report/{name})\n"
        for name, told in _PICTURES.items()
        if folder is not None and (folder / "report" / name).is_file()
    )
    return f"""## What is stored

| | bytes | share |
|---|---|---|
{kinds}

Tensors: {terms}; {len(manifest.unchanged)} are equal to the base's and cost nothing. The largest
relative error of a tensor's delta is {worst:.4f}; `report/tensors.csv` has them all. This says how
closely the weights follow the fine-tune's, not how well the model answers.
{pictures}"""


def _quality(manifest: Manifest) -> str:
    found = {k: manifest.quality[k] for k in _FIGURES if k in manifest.quality}
    if not found:
        return ""
    rows = "\n".join(f"| {_FIGURES[key]} | {value:.4g} |" for key, value in found.items())
    data = manifest.quality.get("data")
    name = data.get("name", "?") if isinstance(data, dict) else data or "?"
    return f"""## Quality

Measured beside the fine-tune itself on {name}, {manifest.quality.get("tokens", "?")} tokens. It says
nothing about other data.

| figure | value |
|---|---|
{rows}
"""


def _limits(manifest: Manifest) -> str:
    limits = ["It is no model by itself: without the base, or with another one, it is refused."]
    lossy = sum(e.rel_error > 0 for e in manifest.tensors.values())
    if lossy:
        limits.append(
            f"{lossy} of {len(manifest.tensors)} tensors are stored with an error, so its answers may "
            "differ from the fine-tune's."
        )
        if not any(key in manifest.quality for key in _FIGURES):
            limits.append(
                "How well it answers was not measured; `deltafold eval` compares it with the fine-tune."
            )
    else:
        limits.append("Every tensor comes back bit for bit, or is stored without loss.")
    if manifest.base_quantization is not None:
        limits.append(
            f"It was taken against the base as {manifest.base_quantization.method} holds it, and is "
            "served on such a base alone."
        )
    limits.append(
        "What the fine-tune's own card says of its use, its data and its risks holds here."
    )
    return "## Limits\n\n" + "\n".join(f"* {limit}" for limit in limits) + "\n"


def _made(manifest: Manifest) -> str:
    recipe = yaml.safe_dump(manifest.recipe, sort_keys=False).strip()
    command = f", with\n\n```\n{manifest.command}\n```\n\nand" if manifest.command else " with"
    return f"""## How it was made

By {manifest.created_by}{command} the recipe

```yaml
{recipe}
```
"""
