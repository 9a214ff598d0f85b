"""Zoos: what comes in, what goes out, aliases, and storing once what deltas have in common."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import base_tensors, fine_tuned, write_checkpoint
from killing import killed_at
from packing import tree

from deltafold.compress import DeltafoldError, DeltaRepo, Recipe, compress_checkpoint, verify_delta
from deltafold.compress import zoo_folder as on_disk
from deltafold.compress.zoo_add import add_delta, remove_variant
from deltafold.compress.zoo_aliases import read_aliases, remove_alias, set_alias
from deltafold.compress.zoo_gc import collect
from deltafold.compress.zoo_list import list_zoo, verify_zoo

EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base and three deltas; two of them share all but the query, the third shares embeddings."""
    root = tmp_path_factory.mktemp("made")
    base = base_tensors()
    write_checkpoint(root / "base", base)
    first = fine_tuned(base)
    query = "model.layers.0.self_attn.q_proj.weight"
    second = {**first, query: fine_tuned(base, seed=2)[query]}
    third = {**fine_tuned(base, seed=3), EMBEDDINGS: first[EMBEDDINGS]}
    for name, tensors in {"one": first, "two": second, "three": third}.items():
        write_checkpoint(root / f"ft-{name}", tensors)
        recipe = Recipe()
        compress_checkpoint(root / "base", root / f"ft-{name}", root / "zoo" / name, recipe=recipe)
    return root


@pytest.fixture
def zoo(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "zoo", tmp_path / "zoo"))


def other_delta(root: Path) -> Path:
    """A delta of another base."""
    base = base_tensors(seed=9)
    write_checkpoint(root / "base9", base)
    write_checkpoint(root / "ft9", fine_tuned(base))
    compress_checkpoint(root / "base9", root / "ft9", root / "nine")
    return root / "nine"


def refused(code: str, work, *args, **options) -> DeltafoldError:
    with pytest.raises(DeltafoldError) as caught:
        work(*args, **options)
    assert caught.value.code == code
    return caught.value


@pytest.mark.parametrize("how", ["copy", "link", "move"])
def test_a_delta_enters_whole(zoo, tmp_path, how):
    source = Path(shutil.copytree(zoo / "one", tmp_path / "mine"))
    (source / "notes.partial").write_text("not part of the delta")
    added = add_delta(zoo, source, name="sql", how=how)
    assert verify_delta(zoo / "sql").delta_id == added.delta_id
    assert source.exists() == (how != "move")
    assert (zoo / "sql").is_symlink() == (how == "link")
    assert (zoo / "sql" / "notes.partial").exists() == (how != "copy")
    remove_variant(zoo, "sql")
    assert not (zoo / "sql").exists()
    assert source.exists() == (how != "move")
    assert not [p for p in zoo.iterdir() if p.name.startswith(".") and p.name != ".zoo.lock"]


def test_what_does_not_enter(zoo, tmp_path):
    before = tree(zoo)
    refused("exists", add_delta, zoo, zoo / "one", name="two")
    refused("bad-argument", add_delta, zoo, zoo / "one", name=".two")
    refused("bad-argument", add_delta, zoo, zoo / "one", overwrite=True)
    refused("base-mismatch", add_delta, zoo, other_delta(tmp_path))
    damaged = Path(shutil.copytree(zoo / "one", tmp_path / "damaged"))
    payload = bytearray((damaged / "delta.safetensors").read_bytes())
    payload[-1] ^= 1
    (damaged / "delta.safetensors").write_bytes(payload)
    refused("checksum", add_delta, zoo, damaged, how="move")
    assert damaged.exists()
    (zoo / "notes").mkdir()
    refused("exists", add_delta, zoo, zoo / "one", name="notes", overwrite=True)
    with on_disk.zoo_lock(zoo):
        refused("busy", add_delta, zoo, zoo / "one", name="four")
    (zoo / "notes").rmdir()
    assert {n: b for n, b in tree(zoo).items() if n != ".zoo.lock"} == before


def test_replacing_and_aliases_do_not_get_in_each_others_way(zoo, tmp_path):
    elsewhere = Path(shutil.copytree(zoo / "two", tmp_path / "two"))
    digest = set_alias(zoo, "prod", "one")
    assert refused("busy", add_delta, zoo, elsewhere, name="one", overwrite=True).facts
    refused("busy", remove_variant, zoo, "one")
    refused("exists", add_delta, zoo, elsewhere, name="prod")
    refused("exists", set_alias, zoo, "two", "one")
    assert set_alias(zoo, "next", "two") == DeltaRepo.open(elsewhere).digest
    set_alias(zoo, "prod", "next")
    add_delta(zoo, elsewhere, name="one", overwrite=True)
    assert DeltaRepo.open(zoo / "one").digest == read_aliases(zoo)["prod"] != digest
    # Two deltas with the digest: either may go.
    remove_variant(zoo, "two")
    assert remove_variant(zoo, "one", force=True).aliases == ("next", "prod")
    assert read_aliases(zoo) == {}
    refused("variant-not-found", remove_alias, zoo, "prod")
    (zoo / "aliases.json").write_text('{"format": "deltafold-aliases", "version": 2}')
    refused("bad-manifest", list_zoo, zoo)


def test_listing_and_verifying(zoo, made):
    set_alias(zoo, "prod", "one")
    payload = zoo / "two" / "delta.safetensors"
    payload.write_bytes(payload.read_bytes()[:-1])
    listing = list_zoo(zoo)
    assert [m.name for m in listing.members] == ["one", "three", "two"]
    assert listing.members[0].aliases == ("prod",)
    outcome = {c.name: c.error and c.error.code for c in verify_zoo(zoo, base=made / "base")}
    assert outcome == {"one": None, "three": None, "two": "truncated"}
    remove_variant(zoo, "three")
    shutil.rmtree(zoo / "one")
    assert [c.error.code for c in verify_zoo(zoo) if c.error] == ["truncated", "variant-not-found"]
    assert list(list_zoo(zoo).dangling) == ["prod"]


def parts_of(folder: Path) -> dict[str, list[dict[str, torch.Tensor]]]:
    repo = DeltaRepo.open(folder)
    return {name: [dict(e.parts) for e in repo.parts(name)] for name in repo.manifest.tensors}


def same(first: Path, second: Path) -> bool:
    left, right = parts_of(first), parts_of(second)
    return left.keys() == right.keys() and all(
        torch.equal(a[key], b[key])
        for name in left
        for a, b in zip(left[name], right[name], strict=True)
        for key in a
    )


def test_equal_tensors_are_stored_once_and_every_delta_stays_whole(zoo, made, tmp_path):
    planned = collect(zoo, dry_run=True, min_bytes=1)
    assert tree(zoo).keys() - {".zoo.lock"} == tree(made / "zoo").keys()
    opened = DeltaRepo.open(zoo / "one")
    done = collect(zoo, min_bytes=1)
    # Files have headers; the plan does not count those.
    assert abs(planned.freed - done.freed) < 2000
    assert done.freed > 5000
    assert done.shared == planned.shared
    assert done.shared["one, three, two"] == (EMBEDDINGS,)
    for name in ("one", "two", "three"):
        assert same(zoo / name, made / "zoo" / name)
        assert DeltaRepo.open(zoo / name).digest == DeltaRepo.open(made / "zoo" / name).digest
    # What a server has open can be read to the end.
    assert all(opened.parts(name) for name in opened.manifest.tensors)
    # Taken out, a delta is as whole as ever.
    copy = Path(shutil.copytree(zoo / "one", tmp_path / "copy"))
    shutil.rmtree(zoo)
    assert verify_delta(copy, base=made / "base").base_checked


def test_collecting_again_changes_nothing_and_a_newcomer_joins_in(zoo, made, tmp_path):
    shutil.move(zoo / "three", tmp_path / "three")
    collect(zoo, min_bytes=1)
    stamps = {p: p.stat().st_ino for p in zoo.rglob("*")}
    assert collect(zoo, min_bytes=1).freed == 0
    assert {p: p.stat().st_ino for p in zoo.rglob("*")} == stamps
    # Copied without its links, as many tools do, a zoo shares nothing.
    apart = Path(shutil.copytree(zoo, tmp_path / "apart"))
    assert collect(apart, min_bytes=1).freed > 5000
    add_delta(zoo, tmp_path / "three")
    collect(zoo, min_bytes=1)
    shared = [p for p in zoo.glob("*/*.safetensors") if p.stat().st_nlink == 3]
    assert len(shared) == 3
    assert all(same(zoo / n, made / "zoo" / n) for n in ("one", "two", "three"))
    # Little in common is not worth a file.
    quiet = Path(shutil.copytree(made / "zoo", tmp_path / "quiet"))
    assert collect(quiet).shared == {}


def test_killed_at_any_step_every_delta_can_be_read_and_the_next_run_finishes(zoo, made, tmp_path):
    reached = 0
    for step in range(0, 200, 2):
        one = Path(shutil.copytree(zoo, tmp_path / f"at{step}"))
        with killed_at(step) as killed:
            collect(one, min_bytes=1)
        if not killed:
            break
        reached += 1
        for name in ("one", "two", "three"):
            assert verify_delta(one / name).coded
        collect(one, min_bytes=1)
        assert sorted(p.name for p in one.glob("*/*.safetensors")) == sorted(
            n for f in one.iterdir() if f.is_dir() for n in _payload(f)
        )
        assert collect(one, min_bytes=1).freed == 0
        shutil.rmtree(one)
    assert reached > 10


def _payload(folder: Path) -> list[str]:
    files = json.loads((folder / "delta_config.json").read_text())["files"]
    return [name for name in files if name.endswith(".safetensors")]


def test_killed_while_replacing_a_delta(zoo, tmp_path):
    elsewhere = Path(shutil.copytree(zoo / "two", tmp_path / "two"))
    old, new = DeltaRepo.open(zoo / "one").digest, DeltaRepo.open(elsewhere).digest
    found = set()
    for step in range(30):
        one = Path(shutil.copytree(zoo, tmp_path / f"at{step}"))
        with killed_at(step) as killed:
            add_delta(one, elsewhere, name="one", overwrite=True)
        if not killed:
            break
        collect(one)
        found.add(DeltaRepo.open(one / "one").digest)
        assert {p.name for p in one.iterdir()} == {"one", "two", "three", ".zoo.lock"}
        shutil.rmtree(one)
    assert found == {old, new}


def test_leftovers_go_and_what_is_in_work_stays(zoo):
    for name in ("cut.partial", "busy.partial", "one.partial", ".families/" + "a" * 64):
        (zoo / name).mkdir(parents=True)
        (zoo / name / "x").write_bytes(b"x" * 100)
    (zoo / "one" / "delta-00001-of-00002.safetensors").write_bytes(b"left")
    (zoo / "one" / "mine.safetensors").write_bytes(b"mine")
    (zoo / "two" / ".spool").write_bytes(b"parts")
    lock = on_disk.take_name(zoo, "busy")
    assert lock is not None
    done = collect(zoo)
    assert [x.path.name for x in done.leftovers] == [
        "cut.partial",
        "one.partial",
        "delta-00001-of-00002.safetensors",
        ".spool",
    ]
    assert done.freed == 209
    assert (zoo / "one" / "mine.safetensors").exists()
    on_disk.give_name(zoo, "busy", lock)
    collect(zoo)
    assert [x.path.name for x in collect(zoo).leftovers] == ["a" * 64]
    assert not (zoo / ".families" / ("a" * 64)).exists()


def test_what_a_run_would_go_on_with_is_kept(zoo, made):
    """A journal with a finished tensor is worth keeping; one that begins anew anyway is not."""
    models = made / "base", made / "ft-one"

    def stop(event):
        if event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(*models, zoo / "half", progress=stop)
    half = zoo / "half.partial"
    shutil.copytree(half, zoo / "torn.partial")
    (zoo / "torn.partial" / ".journal").write_bytes(b"")
    done = collect(zoo, dry_run=True)
    assert (done.unfinished, [x.path.name for x in done.leftovers]) == ((half,), ["torn.partial"])
    assert collect(zoo).unfinished == (half,)
    assert half.is_dir()
    assert not (zoo / "torn.partial").exists()
    lock = on_disk.take_name(zoo, "half")
    assert lock is not None
    assert not collect(zoo, unfinished=True).leftovers, "it is being written"
    on_disk.give_name(zoo, "half", lock)
    report = compress_checkpoint(*models, zoo / "half")
    assert report.resumed >= 2
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(*models, zoo / "again", progress=stop)
    assert [x.path.name for x in collect(zoo, unfinished=True).leftovers] == ["again.partial"]


def test_what_deltas_share_by_digest_comes_along_and_stays(zoo, tmp_path):
    """Any mention of a family's digest in a manifest counts; here the recipe's, which is provenance."""
    family = "c" * 64
    other = tmp_path / "other" / "four"
    shutil.copytree(zoo / "one", other)
    manifest = other / "delta_config.json"
    data = json.loads(manifest.read_text())
    data["recipe"]["family"] = {"id": f"sha256:{family}", "members": ["four"], "bytes": 1}
    manifest.write_text(json.dumps(data))
    (other.parent / ".families" / family).mkdir(parents=True)
    (other.parent / ".families" / family / "family.json").write_text("{}")
    add_delta(zoo, other)
    assert (zoo / ".families" / family / "family.json").read_text() == "{}"
    assert not collect(zoo).leftovers
    assert list_zoo(zoo).families_bytes == 2
    remove_variant(zoo, "four")
    assert [x.path.name for x in collect(zoo).leftovers] == [family]


def test_a_damaged_delta_is_not_spread(zoo):
    payload = zoo / "one" / "delta.safetensors"
    raw = bytearray(payload.read_bytes())
    raw[len(raw) // 2] ^= 255
    payload.write_bytes(raw)
    refused("checksum", collect, zoo, min_bytes=1)
    assert verify_delta(zoo / "two").coded
    assert verify_delta(zoo / "three").coded
