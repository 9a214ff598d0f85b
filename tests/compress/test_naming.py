"""Fine-tunes that put a prefix before their base's names, or drop one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    QUERY,
    Pair,
    Tensors,
    assert_same,
    fine_tuned,
    make_pair,
    read_checkpoint,
    wide_pair,
    write_checkpoint,
)
from packing import LOSSLESS, pack, restored

from deltafold.compress import (
    Checkpoint,
    DeltafoldError,
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    export_peft,
    merge_deltas,
    parse_spec,
    restore_checkpoint,
    twin_deltas,
    verify_delta,
)
from deltafold.compress.checkpoint import Spec
from deltafold.compress.fingerprint import digest_source, fingerprint
from deltafold.compress.hub import Reference
from deltafold.compress.manifest import BaseNames
from deltafold.compress.merges import Task
from deltafold.compress.naming import NamedBase, base_names
from deltafold.compress.recipe import parse_edit_for

ADD, DROP = BaseNames(change="add", prefix="bert."), BaseNames(change="remove", prefix="bert.")
BARE = {"emb.weight": (8, 4), "layer.0.w": (4, 4), "layer.1.w": (4, 4), "norm.weight": (4,)}


@dataclass(frozen=True)
class Names:
    """A source of which names and shapes alone are known."""

    shapes: dict[str, tuple[int, ...]]
    reference: Reference = field(default=Reference(Path("nowhere"), "nowhere"))

    def names(self) -> list[str]:
        return sorted(self.shapes)

    def spec(self, name: str) -> Spec:
        return Spec("F32", self.shapes[name])

    def tensor(self, name: str) -> torch.Tensor:
        raise AssertionError("no tensor is read")

    def sha256(self, name: str) -> str:
        raise AssertionError("no tensor is read")


def under(prefix: str, names: dict[str, Any] = BARE) -> dict[str, Any]:
    return {prefix + name: value for name, value in names.items()}


HEAD, LM = {"classifier.weight": (2, 4)}, {"cls.predictions.bias": (8,)}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], BaseNames | None]] = {
    "a head is put on": (BARE, under("bert.") | HEAD, ADD),
    "a head is taken off": (under("bert.") | LM, BARE, DROP),
    "another head": (under("bert.") | LM, under("bert.") | HEAD, None),
    "the same names": (BARE, BARE, None),
    "two modules deep": (
        BARE,
        under("question.bert_model."),
        BaseNames(change="add", prefix="question.bert_model."),
    ),
    "more words": (BARE, under("bert.") | {"bert.emb.weight": (9, 4)}, ADD),
    "two copies": (BARE, under("bert.") | under("teacher."), None),
    "one copy too few": (BARE, under("bert.") | {"teacher.norm.weight": (4,)}, ADD),
    "both ways": (BARE | {"norm.bias": (4,)}, under("bert.") | BARE, None),
    "one kept its name": (BARE, under("bert.") | {"norm.weight": (4,)}, None),
    "a kept name of another shape": (BARE, under("bert.") | {"norm.weight": (5,)}, ADD),
    "half": (BARE, {"bert.emb.weight": (8, 4), "bert.norm.weight": (4,)}, ADD),
    "less than half": (BARE, {"bert.emb.weight": (8, 4)}, None),
    "a wider model": (BARE, under("bert.", {n: (*s, 2) for n, s in BARE.items()}), None),
    "no module": (BARE, {f"bert_{n}": s for n, s in BARE.items()}, None),
    "two of the base's would have one name": (
        under("bert.") | {"emb.weight": (7, 4)},
        BARE,
        None,
    ),
    "what has no prefix stays": (under("bert.") | HEAD, BARE | HEAD, DROP),
    "nothing": ({}, {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_prefix_is_told_by_names_and_shapes(case: str) -> None:
    base, variant, expected = CASES[case]
    assert base_names(Names(base), Names(variant)) == expected


def head_of(tensors: Tensors, prefix: str) -> Tensors:
    """The same model under a prefix, with a head of its own in place of the base's."""
    kept = {prefix + n: v for n, v in tensors.items() if n != "lm_head.weight"}
    return kept | {"score.weight": torch.randn(3, 40, generator=torch.Generator().manual_seed(5))}


@pytest.fixture(params=["add", "remove"])
def renamed(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    """A pair in which the fine-tune adds a prefix, or drops the base's; some tensors are equal."""
    pair = make_pair(tmp_path)
    tuned = pair.variant_tensors | {"model.norm.weight": pair.base_tensors["model.norm.weight"]}
    if request.param == "add":
        pair.variant_tensors = head_of(tuned, "deep.er.")
    else:
        pair.base_tensors = {f"deep.er.{n}": v for n, v in pair.base_tensors.items()} | {
            "cls.bias": torch.ones(3)
        }
        pair.variant_tensors = head_of(tuned, "")
        write_checkpoint(pair.base, pair.base_tensors)
    write_checkpoint(pair.variant, pair.variant_tensors)
    return pair


ACCEPT = ["new-tensors", "missing-tensors"]


def pre(pair: Pair) -> str:
    return "deep.er." if "deep.er.model.norm.weight" in pair.variant_tensors else ""


def test_a_renamed_fine_tune_is_a_small_delta_and_comes_back(renamed: Pair) -> None:
    repo = pack(renamed, LOSSLESS, accept=ACCEPT)
    manifest = repo.manifest
    scheme = manifest.base_names
    new = {n for n, e in manifest.tensors.items() if e.base_shape is None}
    assert scheme is not None
    assert scheme.prefix == "deep.er."
    assert manifest.format_version == "1.2"
    assert new == {"score.weight"}
    kept = {f"{pre(renamed)}model.{n}" for n in ("norm.weight", "position_ids")}
    assert set(manifest.unchanged) == kept
    head = "lm_head.weight"
    assert manifest.absent == ((f"deep.er.{head}",) if pre(renamed) else ("cls.bias", head))
    # The base is known by its own names.
    digests = digest_source(Checkpoint.open(renamed.base))
    assert manifest.base.fingerprint == fingerprint(digests)
    assert repo.base_tensors == digests
    report = verify_delta(renamed.out, base=renamed.base, full=True)
    assert report.restored == report.coded == len(manifest.tensors)
    assert_same(restored(renamed), renamed.variant_tensors)


def test_it_costs_what_it_costs_under_the_same_names(renamed: Pair) -> None:
    recipe = Recipe(
        default=parse_spec("bitdelta:bits=2,group=8"),
        overrides=((f"{pre(renamed)}model.layers.0.mlp.up*", parse_spec("int:bits=8")),),
        edits=(parse_edit_for("trim:keep=0.5"),),
    )
    repo = pack(renamed, recipe, accept=ACCEPT)
    plain = {n.removeprefix("deep.er."): v for n, v in renamed.base_tensors.items()}
    tuned = {n.removeprefix("deep.er."): v for n, v in renamed.variant_tensors.items()}
    folder = renamed.root / "plain"
    compress_checkpoint(
        write_checkpoint(folder / "base", plain),
        write_checkpoint(folder / "variant", tuned),
        folder / "delta",
        recipe=Recipe(
            default=recipe.default,
            overrides=(("model.layers.0.mlp.up*", recipe.overrides[0][1]),),
            edits=recipe.edits,
        ),
        accept=ACCEPT,
    )
    other = DeltaRepo.open(folder / "delta").manifest
    assert other.base_names is None
    assert {n.removeprefix("deep.er."): e.bytes for n, e in repo.manifest.tensors.items()} == {
        n: e.bytes for n, e in other.tensors.items()
    }
    found = {n.removeprefix("deep.er."): v for n, v in restored(renamed).items()}
    restore_checkpoint(folder / "delta", folder / "base", folder / "restored")
    assert_same(found, read_checkpoint(folder / "restored"))


def test_a_lossless_delta_stands_for_the_renamed_fine_tune(renamed: Pair) -> None:
    first = pack(renamed, LOSSLESS, accept=ACCEPT)
    again = renamed.root / "again"
    compress_checkpoint(renamed.base, renamed.out, again, recipe=LOSSLESS, accept=ACCEPT)
    second = DeltaRepo.open(again).manifest
    assert second.variant.fingerprint == first.manifest.variant.fingerprint
    assert second.tensors == first.manifest.tensors
    assert second.base_names == first.manifest.base_names


def test_the_scheme_is_part_of_the_identity(renamed: Pair) -> None:
    pack(renamed, LOSSLESS, accept=ACCEPT)
    path = renamed.out / "delta_config.json"
    manifest = json.loads(path.read_text())
    keys = ("absent", "base_names", "unchanged")
    content = {key: manifest[key] for key in keys} | {
        "base": manifest["base"]["fingerprint"],
        "files": {n: f["sha256"] for n, f in manifest["files"].items() if f["sha256"]},
        "format": "deltafold",
        "major": "1",
        "tensors": {
            n: [e["shape"], e["dtype"], e["terms"], e["payload_sha256"]]
            for n, e in manifest["tensors"].items()
        },
    }
    text = json.dumps(content, separators=(",", ":"), sort_keys=True)
    assert manifest["delta_id"] == f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    path.write_text(json.dumps(manifest | {"base_names": {"change": "add", "prefix": "x."}}))
    with pytest.raises(DeltafoldError) as caught:
        DeltaRepo.open(renamed.out)
    assert caught.value.code == "checksum"


@pytest.mark.parametrize(
    ("change", "prefix", "code"),
    [
        ("remove", "model.layers.0.", "coverage"),
        ("add", "other.", "coverage"),
        ("add", "no-dot", "bad-manifest"),
        ("remove", "", "bad-manifest"),
    ],
)
def test_a_scheme_that_does_not_fit_is_refused(
    pair: Pair, change: str, prefix: str, code: str
) -> None:
    repo = pack(pair, LOSSLESS)
    scheme = BaseNames.model_construct(change=change, prefix=prefix)
    manifest = repo.manifest.model_copy(update={"base_names": scheme})
    manifest = manifest.model_copy(update={"delta_id": manifest.content_digest()})
    (pair.out / "delta_config.json").write_text(json.dumps(manifest.to_json()))
    with pytest.raises(DeltafoldError) as caught:
        verify_delta(pair.out, base=pair.base)
    assert caught.value.code == code


def test_a_scheme_that_gives_two_tensors_one_name_is_refused(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    pair.base_tensors |= {"old.model.norm.weight": torch.ones(40)}
    write_checkpoint(pair.base, pair.base_tensors)
    repo = pack(pair, LOSSLESS, accept=ACCEPT)
    scheme = BaseNames(change="remove", prefix="old.")
    manifest = repo.manifest.model_copy(update={"base_names": scheme, "absent": ()})
    manifest = manifest.model_copy(update={"delta_id": manifest.content_digest()})
    (pair.out / "delta_config.json").write_text(json.dumps(manifest.to_json()))
    with pytest.raises(DeltafoldError, match="one name") as caught:
        verify_delta(pair.out, base=pair.base)
    assert caught.value.code == "bad-manifest"


def test_others_are_written_as_before(pair: Pair) -> None:
    assert pack(pair).manifest.base_names is None
    data = json.loads((pair.out / "delta_config.json").read_text())
    assert "base_names" not in data
    assert data["format_version"] == "1.0"


def test_the_wrong_base_is_refused(renamed: Pair) -> None:
    """One of another width when it is packed; one with another value when it is restored."""
    with pytest.raises(DeltafoldError) as caught:
        pack(renamed, LOSSLESS)
    assert caught.value.code == "unexpected-tensor", "a head has to be accepted as ever"
    narrow = {n: v[..., :8].contiguous() if v.dim() else v for n, v in renamed.base_tensors.items()}
    other = write_checkpoint(renamed.root / "narrow", narrow)
    with pytest.raises(DeltafoldError) as caught:
        compress_checkpoint(other, renamed.variant, renamed.out)
    assert caught.value.code in ("unexpected-tensor", "shape-mismatch")
    pack(renamed, LOSSLESS, accept=ACCEPT)
    moved = write_checkpoint(renamed.root / "moved", fine_tuned(renamed.base_tensors, seed=8))
    for wrong in (moved, renamed.variant):
        with pytest.raises(DeltafoldError) as caught:
            restore_checkpoint(renamed.out, wrong, renamed.root / "nothing")
        assert caught.value.code == "base-mismatch"


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_against_a_quantised_base(tmp_path: Path, method: str) -> None:
    """Which tensors are quantised is decided by the base's own names."""
    pair = wide_pair(tmp_path)
    config = {"model_type": "pico", "vocab_size": 96}
    pair.base_tensors = {f"expert.{n}": v for n, v in pair.base_tensors.items()}
    write_checkpoint(pair.base, pair.base_tensors, config=config)
    repo = pack(pair, LOSSLESS, base_quantization=method)
    assert repo.quantised == frozenset(), "experts are not quantised"
    pair.base_tensors = {n.replace("expert.", "a."): v for n, v in pair.base_tensors.items()}
    write_checkpoint(pair.base, pair.base_tensors, config=config)
    repo = pack(pair, LOSSLESS, base_quantization=method, overwrite=True)
    assert repo.quantised == {QUERY, "model.layers.0.mlp.down_proj.weight"}
    assert repo.manifest.format_version == "1.2"
    verify_delta(pair.out, base=pair.base, full=True)
    assert_same(restored(pair), pair.variant_tensors)
    out = pair.root / "lora"
    report = export_peft(pair.out, pair.base, out, rank=128, drop=["*.experts.*"])
    step = pair.variant_tensors[QUERY].float() - pair.base_tensors[f"a.{QUERY}"].float()
    found = {t.tensor: t for t in report.tensors}[QUERY]
    assert found.norm == pytest.approx(float(step.norm()), rel=1e-5)
    tensors, module = read_checkpoint(out), f"base_model.model.{QUERY.removesuffix('.weight')}"
    product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    assert (product - step).abs().max() < 1e-5


def test_merging_deltas_of_one_naming(renamed: Pair) -> None:
    second = fine_tuned(renamed.variant_tensors, seed=4)
    folders = []
    for name, folder in (
        ("sql", renamed.variant),
        ("law", write_checkpoint(renamed.root / "other", second)),
    ):
        folders.append(renamed.root / "deltas" / name)
        compress_checkpoint(renamed.base, folder, folders[-1], recipe=LOSSLESS, accept=ACCEPT)
    merge_deltas(renamed.base, folders, renamed.out, method=Task(scale=0.5), recipe=LOSSLESS)
    assert DeltaRepo.open(renamed.out).manifest.base_names is not None
    verify_delta(renamed.out, base=renamed.base, full=True)
    named = NamedBase.of(Checkpoint.open(renamed.base), Checkpoint.open(renamed.variant))
    name = next(n for n in renamed.variant_tensors if n.endswith(QUERY))
    base = named.tensor(name).float()
    mean = (
        base + ((renamed.variant_tensors[name].float() - base) + (second[name].float() - base)) / 2
    )
    assert torch.equal(restored(renamed)[name], mean.to(torch.bfloat16))
    # A model that kept the base's names has other tensors.
    own = fine_tuned(renamed.base_tensors, seed=6)
    compress_checkpoint(
        renamed.base, write_checkpoint(renamed.root / "own", own), renamed.root / "deltas/own"
    )
    with pytest.raises(DeltafoldError, match="different names") as caught:
        merge_deltas(
            renamed.base,
            [folders[0], renamed.root / "deltas/own"],
            renamed.root / "mixed",
            method=Task(),
        )
    assert caught.value.code == "unexpected-tensor"
    assert "deep.er." in str(caught.value)


def test_twins_of_a_bare_base(tmp_path: Path) -> None:
    """Every tensor has its partner: nothing is new and nothing absent."""
    pair = make_pair(tmp_path)
    folders = []
    for seed, name in enumerate(("sql", "law")):
        tensors = {f"deep.{n}": v for n, v in fine_tuned(pair.base_tensors, seed=seed + 3).items()}
        folders.append(tmp_path / "deltas" / name)
        compress_checkpoint(
            pair.base, write_checkpoint(tmp_path / name, tensors), folders[-1], recipe=LOSSLESS
        )
    reports = twin_deltas(pair.base, folders, pair.out, recipe=LOSSLESS)
    assert {r.manifest.base_names for r in reports.values()} == {
        BaseNames(change="add", prefix="deep.")
    }
    for name in reports:
        verify_delta(pair.out / name, base=pair.base, full=True)
