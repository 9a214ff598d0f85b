"""PEFT LoRAs of classifiers: a head in `modules_to_save`, the folder served as it lies in the zoo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pooling_zoo
import pytest
import torch
import transformers
from adapters import write_adapter
from arch_encoders import _TEXT
from click.testing import CliRunner

from deltafold.compress import DeltafoldError, DeltaRepo, import_lora, restore_checkpoint
from deltafold.runtime import PoolingEngine, PoolRequest
from deltafold.server.cli.main import cli

SIZES = {**_TEXT, "pad_token_id": 1}
LABELS = {0: "no", 1: "maybe", 2: "yes"}


def adapter(folder: Path, dense: Any, *, config: bool = True) -> None:
    """A LoRA of query and value with a saved classifier; `dense` becomes the merged model."""
    noise, tensors = torch.Generator().manual_seed(3), {}
    with torch.no_grad():
        for name, module in dense.named_modules():
            if name.endswith((".query", ".value")):
                a = torch.randn(4, 32, generator=noise) * 0.2
                b = torch.randn(32, 4, generator=noise) * 0.2
                tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
                module.weight += 2 * b @ a
        for name, value in dense.classifier.named_parameters():
            value += torch.randn(value.shape, generator=noise) * 0.3
            tensors[f"classifier.{name}"] = value.detach().clone()
    # For a classifier PEFT names both usual heads, whichever the model has.
    saved = ["classifier", "score"]
    names = {"target_modules": ["query", "value"], "modules_to_save": saved}
    write_adapter(folder, tensors, task_type="SEQ_CLS", **names)
    if config:
        dense.config.architectures = ["RobertaForSequenceClassification"]
        (folder / "config.json").write_text(dense.config.to_json_string())


@pytest.fixture(params=["RobertaForMaskedLM", "RobertaModel"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[pooling_zoo.Made, Any]:
    """A base with or without a prefix before its names, a full fine-tune, and a merged LoRA."""
    made = pooling_zoo.Made(tmp_path)
    config = transformers.RobertaConfig(**SIZES)
    pooling_zoo.save(getattr(transformers, request.param), config, made.base)
    cls = transformers.RobertaForSequenceClassification
    made.tune(cls, "full", "int:bits=8", num_labels=2)
    dense = cls.from_pretrained(made.base, num_labels=3, id2label=LABELS).eval()
    return made, dense


def test_a_lora_classifier_is_served_from_its_folder(made: tuple[pooling_zoo.Made, Any]) -> None:
    zoo, dense = made
    adapter(zoo.zoo / "lora", dense)
    asked = [PoolRequest(n, [4, *range(6, 9 + i)]) for i, n in enumerate(["lora", "full"] * 2)]
    with PoolingEngine.open(zoo.base, zoo.zoo, device="cpu") as engine:
        steps = engine.stats().steps
        found = engine.classify(asked)
        assert engine.stats().steps == steps + 1, "one forward pass for all of them"
        assert engine.resolve("lora").applied == "delta"
    for request, scores in zip(asked, found, strict=True):
        model = dense if request.variant == "lora" else zoo.dense("full")
        with torch.inference_mode():
            expected = model(torch.tensor([request.input])).logits[0]
        assert (torch.tensor(scores.logits) - expected).abs().max() < 1e-5, request.variant
    assert set(found[0].labels) == set(LABELS.values())


def test_the_imported_delta_is_the_merged_model(
    made: tuple[pooling_zoo.Made, Any], tmp_path: Path
) -> None:
    zoo, dense = made
    adapter(tmp_path / "lora", dense)
    arguments = [str(zoo.base), str(tmp_path / "lora"), "-o", str(tmp_path / "delta")]
    result = CliRunner().invoke(cli, ["import-lora", *arguments])
    assert result.exit_code == 0, result.output
    manifest = DeltaRepo.open(tmp_path / "delta").manifest
    assert manifest.accepted == ("new-tensors",)
    bare = json.loads((zoo.base / "config.json").read_text())["architectures"] == ["RobertaModel"]
    assert (manifest.base_names is not None) == bare
    restore_checkpoint(tmp_path / "delta", zoo.base, tmp_path / "whole", dtype=torch.float32)
    whole = transformers.RobertaForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    ids = torch.tensor([[4, 7, 8, 9]])
    with torch.inference_mode():
        assert (whole(ids).logits - dense(ids).logits).abs().max() < 1e-5


def test_without_a_class_of_its_own_a_new_head_is_refused(
    made: tuple[pooling_zoo.Made, Any], tmp_path: Path
) -> None:
    """The base's class has no place for it. A copy of the base's configuration says no more."""
    zoo, dense = made
    adapter(tmp_path / "lora", dense, config=False)
    for copied in (False, True):
        if copied:
            shutil.copy(zoo.base / "config.json", tmp_path / "lora" / "config.json")
        with pytest.raises(DeltafoldError) as caught:
            import_lora(zoo.base, tmp_path / "lora", tmp_path / "delta")
        assert caught.value.code == "unexpected-tensor"
        assert "classifier" in str(caught.value)
