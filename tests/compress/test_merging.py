"""Merging delta repos: what is read, what is refused, and what the result says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import Pair, bits, fine_tuned, write_checkpoint
from packing import LOSSLESS, MATRIX, TABLE

from deltafold.compress import (
    DeltafoldError,
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    merge_deltas,
    parse_spec,
    twin_deltas,
    verify_delta,
)
from deltafold.compress.merges import MERGES, Task, Ties, Twin, parse_merge
from deltafold.compress.recipe import parse_edit_for

WIDE = Recipe(default=parse_spec("scale:by=1+exact"))  # float32 differences
NORM = "model.norm.weight"


@pytest.fixture
def family(pair) -> tuple[Pair, list[Path]]:
    """Two fine-tunes of one base, packed with different codecs."""
    other = fine_tuned(pair.base_tensors, seed=9)
    folder = write_checkpoint(pair.root / "other", other)
    folders = []
    for name, variant, recipe in (
        ("sql", pair.variant, LOSSLESS),
        ("law", folder, Recipe(default=parse_spec("int:bits=8"))),
    ):
        folders.append(pair.root / "deltas" / name)
        compress_checkpoint(pair.base, variant, folders[-1], recipe=recipe)
    return pair, folders


def decoded(folder: Path, pair: Pair, name: str) -> torch.Tensor:
    repo, base = DeltaRepo.open(folder), pair.base_tensors.get(name)
    if name in repo.manifest.unchanged:
        return torch.zeros_like(base, dtype=torch.float32)
    return repo.delta(name, base)


def test_a_merge_is_the_merge_of_the_decoded_deltas(family):
    pair, folders = family
    merge_deltas(
        pair.base, folders, pair.out, method=Task(scale=0.5), weights=[1, 0.5], recipe=WIDE
    )
    assert verify_delta(pair.out, base=pair.base, full=True)
    for name in (MATRIX, TABLE, "model.layers.0.mlp.experts.down_proj"):
        first, second = (decoded(f, pair, name) for f in folders)
        expected = 0.5 * first + 0.25 * second
        torch.testing.assert_close(decoded(pair.out, pair, name), expected, rtol=1e-5, atol=1e-8)
    repo = DeltaRepo.open(pair.out)
    norm = pair.base_tensors[NORM].float()
    first, second = (decoded(f, pair, NORM) for f in folders)
    expected = (norm + 0.5 * first + 0.25 * second).to(pair.base_tensors[NORM].dtype)
    assert bits(repo.restored(NORM, pair.base_tensors[NORM])) == bits(expected)


def test_ties_sees_both_models_whole(family):
    pair, folders = family
    merge_deltas(pair.base, folders, pair.out, method=Ties(keep=0.3), recipe=WIDE)
    names = [n for n, b in pair.base_tensors.items() if b.is_floating_point()]
    both = {n: [decoded(f, pair, n) for f in folders] for n in names}
    ready = Ties(keep=0.3).survey(list(both.items()), [1.0, 1.0])
    for name in (MATRIX, TABLE):
        expected = ready.merge(both[name], [1.0, 1.0], None)
        assert (expected == 0).any()
        torch.testing.assert_close(decoded(pair.out, pair, name), expected)


def test_the_result_names_its_parents(family):
    pair, folders = family
    report = merge_deltas(pair.base, folders, pair.out, method=Task(), weights=[1.0, 2.0])
    record = report.manifest.recipe["merge"]
    assert record["method"] == "task"
    assert record["weights"] == [1.0, 2.0]
    assert [d["name"] for d in record["deltas"]] == ["sql", "law"]
    assert [d["delta_id"] for d in record["deltas"]] == [DeltaRepo.open(f).digest for f in folders]
    assert report.manifest.variant.name == "sql+law"
    assert "A merge of fine-tunes" in (pair.out / "README.md").read_text()
    assert report.coverage == 1.0


def test_companions_come_from_the_delta_that_is_asked_for(family):
    pair, folders = family
    other = pair.root / "other"
    (other / "generation_config.json").write_text('{"top_k": 7}')
    compress_checkpoint(pair.base, other, folders[1], overwrite=True)
    merge_deltas(pair.base, folders, pair.out, method=Task(), companions=1)
    assert (pair.out / "generation_config.json").read_text() == '{"top_k": 7}'
    with pytest.raises(DeltafoldError, match="delta 3 of 2"):
        merge_deltas(pair.base, folders, pair.root / "x", method=Task(), companions=2)


def test_edits_come_after_the_merge(family):
    pair, folders = family
    recipe = Recipe(default=parse_spec("exact"), edits=(parse_edit_for("trim:keep=0.2"),))
    merge_deltas(pair.base, folders, pair.out, method=Task(scale=1.0), recipe=recipe)
    found = decoded(pair.out, pair, MATRIX)
    expected = sum(decoded(f, pair, MATRIX) for f in folders)
    assert 0 < int((found != 0).sum()) < found.numel()
    torch.testing.assert_close(found[found != 0], expected[found != 0])


def test_a_delta_minus_itself_is_the_base(family):
    pair, folders = family
    twice = [folders[0], folders[0]]
    report = merge_deltas(pair.base, twice, pair.out, method=Task(), weights=[1.0, -1.0])
    assert not [n for n in report.manifest.tensors if pair.base_tensors[n].is_floating_point()]


def grown(pair: Pair, rows: int, name: str, words=("a", "b")) -> Path:
    tensors = dict(pair.variant_tensors)
    for table in (TABLE, "lm_head.weight"):
        more = torch.full((rows, tensors[table].shape[1]), float(rows)).to(tensors[table].dtype)
        tensors[table] = torch.cat([tensors[table], more])
    folder = write_checkpoint(pair.root / name, tensors, words=words)
    out = pair.root / "deltas" / name
    compress_checkpoint(pair.base, folder, out, recipe=LOSSLESS, accept=["resized", "tokenizer"])
    return out


def test_rows_beyond_the_base_are_averaged(pair):
    folders = [grown(pair, 2, "a"), grown(pair, 2, "b")]
    report = merge_deltas(pair.base, folders, pair.out, method=Task(scale=0.4), weights=[1, 3])
    assert "resized" in report.manifest.accepted
    found = decoded(pair.out, pair, TABLE)
    assert torch.equal(found[-2:], torch.full_like(found[-2:], 2.0))


@pytest.mark.parametrize("kind", ["sizes", "tokens", "new"])
def test_other_structures_are_refused(pair, kind):
    first, code = grown(pair, 2, "a"), "shape-mismatch"
    if kind == "sizes":
        second = grown(pair, 3, "b")
    elif kind == "tokens":
        second, code = grown(pair, 2, "b", words=("x", "y")), "tokenizer-changed"
    else:
        pair.rewrite(score__weight=torch.ones(2, 3))
        second, code = pair.root / "deltas" / "c", "unexpected-tensor"
        compress_checkpoint(pair.base, pair.variant, second, accept=["new-tensors"])
    with pytest.raises(DeltafoldError) as caught:
        merge_deltas(pair.base, [first, second], pair.out, method=Task())
    assert caught.value.code == code
    assert not pair.out.exists()


def test_new_tensors_that_all_have_are_averaged(pair):
    folders = []
    for number in (1.0, 3.0):
        pair.rewrite(score__weight=torch.full((2, 3), number))
        folders.append(pair.root / "deltas" / str(number))
        compress_checkpoint(pair.base, pair.variant, folders[-1], accept=["new-tensors"])
    merge_deltas(pair.base, folders, pair.out, method=Task())
    found = DeltaRepo.open(pair.out).restored("score.weight", None)
    assert torch.equal(found, torch.full((2, 3), 2.0))


def test_another_base_is_refused(family):
    pair, folders = family
    changed = {**pair.base_tensors, NORM: pair.base_tensors[NORM] + 1}
    other = write_checkpoint(pair.root / "other-base", changed)
    with pytest.raises(DeltafoldError) as caught:
        merge_deltas(other, folders, pair.out, method=Task())
    assert caught.value.code == "base-mismatch"


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")]])
def test_weights_go_with_deltas(family, weights):
    pair, folders = family
    with pytest.raises(DeltafoldError) as caught:
        merge_deltas(pair.base, folders, pair.out, method=Task(), weights=weights)
    assert caught.value.code == "bad-argument"


def test_twin_splits_into_what_is_shared_and_what_is_not(family):
    pair, folders = family
    with pytest.raises(DeltafoldError, match="several deltas"):
        merge_deltas(pair.base, folders, pair.out, method=parse_merge("twin"))
    reports = twin_deltas(
        pair.base, folders, pair.out, method=Twin(scale=0.3, keep=1.0), recipe=WIDE
    )
    assert sorted(p.name for p in pair.out.iterdir()) == ["law", "shared", "sql"]
    assert list(reports) == ["shared", "sql", "law"]
    for name in (MATRIX, TABLE, "model.patch.conv.weight"):
        first, second = (decoded(f, pair, name) for f in folders)
        shared = decoded(pair.out / "shared", pair, name)
        torch.testing.assert_close(shared, 0.3 * (first + second))
        # At full rank shared and own together are the fine-tune.
        for task, delta in (("sql", first), ("law", second)):
            own = decoded(pair.out / task, pair, name)
            error = (shared + own - delta).norm() / delta.norm()
            assert error < 2e-3, name
    assert DeltaRepo.open(pair.out / "sql").terms(MATRIX)[0].id == "lowrank"
    record = reports["law"].manifest.recipe["merge"]
    assert record["shared"] == reports["shared"].manifest.delta_id
    assert reports["law"].out == pair.out / "law"


def test_twin_keeps_a_share_of_the_ranks_and_refuses_one_name_for_two(family):
    pair, folders = family
    twin_deltas(pair.base, folders, pair.out, method=Twin(keep=0.25))
    (term,) = DeltaRepo.open(pair.out / "sql").terms(MATRIX)
    assert term.rank == 10
    with pytest.raises(DeltafoldError, match="'sql'"):
        twin_deltas(pair.base, [folders[0], folders[0]], pair.root / "x")


@pytest.mark.parametrize("method", MERGES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_does_not_spread(family, method, value):
    """A lossless parent may hold NaN; a merge of it is refused, and leaves nothing."""
    pair, folders = family
    broken = {n: t.clone() for n, t in pair.variant_tensors.items()}
    broken[MATRIX][0, 0] = value
    folder = write_checkpoint(pair.root / "broken", broken)
    compress_checkpoint(pair.base, folder, pair.root / "deltas" / "nan", recipe=LOSSLESS)
    several = [pair.root / "deltas" / "nan", folders[1]]
    merge = twin_deltas if method == "twin" else merge_deltas
    with pytest.raises(DeltafoldError) as caught:
        merge(pair.base, several, pair.out, method=parse_merge(method))
    assert caught.value.code == "not-finite"
    assert not pair.out.exists()
