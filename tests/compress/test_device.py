"""Codecs that run on a device: they make nothing elsewhere, and give what they give on a CPU."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from elsewhere import There, second_device
from packing import tree
from term_checks import bits

from deltafold.compress import (
    METHODS,
    DeltafoldError,
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    fast,
    fast_grid,
    fast_planes,
    parse_spec,
)
from deltafold.compress.evidence import Evidence
from deltafold.compress.fast import Pair
from deltafold.compress.placing import OnDevice, device_named, placed, runs_on_devices
from deltafold.compress.terms import Context

SPECS = [
    "svd", "svd:bits=1", "svd-act:rank=4", "svd-widths", "delta-come", "delta-come:ordered=false",
    "deltazip", "int-hessian", "int-hessian:bits=3,group=16", "codebook", "codebook:bits=4,scale=row",
]  # fmt: skip
CPU = torch.device("cpu")


def example(shape: tuple[int, int], *, turned: bool = False) -> tuple[torch.Tensor, Context]:
    draw = torch.Generator().manual_seed(11)
    base = torch.randn(shape, generator=draw).mul(0.05).to(torch.bfloat16)
    delta = torch.randn(shape, generator=draw) * 1e-3
    inputs = torch.randn(4 * max(shape), shape[0] if turned else shape[1], generator=draw)
    moment = inputs.T @ inputs / len(inputs)
    known = Evidence(row_moment=moment) if turned else Evidence(second_moment=moment)
    return delta, Context("w", base, (base.float() + delta).to(torch.bfloat16), known)


def test_every_codec_that_runs_on_devices_is_here():
    named = {spec.partition(":")[0] for spec in SPECS}
    assert named == {n for n, cls in METHODS.items() if getattr(cls, "on_device", False)}


#: Large matrices take another way in `svd` alone.
CASES = [*itertools.product(SPECS, [(48, 40), (24, 33), (3, 0)]), ("svd", (1100, 1030))]


@pytest.mark.parametrize(("spec", "shape"), CASES, ids=str)
def test_nothing_is_made_on_another_device(spec, shape):
    codec = parse_spec(spec)
    delta, context = example(shape)
    here = codec.encode(delta.clone(), context)
    with second_device() as device:
        there = OnDevice(codec, device).encode(delta.clone(), context)
    assert [t for t, _ in here] == [t for t, _ in there]
    for (_, ours), (_, theirs) in zip(here, there, strict=True):
        assert not any(isinstance(part, There) for part in theirs.values())
        assert {k: bits(p) for k, p in ours.items()} == {k: bits(p) for k, p in theirs.items()}


@pytest.mark.parametrize("spec", ["svd-act", "delta-come", "svd-widths", "int-hessian", "deltazip"])
@pytest.mark.parametrize("known", ["rows", "nothing"])
def test_other_evidence_on_a_device(spec, known):
    codec = parse_spec(spec)
    delta, context = example((24, 40), turned=True)
    if known == "nothing":
        context = replace(context, evidence=Evidence())
    here = codec.encode(delta.clone(), context)
    with second_device() as device:
        there = placed(codec, device).encode(delta.clone(), context)
    for (_, ours), (_, theirs) in zip(here, there, strict=True):
        assert {k: bits(p) for k, p in ours.items()} == {k: bits(p) for k, p in theirs.items()}


def test_the_second_device_finds_what_a_gpu_would():
    with second_device() as device:
        one = torch.ones(3).to(device)
        assert (one + 1).cpu().tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="two devices"):
            one + torch.ones(3)
        with pytest.raises((RuntimeError, TypeError)):
            one.numpy()
        assert isinstance(torch.zeros(2, device=one.device), There)


def test_loops_in_c_leave_other_devices_alone():
    """Pointers of a device must never reach them; torch gives the same."""
    _, context = example((9, 50))
    assert context.variant is not None
    own = Pair(context.variant, context.base)
    signs, levels = torch.zeros(2, 9, 7, dtype=torch.uint8), torch.rand(2, 9, 2)
    scales = fast_grid.best_scales(own, 25, 4, (1.0, 0.9))
    codes = fast_grid.codes(own, 25, 4, scales)

    def everything(pair: Pair, moved) -> list[torch.Tensor | float]:
        planes, total = moved(signs.clone()), moved(torch.zeros(9, 50))
        sums = fast_planes.take_plane(pair, 25, moved(levels)[:0], planes)
        fast_planes.add_plane(total, planes[0], moved(levels)[0], 25)
        return [
            fast.difference(*pair),
            *fast.totals(pair),
            fast.rows_changed(pair.variant, pair.base),
            sums,
            planes,
            total,
            fast_planes.planes_missed(pair, 25, moved(levels), planes),
            fast_grid.best_scales(pair, 25, 4, (1.0, 0.9)),
            fast_grid.codes(pair, 25, 4, moved(scales)),
            fast_grid.codes_missed(pair, 25, 4, moved(scales), moved(codes)),
            fast_grid.values(moved(codes), 50, 25, 4, moved(scales)),
        ]

    here = everything(own, lambda t: t)
    with second_device() as device:
        there = everything(Pair(*(t.to(device) for t in own)), lambda t: t.to(device))
        there = [t.cpu() if isinstance(t, torch.Tensor) else t for t in there]
    for ours, theirs in zip(here, there, strict=True):
        same = ours == theirs
        assert bool(same.all()) if isinstance(same, torch.Tensor) else same


@pytest.fixture
def models(tmp_path) -> tuple[Path, Path]:
    draw = torch.Generator().manual_seed(8)
    base = {
        f"layers.{n}.w": torch.randn(48, 40, generator=draw).to(torch.bfloat16) for n in range(3)
    }
    steps = {n: torch.randn(48, 40, generator=draw).mul(0.01) for n in base}
    tuned = {n: (v.float() + steps[n]).to(torch.bfloat16) for n, v in base.items()}
    # Only some rows of this one changed.
    tuned["layers.1.w"][8:] = base["layers.1.w"][8:]
    tuned["layers.3.norm"] = torch.ones(40)
    base["layers.3.norm"] = torch.zeros(40)
    return write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "ft", tuned)


RECIPE = Recipe(
    default=parse_spec("svd:rank=4"),
    overrides=(("layers.2.*", parse_spec("dare+codebook")),),
)


def test_a_run_on_a_device(models, tmp_path):
    """The whole way: rows, edits and vectors too; the report counts what was coded there."""
    plain = compress_checkpoint(*models, tmp_path / "plain", recipe=RECIPE)
    with second_device() as device:
        report = compress_checkpoint(*models, tmp_path / "there", recipe=RECIPE, device=str(device))
    assert tree(tmp_path / "plain") == tree(tmp_path / "there")
    assert (plain.device, plain.on_device) == ("cpu", 0)
    assert (report.device, report.on_device) == ("meta", 3)


def test_codecs_that_loop_in_c_stay_on_the_cpu(models, tmp_path):
    for spec in ("bitdelta", "int", "lossless", "lloyd"):
        assert not runs_on_devices(parse_spec(spec))
        assert placed(parse_spec(spec), torch.device("meta")) == parse_spec(spec)
    assert placed(parse_spec("svd"), CPU) == parse_spec("svd")


def test_a_journal_of_another_device_is_dropped(models, tmp_path):
    def stop(event):
        if event.done == 2:
            raise KeyboardInterrupt

    for recipe, kept in ((RECIPE, 0), (Recipe(), 2)):
        with pytest.raises(KeyboardInterrupt):
            compress_checkpoint(*models, tmp_path / f"kept{kept}", recipe=recipe, progress=stop)
        with second_device() as device:
            report = compress_checkpoint(
                *models, tmp_path / f"kept{kept}", recipe=recipe, device=str(device)
            )
        # Where no codec runs there, the device does not matter.
        assert report.resumed == kept


def test_a_device_that_is_none(models, tmp_path):
    for name in ("abacus", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(DeltafoldError) as caught:
            compress_checkpoint(*models, tmp_path / "out", device=name)
        assert caught.value.code == "bad-argument"
        assert not (tmp_path / "out").exists()


def test_a_device_without_room(models, tmp_path, monkeypatch):
    def full(*_, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.linalg.svd", full)
    with second_device() as device, pytest.raises(DeltafoldError) as caught:
        compress_checkpoint(*models, tmp_path / "out", recipe=RECIPE, device=str(device))
    assert caught.value.code == "not-enough-memory"
    assert "layers." in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("spec", SPECS)
def test_a_gpu_codes_as_well_as_a_cpu(spec):
    """As near to the delta, or to the layer's outputs; and twice the same bytes."""
    delta, context = example((192, 256))
    codec = parse_spec(spec)
    assert context.evidence is not None
    moment = context.evidence.second_moment
    errors, found = [], []
    for device in ("cpu", "cuda", "cuda"):
        coded = placed(codec, device_named(device)).encode(delta.clone(), context)
        found.append([{k: bits(p) for k, p in parts.items()} for _, parts in coded])
        left = delta - sum(t.decode(p, (192, 256), Context("w", context.base)) for t, p in coded)
        errors.append(float(((left @ moment) * left).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert found[1] == found[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu(models, tmp_path):
    report = compress_checkpoint(*models, tmp_path / "gpu", recipe=RECIPE, device="cuda", jobs=2)
    plain = compress_checkpoint(*models, tmp_path / "cpu", recipe=RECIPE)
    assert (report.device, report.on_device) == ("cuda", 3)
    for name, entry in plain.manifest.tensors.items():
        other = DeltaRepo.open(tmp_path / "gpu").manifest.tensors[name]
        assert other.rel_error == pytest.approx(entry.rel_error, rel=0.02, abs=1e-4)
