"""`deltafold inspect`: what a delta holds, or which deltas a zoo holds."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltafold.compress.sizes import human
from deltafold.server.cli.output import Output, facts, output_options, table
from deltafold.server.cli.packed import (
    against_text,
    names_data,
    quantization_data,
    untied_text,
)

if TYPE_CHECKING:
    from deltafold.compress import DeltaRepo, Manifest
    from deltafold.compress.family import Family

#: Looked for by name, so that telling a zoo from a delta needs no library.
_MANIFEST = "delta_config.json"
_ADAPTER = "adapter_config.json"


@click.command("inspect")
@click.argument("delta_or_zoo", metavar="DELTA|ZOO")
@click.option("--tensors", is_flag=True, help="List every tensor of a delta.")
@output_options
@click.pass_obj
def inspect(output: Output, delta_or_zoo: str, tensors: bool) -> None:
    """Show sizes, codecs, base and coverage of DELTA, or list the deltas and LoRAs of ZOO.

    In a zoo, a delta that cannot be used is listed with the code of its error. The payload itself
    is not read; `deltafold verify` does that.

    \b
    deltafold inspect zoo/sql --tensors
    deltafold inspect zoo
    """
    from deltafold.compress import DeltaRepo

    folder = Path(delta_or_zoo).expanduser()
    deltas = _deltas_of(folder)
    if deltas:
        found = [_zoo_entry(path) for path in deltas]
        families = _families(folder)
        total = sum(entry.get("bytes", 0) for entry in (*found, *families))
        data = {"kind": "zoo", "path": str(folder), "deltas": found, "bytes": total}
        data["families"] = families
        output.result(data, _zoo_text(folder, found, families, total, output))
        return
    repo = DeltaRepo.open(delta_or_zoo)
    data = _summary(repo)
    if tensors:
        data["tensors"] = _tensors(repo.manifest)
    output.result(data, _text(data))


def _deltas_of(folder: Path) -> list[Path]:
    """The delta repos and LoRAs in a folder that is neither itself; what a zoo serves."""
    if not folder.is_dir() or _is_variant(folder):
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if _is_variant(path)
        and not path.name.startswith(".")
        and not path.name.endswith(".partial")
    )


def _is_variant(folder: Path) -> bool:
    return (folder / _MANIFEST).is_file() or (folder / _ADAPTER).is_file()


def _zoo_entry(folder: Path) -> dict[str, Any]:
    from deltafold.compress import DeltafoldError, DeltaRepo

    try:
        if not (folder / _MANIFEST).is_file():
            return {"name": folder.name, "ok": True, **_lora_summary(folder)}
        return {"name": folder.name, "ok": True, **_summary(DeltaRepo.open(folder))}
    except DeltafoldError as error:
        return {"name": folder.name, "ok": False, "error": error.to_json()}


def _families(zoo: Path) -> list[dict[str, Any]]:
    from deltafold.compress import DeltafoldError
    from deltafold.compress.family import Family, families_in

    found: list[dict[str, Any]] = []
    for folder in families_in(zoo):
        try:
            found.append({"ok": True, **_family(Family(folder))})
        except DeltafoldError as error:
            found.append({"family_id": folder.name, "ok": False, "error": error.to_json()})
    return found


def _family(family: Family) -> dict[str, Any]:
    manifest = family.manifest
    return {
        "family_id": manifest.family_id,
        "path": str(family.folder),
        "method": manifest.method,
        "codec": manifest.codec,
        "members": list(manifest.members),
        "tensors": len(manifest.tensors),
        "bytes": manifest.bytes,
    }


def _summary(repo: DeltaRepo) -> dict[str, Any]:
    manifest = repo.manifest
    return {
        "kind": "delta",
        "path": str(repo.folder),
        "delta_id": manifest.delta_id,
        "format_version": manifest.format_version,
        "base": manifest.base.model_dump(),
        "base_quantization": quantization_data(manifest),
        "base_names": names_data(manifest),
        "untied": manifest.untied,
        "variant": manifest.variant.model_dump(),
        "codec": manifest.codec_summary(),
        "recipe": manifest.recipe,
        "bytes": manifest.totals.delta_bytes,
        "payload_bytes": manifest.totals.payload_bytes,
        "variant_bytes": manifest.totals.variant_bytes,
        "ratio": manifest.totals.ratio,
        "coverage": manifest.totals.coverage,
        "lossless": repo.lossless,
        "counts": {
            "coded": len(manifest.tensors),
            "unchanged": len(manifest.unchanged),
            "absent": len(manifest.absent),
        },
        "terms": _by_term(manifest),
        "families": [_family(family) for family in repo.families.values()],
        "accepted": list(manifest.accepted),
        "quality": manifest.quality,
        "created_by": manifest.created_by,
        "command": manifest.command,
    }


def _lora_summary(folder: Path) -> dict[str, Any]:
    """A LoRA as it lies in a zoo: `serve` imports it on first sight."""
    from deltafold.compress.adapter import Adapter

    adapter = Adapter.open(folder)
    return {
        "kind": "lora",
        "path": str(folder),
        "base": {"name": str(adapter.config.get("base_model_name_or_path") or "")},
        "dora": bool(adapter.config.get("use_dora")),
        "ranks": sorted({lora.rank for lora in adapter.loras.values()}),
        "modules": len(adapter.loras),
        "bytes": adapter.file.path.stat().st_size,
    }


def _by_term(manifest: Manifest) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for entry in manifest.tensors.values():
        kind = "+".join(_short(term) for term in entry.terms)
        found[kind]["tensors"] += 1
        found[kind]["bytes"] += entry.bytes
    return dict(sorted(found.items()))


def _short(term: dict[str, Any]) -> str:
    """`rows(planes)`: a term's id with that of the term within."""
    inner = term.get("inner")
    return f"{term['id']}({_short(inner)})" if isinstance(inner, dict) else str(term["id"])


def _tensors(manifest: Manifest) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "shape": list(entry.shape),
            "dtype": entry.dtype,
            "stored": "+".join(_short(term) for term in entry.terms),
            "terms": list(entry.terms),
            "bytes": entry.bytes,
            "rel_error": entry.rel_error,
        }
        for name, entry in manifest.tensors.items()
    ]
    rows += [{"name": name, "stored": "unchanged", "bytes": 0} for name in manifest.unchanged]
    rows += [{"name": name, "stored": "absent", "bytes": 0} for name in manifest.absent]
    return sorted(rows, key=lambda row: str(row["name"]))


def _text(data: dict[str, Any]) -> str:
    from deltafold.compress.manifest import BaseNames

    base, counts = data["base"], data["counts"]
    name = base["name"] + (f"@{base['revision']}" if base["revision"] else "")
    lines = [
        ("fine-tune", data["variant"]["name"]),
        ("base", f"{name}  ({base['fingerprint'][:23]}...)"),
        ("id", data["delta_id"]),
        ("size", f"{human(data['bytes'])}, {data['ratio']:.2%} of {human(data['variant_bytes'])}"),
        ("codec", data["codec"] + ("  (bit for bit)" if data["lossless"] else "")),
        ("coverage", f"{data['coverage']:.0%}"),
        (
            "tensors",
            f"{counts['coded']} coded, {counts['unchanged']} equal to the base's"
            + (f", {counts['absent']} absent" if counts["absent"] else ""),
        ),
    ]
    if data["base_quantization"]:
        lines.insert(2, ("against", against_text(data["base_quantization"])))
    lines += [("shares", _shares(family)) for family in data["families"]]
    if data["base_names"]:
        lines.append(("names", BaseNames(**data["base_names"]).text()))
    if data["untied"]:
        lines.append(("unties", untied_text(data["untied"])))
    if data["accepted"]:
        lines.append(("accepted", ", ".join(data["accepted"])))
    lines += [(f"quality {key}", _figure(value)) for key, value in data["quality"].items()]
    lines.append(("made by", data["created_by"]))
    if data["command"]:
        lines.append(("command", data["command"]))
    rows = [[k, str(v["tensors"]), f"{v['bytes']:,}"] for k, v in data["terms"].items()]
    text = f"{data['path']}\n{facts(lines)}"
    if rows:
        text += "\n\n" + table(["stored as", "tensors", "bytes"], rows, "tensors bytes")
    if "tensors" in data:
        text += "\n\n" + _tensor_table(data["tensors"])
    return text


def _figure(value: Any) -> str:
    """A quality figure as people read it; of what was measured on, the name and the size."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        shown = [f"{key} {value[key]}" for key in ("name", "rows", "tokens") if key in value]
        if isinstance(value.get("frontier"), list):
            shown.append(f"{len(value['frontier'])} sizes weighed up, see `deltafold report`")
        return ", ".join(shown) or ", ".join(map(str, value))
    return str(value)


def _shares(family: dict[str, Any]) -> str:
    members = ", ".join(family["members"])
    return f"{human(family['bytes'])} more, once for {members}  ({family['family_id'][:23]}...)"


def _tensor_table(tensors: list[dict[str, Any]]) -> str:
    rows = [
        [
            row["name"],
            "x".join(map(str, row.get("shape", []))) or "-",
            row.get("dtype", "-"),
            row["stored"],
            f"{row['bytes']:,}",
            f"{row['rel_error']:.4f}" if "rel_error" in row else "-",
        ]
        for row in tensors
    ]
    head = ["tensor", "shape", "dtype", "stored as", "bytes", "error"]
    return table(head, rows, "bytes error")


def _zoo_text(
    folder: Path,
    found: list[dict[str, Any]],
    families: list[dict[str, Any]],
    total: int,
    output: Output,
) -> str:
    whole = [e for e in found if e["ok"]]
    counts = []
    for kind, one, many in (("delta", "1 delta", "deltas"), ("lora", "1 LoRA", "LoRAs")):
        count = sum(e["kind"] == kind for e in whole)
        if count or kind == "delta":
            counts.append(one if count == 1 else f"{count} {many}")
    text = f"{folder}: {', '.join(counts)}, {human(total)}"
    if whole:
        head = ["name", "size", "ratio", "codec", "base"]
        text += "\n" + table(head, [_zoo_row(e) for e in whole], "size ratio")
    for family in (f for f in families if f["ok"]):
        text += f"\nshared by {', '.join(family['members'])}: {human(family['bytes'])}"
        text += f", {family['method']}  ({family['family_id'][7:15]})"
    for entry in (e for e in (*found, *families) if not e["ok"]):
        error = entry["error"]
        code = output.style(f"error[{error['code']}]", fg="red")
        text += f"\n{entry.get('name', 'shared')}  {code}: {error['message']}"
    return text


def _zoo_row(entry: dict[str, Any]) -> list[str]:
    row = [entry["name"], human(entry["bytes"])]
    if entry["kind"] == "lora":
        kind, ranks = "DoRA" if entry["dora"] else "LoRA", entry["ranks"]
        if ranks:
            kind += f", rank {'-'.join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1])))}"
        return [*row, "-", kind, entry["base"]["name"] or "-"]
    base = entry["base"]
    name = f"{base['name']}  ({base['fingerprint'][7:15]})"
    return [*row, f"{entry['ratio']:.2%}", entry["codec"], name]
