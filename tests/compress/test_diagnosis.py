"""The loss difference by tensor: exact where it can be worked out, and true of real models."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import zoo_models
from safetensors.torch import save_file

from deltafold.compress import Checkpoint, DeltafoldError
from deltafold.compress.calibration import CalibrationSet, load_source, riemann
from deltafold.compress.calibration.diagnosis import Diagnose, compared_by_row
from deltafold.compress.calibration.quality import batch_logits, predictions
from deltafold.compress.heatmap import heat_map, place_of


class Quadratic(torch.nn.Module):
    """A model whose loss is `1/2 w^T H w + b^T w + const`: logits whose cross entropy is just that."""

    def __init__(self, hessians: list[torch.Tensor], slopes: list[torch.Tensor]) -> None:
        super().__init__()
        self.hessians, self.slopes = hessians, slopes
        self.weights = torch.nn.ParameterList([torch.ones_like(b) for b in slopes])

    def loss(self) -> torch.Tensor:
        pairs = zip(self.weights, self.hessians, self.slopes, strict=True)
        return sum((0.5 * w @ h @ w + b @ w for w, h, b in pairs), torch.zeros(()))

    def forward(self, input_ids, attention_mask, use_cache):
        # Of two tokens the other has the logit z, so that the loss is log(1 + e^z); z inverts that.
        z = torch.log(torch.expm1(self.loss()))
        logits = torch.stack([torch.zeros(()), z]).expand(*input_ids.shape, 2)
        return SimpleNamespace(logits=logits)


def quadratic():
    draw = torch.Generator().manual_seed(0)
    hessians, slopes, change = [], [], {}
    for i, size in enumerate((3, 5)):
        root = torch.randn(size, size, generator=draw)
        hessians.append(root @ root.T / size + torch.eye(size))
        slopes.append(torch.rand(size, generator=draw))
        change[f"weights.{i}"] = torch.randn(size, generator=draw) * 0.3
    return Quadratic(hessians, slopes), change


TWO = CalibrationSet.from_ids("builtin:two", [[0, 0, 0], [0, 0]])


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_of_a_quadratic_loss_the_sum_lacks_just_half_the_curvature_over_the_steps(steps):
    model, change = quadratic()
    before = model.loss().item()
    curvature = {
        f"weights.{i}": (change[f"weights.{i}"] @ h @ change[f"weights.{i}"]).item()
        for i, h in enumerate(model.hessians)
    }
    terms = riemann.loss_terms(model, change, TWO, steps=steps)
    # It now stands at W + P.
    difference = model.loss().item() - before
    missing = sum(curvature.values()) / (2 * steps)
    assert difference - riemann.total(terms) == pytest.approx(missing, rel=1e-3)
    for i, (h, b) in enumerate(zip(model.hessians, model.slopes, strict=True)):
        p, start = change[f"weights.{i}"], torch.ones_like(b)
        own = (0.5 * p @ h @ p + (h @ start + b) @ p).item()
        expected = own - curvature[f"weights.{i}"] / (2 * steps)
        assert terms[f"weights.{i}"] == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    return zoo_models.make(
        tmp_path_factory.mktemp("diagnosis"),
        "Qwen2",
        codecs={"one": "lossless"},
        step=0.03,
        **small,
    )


@pytest.fixture(scope="module")
def diagnose(made):
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 128, (n,), generator=draw).tolist() for n in (9, 5, 9, 7)]
    data = CalibrationSet.from_ids("builtin:test", rows)
    return Diagnose(
        Checkpoint.open(made.base), Checkpoint.open(made.base.parent / "full" / "one"), data
    )


def judged(diagnose, steps, group_bytes=2**30, codecs=("bitdelta",), edits=()):
    chosen = Diagnose(
        diagnose.base, diagnose.target, diagnose.data, steps=steps, group_bytes=group_bytes
    )
    return chosen.run(codecs, edits)


def test_it_comes_closer_to_the_difference_with_more_steps(diagnose):
    few, many = (judged(diagnose, steps).verdicts[0] for steps in (1, 16))
    assert few.difference == many.difference != 0
    gaps = [abs(v.predicted - v.difference) for v in (few, many)]
    assert gaps[1] < gaps[0] / 8
    assert gaps[1] < 0.05 * abs(many.difference)


def test_groups_of_tensors_give_what_all_at_once_give(diagnose):
    whole = judged(diagnose, 3).verdicts[0].terms
    split = judged(diagnose, 3, group_bytes=6000).verdicts[0].terms
    assert whole.keys() == split.keys()
    assert list(whole.values()) == pytest.approx(list(split.values()), rel=1e-4, abs=1e-9)
    # Tied tables are one parameter, and counted once.
    assert "lm_head.weight" not in whole
    assert "model.embed_tokens.weight" in whole


def test_gradients_are_taken_group_by_group(diagnose, monkeypatch):
    """No call asks for more than a group may take, but for a tensor that is larger by itself."""
    asked, real = [], torch.autograd.grad

    def spy(loss, parameters, **options):
        found = real(loss, parameters, **options)
        asked.append([(id(p), p.numel() * p.element_size()) for p in parameters])
        # Nothing else is differentiated, so nothing else takes memory.
        assert all(p.requires_grad for p in parameters)
        assert sum(p.requires_grad for p in model.parameters()) == len(parameters)
        return found

    most, steps = 6000, 2
    model = load_source(diagnose.target)
    change = {n: torch.full_like(p, 1e-4) for n, p in model.named_parameters()}
    monkeypatch.setattr(torch.autograd, "grad", spy)
    riemann.loss_terms(model, change, diagnose.data, steps=steps, group_bytes=most)
    assert all(sum(size for _, size in group) <= most or len(group) == 1 for group in asked)
    assert max(len(group) for group in asked) > 1
    batches = len(list(diagnose.data.batches(8)))
    times = Counter(key for group in asked for key, _ in group)
    assert times == {id(p): steps * batches for p in model.parameters()}


def test_what_helps_is_called_improved(diagnose, made, tmp_path):
    """From half way to where the loss is lowest, a step further on: trained for a little, by hand."""
    target = diagnose.target
    model = load_source(target)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        mean_loss_of(model, diagnose.data).backward()
        optimizer.step()
    trained = dict(model.named_parameters())
    base = Checkpoint.open(made.base)
    folder = tmp_path / "half-way"
    shutil.copytree(target.folder, folder)
    half = {
        name: (base.tensor(name).float() + trained[name].detach()).div(2)
        if name in trained
        else base.tensor(name)
        for name in target.names()
    }
    save_file(
        {n: t.to(target.tensor(n).dtype).contiguous() for n, t in half.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    chosen = Diagnose(base, Checkpoint.open(folder), diagnose.data, steps=1)
    further, back = chosen.run((), ("scale:by=1.8", "scale:by=0.2")).verdicts
    assert (further.label, back.label) == ("improved", "decreased")
    assert further.difference < -further.tolerance


def mean_loss_of(model, data):
    (batch,) = data.batches(len(data.rows))
    found = predictions(batch_logits(model, batch), batch)
    return torch.nn.functional.cross_entropy(found.logits, found.targets)


def test_classes_say_what_the_losses_say(diagnose):
    found = judged(diagnose, 1, codecs=("int:bits=8", "dare:drop=0.97"), edits=("scale:by=0",))
    fine, broken, gone = found.verdicts
    assert fine.label == "competitive"
    assert abs(fine.difference) <= fine.tolerance
    assert gone.kind == "edit"
    # Without its delta the fine-tune is the base.
    assert gone.found.loss == pytest.approx(found.base_loss, rel=1e-5)
    assert broken.found.kl > fine.found.kl
    for verdict in found.verdicts:
        expected = "decreased" if verdict.difference > 0 else "improved"
        assert verdict.label in ("competitive", expected)
    data = found.to_json()
    assert set(data["thresholds"]) == {"share_of_gain", "standard_errors"}
    assert data["verdicts"][0]["class"] == "competitive"
    with pytest.raises(DeltafoldError, match="steps"):
        judged(diagnose, 0)


def test_the_standard_error_is_that_of_the_mean_over_rows(diagnose):
    model = load_source(diagnose.target)
    _, nothing = compared_by_row(model, model, diagnose.data)
    assert nothing == 0.0
    alone = CalibrationSet("one", diagnose.data.rows[:1])
    assert compared_by_row(model, model, alone)[1] == float("inf")


def test_heat_maps_show_each_tensor_at_its_layer():
    values = {
        "model.layers.10.mlp.up_proj.weight": 0.5,
        "model.layers.2.mlp.up_proj.weight": -0.5,
        "lm_head.weight": 0.0,
        "odd <name>.bias": 0.1,
    }
    assert place_of("model.layers.10.mlp.up_proj.weight").row == "layers.10"
    assert place_of("h.3.attn.bias").column == "attn.bias"
    drawn = ElementTree.fromstring(heat_map(values, title="a < b"))
    names = {"s": "http://www.w3.org/2000/svg"}
    groups = drawn.iterfind("s:g", names)
    cells = {g.find("s:title", names).text: g.find("s:rect", names) for g in groups}
    assert len(cells) == len(values)
    (high,) = (c for hint, c in cells.items() if "layers.10." in hint)
    (low,) = (c for hint, c in cells.items() if "layers.2." in hint)
    assert float(low.get("y")) < float(high.get("y"))  # 2 comes before 10
    red, _, blue = map(int, re.findall(r"\d+", high.get("fill")))
    assert red > blue
    red, _, blue = map(int, re.findall(r"\d+", low.get("fill")))
    assert red < blue
    assert "<svg" in heat_map({}, title="nothing")
