"""Fine-tunes that untie their head: two tables where the base has one, each with a delta of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import arch_table
import pytest
import torch
import transformers
from arch_table import Family
from click.testing import CliRunner
from truth import moved

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
    verify_delta,
)
from deltafold.compress.fingerprint import digest_source
from deltafold.compress.merges.task import Task
from deltafold.compress.naming import NamedBase
from deltafold.compress.verify import check_coverage
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.host import Row
from deltafold.server.cli.main import cli

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
#: Which of the two tables each fine-tune moves, and rows that it adds to both.
KINDS = {"both": (True, True, 0), "head": (False, True, 0), "table": (True, False, 0)}
KINDS |= {"longer": (True, True, 5), "neither": (False, False, 0)}


def plain(folder: Path, **options: Any) -> Any:
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, **options).eval()


def fine_tune(folder: Path, name: str, *, table: bool, head: bool, rows: int) -> Path:
    """Save a fine-tune with a head of its own, everything else moved too."""
    model = plain(folder / "base")
    if rows:
        model.resize_token_embeddings(arch_table.VOCABULARY + rows, mean_resizing=False)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    moved(model, lambda n: (n == TABLE and not table) or (n == HEAD and not head), len(name))
    full = folder / "full" / name
    model.save_pretrained(full)
    assert HEAD in Checkpoint.open(full).names()
    return full


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    Family("Qwen2", {"tie_word_embeddings": True}).build().save_pretrained(folder / "base")
    assert HEAD not in Checkpoint.open(folder / "base").names()
    for name, (table, head, rows) in KINDS.items():
        full = fine_tune(folder, name, table=table, head=head, rows=rows)
        for codec in ("lossless", "int:bits=8,group=32"):
            delta = folder / "zoo" / f"{name}-{codec[:3]}"
            recipe = Recipe(default=parse_spec(codec))
            accept = ["resized"] if rows else []
            compress_checkpoint(folder / "base", full, delta, recipe=recipe, accept=accept)
            restore_checkpoint(delta, folder / "base", folder / delta.name, dtype=torch.float32)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_both_tables_are_stored_as_differences_to_the_one(name: str, folder: Path) -> None:
    table, head, rows = KINDS[name]
    manifest = DeltaRepo.open(folder / "zoo" / f"{name}-int").manifest
    assert (manifest.format_version, manifest.untied) == ("1.3", {HEAD: TABLE})
    assert manifest.accepted == (("resized",) if rows else ())
    for tensor, changed in ((TABLE, table), (HEAD, head)):
        assert (tensor in manifest.tensors) == changed
        assert (tensor in manifest.unchanged) == (not changed)
        if changed:
            entry = manifest.tensors[tensor]
            assert entry.base_shape == (arch_table.VOCABULARY, 32)
            assert not any(term["id"] == "exact" for term in entry.terms)
            assert entry.rel_error < 0.02
    restored = folder / "bits" / name
    restore_checkpoint(folder / "zoo" / f"{name}-los", folder / "base", restored)
    full = Checkpoint.open(folder / "full" / name)
    assert digest_source(Checkpoint.open(restored)) == digest_source(full)
    assert verify_delta(folder / "zoo" / f"{name}-los", base=folder / "base", full=True)


def test_each_answers_as_its_dense_model(folder: Path) -> None:
    """Each table's delta stays with that table, whether the other one has a delta or not."""
    model = plain(folder / "base")
    deltas = Deltas(model, Checkpoint.open(folder / "base"), folder / "zoo")
    names = ["base", *(f"{n}-{c}" for n in KINDS for c in ("los", "int"))]
    assert {i.name: i.applied for i in deltas.variants()} == {
        n: None if n == "base" else "delta" for n in names
    }
    rows = [Row(deltas.acquire(name)) for name in names]
    ids = torch.arange(7 * len(rows)).reshape(len(rows), 7) % 90
    with torch.inference_mode(), deltas.batch(rows):
        mixed = model(ids).logits
    for row, name in enumerate(names):
        with torch.inference_mode():
            dense = plain(folder / name)(ids[row : row + 1]).logits[0]
        got = mixed[row][:, : dense.shape[-1]]
        assert (got - dense).abs().max() < 1e-4, name


def test_the_program_says_so(folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder / "base"), str(folder / "full" / "both"), "-o", str(tmp_path / "d")]
    result = CliRunner().invoke(cli, ["compress", *arguments])
    assert result.exit_code == 0, result.output
    said = f"{HEAD} from {TABLE}: both are stored"
    assert said in result.stdout
    assert said in CliRunner().invoke(cli, ["inspect", str(tmp_path / "d")]).stdout
    data = json.loads(CliRunner().invoke(cli, ["inspect", "--json", str(tmp_path / "d")]).stdout)
    assert data["untied"] == {HEAD: TABLE}


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        (True, False, True),
        (True, None, True),
        (None, False, True),
        (True, True, False),
        (False, False, False),
        (None, None, False),
    ],
)
def test_configurations_tell(
    ours: bool | None, theirs: bool | None, found: bool, folder: Path, tmp_path: Path
) -> None:
    for name, source, tied in (("base", "base", ours), ("full", "full/both", theirs)):
        (tmp_path / name).mkdir()
        for file in (folder / source).iterdir():
            (tmp_path / name / file.name).symlink_to(file)
        config = json.loads((folder / source / "config.json").read_text())
        config = {k: v for k, v in config.items() if k != "tie_word_embeddings"}
        (tmp_path / name / "config.json").unlink()
        told = {} if tied is None else {"tie_word_embeddings": tied}
        (tmp_path / name / "config.json").write_text(json.dumps(config | told))
    base, full = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "full")
    assert NamedBase.of(base, full).untied == ({HEAD: TABLE} if found else {})
    if not found:
        with pytest.raises(DeltafoldError) as caught:
            compress_checkpoint(tmp_path / "base", tmp_path / "full", tmp_path / "out")
        assert caught.value.code == "unexpected-tensor"


@pytest.mark.parametrize(
    "untied", [{}, {HEAD: "model.nobody"}, {TABLE: TABLE}, {"score.weight": TABLE}]
)
def test_what_does_not_fit_the_base_is_refused(untied: dict[str, str], folder: Path) -> None:
    repo = DeltaRepo.open(folder / "zoo" / "both-int")
    repo.manifest = repo.manifest.model_copy(update={"untied": untied})
    with pytest.raises(DeltafoldError) as caught:
        check_coverage(repo, digest_source(Checkpoint.open(folder / "base")))
    assert caught.value.code in ("bad-manifest", "coverage")


def test_merging_and_exporting(folder: Path, tmp_path: Path) -> None:
    """Deltas that untie alike are merged; others, and LoRA folders, cannot say it."""
    tied = tmp_path / "full"
    moved(plain(folder / "base")).save_pretrained(tied)
    compress_checkpoint(folder / "base", tied, tmp_path / "tied")
    pair, method = [folder / "zoo" / "both-los", folder / "zoo" / "head-los"], Task()
    merge_deltas(folder / "base", pair, tmp_path / "merged", method=method)
    assert DeltaRepo.open(tmp_path / "merged").manifest.untied == {HEAD: TABLE}
    others = [pair[0], tmp_path / "tied"]
    with pytest.raises(DeltafoldError) as caught:
        merge_deltas(folder / "base", others, tmp_path / "no", method=method)
    assert caught.value.code == "unexpected-tensor"
    assert HEAD in str(caught.value)
    with pytest.raises(DeltafoldError) as caught:
        export_peft(pair[1], folder / "base", tmp_path / "lora", rank=2)
    assert caught.value.code == "engine-unsupported"
    assert HEAD in str(caught.value)
