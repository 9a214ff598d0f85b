"""Scale distillation on a really trained fine-tune: the demo's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo_models

from deltafold.compress import (
    DeltafoldError,
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    parse_spec,
    verify_delta,
)
from deltafold.compress.calibration import (
    CalibrationSet,
    LogitFit,
    compress_and_fit,
    fit_scales,
    read_calibration,
)
from deltafold.compress.calibration.trainable import TrainableTensor
from deltafold.compress.terms import Codes, Context, Planes, Rows
from deltafold.server.demo import tasks
from deltafold.server.demo.tokenizer import prompt_of
from deltafold.server.demo.zoo import data_folder

BASE = data_folder() / "base"
#: Losslessly packed: it stands for the fine-tune itself.
VARIANT = data_folder() / "zoo" / "rot13"
FAST = LogitFit(steps=12, lr=1e-3, batch=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "words.jsonl"
    lines = [
        {"prompt": prompt_of(word), "completion": tasks.apply("rot13", word)}
        for word in tasks.held_out_words(48)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_calibration(file, VARIANT)


def pack(out: Path, spec: str) -> DeltaRepo:
    compress_checkpoint(BASE, VARIANT, out, recipe=Recipe(default=parse_spec(spec)))
    return DeltaRepo.open(out)


def test_fitting_brings_the_logits_closer_and_changes_scales_alone(tmp_path, data):
    first = pack(tmp_path / "first", "bitdelta")
    report = fit_scales(first.folder, BASE, VARIANT, tmp_path / "out", data, fit=FAST)
    assert verify_delta(tmp_path / "out", base=BASE, full=True).coded == len(
        report.manifest.tensors
    )
    found, fitted = report.manifest.quality["fit"], DeltaRepo.open(tmp_path / "out")
    assert found["kept"] == "fitted"
    assert found["logit_mse"][1] < 0.8 * found["logit_mse"][0]
    assert found["kl"][1] < found["kl"][0]
    assert report.manifest.recipe["fit"] == FAST.record()
    assert fitted.digest != first.digest
    assert report.manifest.totals.payload_bytes == first.manifest.totals.payload_bytes
    changed = set()
    for name in first.manifest.tensors:
        for (term, old), (same, new) in zip(first.parts(name), fitted.parts(name), strict=True):
            assert term == same
            changed |= {key for key in old if not torch.equal(old[key], new[key])}
    # The embedding's unused rows are left out: its scales are those of an inner term.
    assert changed == {"scales", "inner.scales"}


def test_scales_that_were_made_wrong_are_found_again(tmp_path, data):
    wrong = pack(tmp_path / "wrong", "bitdelta:factor=0.3,scale=row")
    fit = LogitFit(steps=15, lr=2e-3, batch=16)
    found = fit_scales(wrong.folder, BASE, VARIANT, tmp_path / "out", data, fit=fit)
    right = pack(tmp_path / "right", "bitdelta:scale=row")
    # One step too small to change anything: it tells the error of the scales as they are.
    still = LogitFit(steps=1, lr=1e-12, batch=16)
    plain = fit_scales(right.folder, BASE, VARIANT, tmp_path / "plain", data, fit=still)
    before, after = found.manifest.quality["fit"]["logit_mse"]
    assert after < plain.manifest.quality["fit"]["logit_mse"][0] < before


def test_fitting_twice_gives_the_same_delta(tmp_path, data):
    recipe = Recipe(default=parse_spec("int:bits=2"))
    few = LogitFit(steps=2, lr=1e-3, batch=16)
    first, second = (
        compress_and_fit(BASE, VARIANT, tmp_path / name, data, fit=few, recipe=recipe).manifest
        for name in ("a", "b")
    )
    assert first.delta_id == second.delta_id
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_scales_that_would_get_worse_stay_as_they_were(tmp_path, data):
    first = pack(tmp_path / "first", "bitdelta:bits=4,group=64")
    wild = LogitFit(steps=1, lr=1.0, batch=16)
    report = fit_scales(first.folder, BASE, VARIANT, tmp_path / "out", data, fit=wild)
    assert report.manifest.quality["fit"]["kept"] == "initial"
    assert report.manifest.delta_id == first.digest


def test_two_factors_of_the_whole_model_are_found(tmp_path, data):
    """What was scaled down by too much is scaled up again, by the same factor in every tensor."""
    first = pack(tmp_path / "first", "shift-scale:vector=(svd:bits=0.5),shift=1.4,scale=0.5")
    fit = LogitFit(steps=25, lr=0.1, batch=16, what="terms")
    report = fit_scales(first.folder, BASE, VARIANT, tmp_path / "out", data, fit=fit)
    found, fitted = report.manifest.quality["fit"], DeltaRepo.open(tmp_path / "out")
    assert found["what"] == "terms"
    assert found["logit_mse"][1] < 0.5 * found["logit_mse"][0]
    shift, scale = found["factors"]
    assert scale > 1.5 > shift
    assert report.manifest.totals.payload_bytes == first.manifest.totals.payload_bytes
    assert verify_delta(tmp_path / "out", base=BASE, full=True).coded == len(first.manifest.tensors)
    for name in first.manifest.tensors:
        before, after = first.parts(name), fitted.parts(name)
        if len(before) < 2:
            assert first.exact(name)
            continue
        shape = tuple(first.entry(name).shape)
        context = Context(name, torch.zeros(shape))
        for old, new, factor in zip(before, after, (shift, scale), strict=True):
            expected = factor * old.term.decode(old.parts, shape, context)
            torch.testing.assert_close(
                new.term.decode(new.parts, shape, context), expected, rtol=1e-4, atol=1e-7
            )


def test_what_cannot_be_fitted_is_refused(tmp_path, data):
    lossless = pack(tmp_path / "lossless", "lossless")
    with pytest.raises(DeltafoldError, match="no scales to fit"):
        fit_scales(lossless.folder, BASE, VARIANT, tmp_path / "out", data)
    other = VARIANT.parent / "title"
    with pytest.raises(DeltafoldError, match="another fine-tune"):
        fit_scales(lossless.folder, BASE, other, tmp_path / "out", data)
    (tmp_path / "there").mkdir()
    with pytest.raises(DeltafoldError) as refused:
        compress_and_fit(BASE, VARIANT, tmp_path / "there", data)
    assert refused.value.code == "exists"
    assert not (tmp_path / "out").exists()


def test_scales_of_fused_experts_are_refused(tmp_path):
    made = zoo_models.make(
        tmp_path, "Mixtral", codecs={"a": "bitdelta"}, num_local_experts=2, hidden_size=32
    )
    data = CalibrationSet.from_ids("builtin:test", [[1, 2, 3]])
    variant = tmp_path / "full" / "a"
    with pytest.raises(DeltafoldError, match=r"experts.*another layout") as refused:
        fit_scales(made.zoo / "a", made.base, variant, tmp_path / "out", data)
    assert refused.value.code == "engine-unsupported"


TERMS = [
    Planes(bits=2, scale="group", group=16),
    Planes(bits=3, scale="row"),
    Planes(scale="tensor", scale_format="float32"),
    Codes(bits=4, group=16),
    Rows(inner=Planes(bits=2)),
]


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_trained_scales_are_written_in_their_own_format(term):
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(12, 40, generator=draw) * 0.01
    delta[3] = 0
    context = Context("w", torch.zeros_like(delta), delta)
    encoded = term.encode(delta, context)
    shape = tuple(delta.shape)
    tensor = TrainableTensor.open([encoded], shape, context)
    plain = encoded.term.decode(encoded.parts, shape, context)
    torch.testing.assert_close(tensor.decode().detach(), plain, rtol=1e-6, atol=0)
    tensor.decode().square().sum().backward()
    (value,) = tensor.values.values()
    assert bool((value.grad != 0).any())
    with torch.no_grad():
        value.mul_(-3)
    (again,) = tensor.stored()
    written = {key: (part.dtype, part.shape) for key, part in again.parts.items()}
    assert written == {key: (part.dtype, part.shape) for key, part in encoded.parts.items()}
    torch.testing.assert_close(
        again.term.decode(again.parts, shape, context), -3 * plain, rtol=2e-3, atol=1e-7
    )
