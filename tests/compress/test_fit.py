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
from deltafold.compress.terms import (
    NM,
    Banded,
    Blocks,
    Codes,
    ColumnPlanes,
    Columns,
    Context,
    Patches,
    Planes,
    Rows,
    blocks,
)
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
    Codes(bits=4, scale_format="float32"),
    Rows(inner=Planes(bits=2)),
    Columns(inner=Codes(bits=4)),
    ColumnPlanes(bits=2),
    NM(),
    NM(keep=1, of=4, bits=8, group=6),
    Patches(size=5, widths=(8,), shares=(1.0,)),
    Blocks(rows=5, inner=(Planes(bits=2, scale="row"),)),
    Blocks(rows=7, inner=(Codes(bits=4, group=16),)),
    Rows(inner=Blocks(rows=4, inner=(Planes(scale="group", group=16),))),
]


def test_tensors_in_blocks_are_fitted_as_well(tmp_path, data, monkeypatch):
    """Matrices of more than 2^24 entries are coded in blocks; here of more than 2,048."""
    monkeypatch.setattr(blocks, "BLOCK", 2048)
    first = pack(tmp_path / "first", "bitdelta")
    matrices = [n for n, entry in first.manifest.tensors.items() if len(entry.shape) > 1]
    cut = [n for n in matrices if any(isinstance(t, Blocks) for t in first.terms(n))]
    assert len(cut) > len(matrices) / 2
    few = LogitFit(steps=2, lr=1e-3, batch=16)
    report = fit_scales(first.folder, BASE, VARIANT, tmp_path / "out", data, fit=few)
    found, fitted = report.manifest.quality["fit"], DeltaRepo.open(tmp_path / "out")
    assert (found["tensors"], found["left_out"]) == (len(matrices), 0)
    assert found["kept"] == "fitted"
    for name in cut:
        (_, old), (_, new) = *first.parts(name), *fitted.parts(name)
        assert {k for k in old if not torch.equal(old[k], new[k])} >= {"0.scales", "1.scales"}


def test_a_recipe_that_fits_is_followed_or_refused(tmp_path, data):
    recipe = Recipe(default=parse_spec("bitdelta"), fit=LogitFit(steps=1, lr=1e-3, batch=16))
    report = compress_and_fit(BASE, VARIANT, tmp_path / "out", data, recipe=recipe)
    assert report.manifest.recipe["fit"] == recipe.fit.record()
    assert Recipe.from_mapping(report.manifest.recipe) == recipe
    with pytest.raises(DeltafoldError, match="fits scales") as refused:
        compress_checkpoint(BASE, VARIANT, tmp_path / "none", recipe=recipe)
    assert refused.value.code == "bad-argument"
    assert not (tmp_path / "none").exists()


def test_what_has_no_scales_is_counted(tmp_path, data):
    recipe = Recipe(
        default=parse_spec("bitdelta"), overrides=(("*mlp*", parse_spec("svd:rank=4")),)
    )
    few = LogitFit(steps=1, lr=1e-3, batch=16)
    report = compress_and_fit(BASE, VARIANT, tmp_path / "out", data, fit=few, recipe=recipe)
    entries = report.manifest.tensors
    assert report.manifest.quality["fit"]["left_out"] == sum("mlp" in name for name in entries)


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
    for value in tensor.values.values():
        assert bool((value.grad != 0).any())
        value.data.mul_(-3)
    (again,) = tensor.stored()
    written = {key: (part.dtype, part.shape) for key, part in again.parts.items()}
    assert written == {key: (part.dtype, part.shape) for key, part in encoded.parts.items()}
    torch.testing.assert_close(
        again.term.decode(again.parts, shape, context), -3 * plain, rtol=2e-3, atol=1e-7
    )


def test_scales_of_both_factors_are_trained():
    """A product of two coded factors: what is -3 times as large on both sides is 9 times as large."""
    delta = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)) * 0.01
    context = Context("w", torch.zeros_like(delta), delta)
    encoded = Banded(ranks=(2, 4), widths=(8, 3)).encode(delta, context)
    tensor = TrainableTensor.open([encoded], (12, 40), context)
    tensor.decode().square().sum().backward()
    assert {key for _, key in tensor.values} == {"a0.scales", "a1.scales", "b0.scales", "b1.scales"}
    for value in tensor.values.values():
        assert bool((value.grad != 0).any())
        value.data.mul_(-3)
    (again,) = tensor.stored()
    plain, more = (e.term.decode(e.parts, (12, 40), context) for e in (encoded, again))
    torch.testing.assert_close(more, 9 * plain, rtol=5e-3, atol=1e-6)
