"""Large tensors in blocks: the same fine-tune comes back, whatever the codec and the cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from deltafold.compress import Checkpoint, Recipe, parse_spec
from deltafold.compress.dtypes import sha256
from deltafold.compress.fast import Pair
from deltafold.compress.journal import Journal
from deltafold.compress.methods import PairMethod
from deltafold.compress.repo import pad_rows
from deltafold.compress.streaming import Coder
from deltafold.compress.terms import Blocks, Context, Rows, is_exact

ROWS, COLUMNS = 50, 24
SPECS = ["bitdelta:bits=2", "bitdelta:bits=4,group=8", "int:bits=8", "exact", "lossless"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Nine rows a block."""
    monkeypatch.setattr("deltafold.compress.terms.blocks.BLOCK", 9 * COLUMNS)


def pair(folder: Path, change: str, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(3)
    base = torch.randn(ROWS, COLUMNS, generator=draw).mul(0.1).to(dtype)
    step = torch.randn(ROWS, COLUMNS, generator=draw) * 0.01
    if change == "few":
        step[torch.arange(ROWS) % 3 > 0] = 0
    variant = (base.float() + (0 if change == "none" else step)).to(dtype)
    if change == "more":
        variant = torch.cat([variant, torch.full((13, COLUMNS), 0.5, dtype=dtype)])
    if change == "less":
        variant = variant[:-5].clone()
    if change == "stack":
        base, variant = (t.reshape(5, 10, COLUMNS)[..., :24] for t in (base, variant))
        base, variant = (torch.cat([t, t[..., :10]], -1).contiguous() for t in (base, variant))
    write_checkpoint(folder / "base", {"w": base})
    write_checkpoint(folder / "variant", {"w": variant})
    return base, variant


def coded(folder: Path, spec: str):
    source, target = Checkpoint.open(folder / "base"), Checkpoint.open(folder / "variant")
    folder.joinpath("out").mkdir(exist_ok=True)
    with Journal(folder / "out", "test") as journal:
        coder = Coder(source, target, Recipe(default=parse_spec(spec)), journal.put, {})
        assert coder.in_blocks("w")
        found = coder.code("w")
        parts = [{k: journal.part(p) for k, p in places.items()} for places in found.places]
    return found, parts


@pytest.mark.parametrize("change", ["all", "few", "more", "less", "stack"])
@pytest.mark.parametrize("spec", SPECS)
def test_blocks_hold_the_whole_difference(tmp_path, spec, change):
    base, variant = pair(tmp_path, change)
    found, parts = coded(tmp_path, spec)
    assert (found.base, found.variant) == (sha256(base), sha256(variant))
    shape = tuple(variant.shape)
    context = Context("w", pad_rows(base, shape))
    (term,) = found.terms
    promised = {k: (s.dtype, s.shape) for k, s in term.parts(shape).items()}
    assert promised == {k: (p.dtype, tuple(p.shape)) for k, p in parts[0].items()}
    assert isinstance(term, Rows if change in ("few", "more") else Blocks)
    assert context.base is not None
    delta = variant.float() - context.base.float()
    decoded = term.decode(parts[0], shape, context)
    error = ((decoded - delta).norm() / delta.norm()).item()
    assert error < 0.4
    assert found.stats is not None
    if is_exact(term):
        restored = term.restore(parts[0], shape, variant.dtype, context)
        assert sha256(restored) == sha256(variant)
        assert found.stats.error == 0
    elif change in ("all", "stack"):
        assert found.stats.error == pytest.approx(error, rel=1e-4)
        assert found.stats.mean_abs == pytest.approx(delta.abs().mean().item(), rel=1e-4)
        assert found.stats.relative == pytest.approx(
            (delta.norm() / base.float().norm()).item(), rel=1e-4
        )


def test_equal_tensors_store_nothing(tmp_path):
    base, _ = pair(tmp_path, "none")
    found, parts = coded(tmp_path, "int")
    assert found.terms == parts == []
    assert found.variant == sha256(base)


def test_dtypes_may_differ(tmp_path):
    draw = torch.Generator().manual_seed(5)
    base = torch.randn(ROWS, COLUMNS, generator=draw).to(torch.float16)
    write_checkpoint(tmp_path / "base", {"w": base})
    write_checkpoint(tmp_path / "variant", {"w": base.float() + 0.01})
    found, parts = coded(tmp_path, "bitdelta:bits=4")
    decoded = found.terms[0].decode(parts[0], (ROWS, COLUMNS), Context("w", base))
    assert (decoded - 0.01).abs().max() < 1e-4


@pytest.mark.parametrize("spec", [*SPECS, "bitdelta", "bitdelta:bits=3,factor=0.9", "int:group=8"])
def test_a_method_makes_the_same_of_both_models_as_of_their_difference(tmp_path, spec):
    method = parse_spec(spec)
    assert isinstance(method, PairMethod)
    base, variant = pair(tmp_path, "few")
    models, context = Pair.of(variant, base), Context("w", base, variant)
    quick = method.encode_pair(models, context)
    plain = method.encode(models.delta(), context)
    assert [e.term for e in quick] == [e.term for e in plain]
    for ours, theirs in zip(quick, plain, strict=True):
        assert ours.parts.keys() == theirs.parts.keys()
        assert all(torch.equal(ours.parts[k], theirs.parts[k]) for k in ours.parts)


@pytest.mark.parametrize("late", [True, False])
def test_rows_that_stay_equal_only_in_a_later_block(tmp_path, late):
    """What was coded in the belief that all rows changed is given up, and leaves no trace."""
    base, variant = pair(tmp_path, "all")
    part = slice(18, None) if late else slice(0, 18)
    variant[part] = base[part]
    write_checkpoint(tmp_path / "variant", {"w": variant})
    found, parts = coded(tmp_path, "int:bits=8")
    (term,) = found.terms
    assert isinstance(term, Rows)
    changed = (variant.float() != base.float()).any(dim=1)
    assert parts[0]["index"].tolist() == changed.nonzero().flatten().tolist()
    assert found.stats is not None
    delta = variant.float() - base.float()
    rows = delta[changed]
    assert found.stats.mean_abs == pytest.approx(rows.abs().mean().item(), rel=1e-4)
    decoded = term.decode(parts[0], (ROWS, COLUMNS), Context("w", base))
    assert ((decoded - delta).norm() / delta.norm()).item() < 0.05


def test_what_a_job_is_given_of_a_large_tensor_is_kept(tmp_path):
    """Scales that were fitted, say: they are not coded anew because the tensor is large."""
    base, variant = pair(tmp_path, "all")
    delta = variant.float() - base.float()
    terms = parse_spec("int:bits=2").encode(delta, Context("w", base, variant))
    source, target = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "variant")
    (tmp_path / "out").mkdir()
    with Journal(tmp_path / "out", "test") as journal:
        recipe = Recipe(default=parse_spec("int:bits=8"))
        coder = Coder(source, target, recipe, journal.put, {}, given=lambda name: (terms, delta))
        assert not coder.in_blocks("w")
        assert coder.code("w").terms == [e.term for e in terms]
