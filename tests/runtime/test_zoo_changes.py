"""A zoo that is changed while it is served: aliases that move, payloads that are shared."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from checkpoints import base_tensors, fine_tuned, write_checkpoint

from deltafold.compress import Checkpoint, DeltafoldError, compress_checkpoint
from deltafold.compress.fingerprint import digest_source
from deltafold.compress.zoo_add import remove_variant
from deltafold.compress.zoo_aliases import ALIASES_NAME, remove_alias, set_alias
from deltafold.compress.zoo_gc import collect
from deltafold.runtime.zoo import Zoo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = base_tensors()
    write_checkpoint(tmp_path / "base", base)
    tuned = fine_tuned(base)
    for name in ("blue", "green"):
        tuned = {**tuned, "model.norm.weight": tuned["model.norm.weight"] + 1}
        write_checkpoint(tmp_path / name, tuned)
        compress_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / "zoo" / name)
    return tmp_path / "zoo"


def served(folder: Path) -> Zoo:
    digests = digest_source(Checkpoint.open(folder.parent / "base"))
    return Zoo(folder, digests, "the-base", {"the-base", "base"})


def refused(zoo: Zoo, name: str) -> str:
    with pytest.raises(DeltafoldError) as caught:
        zoo.find(name).opened()
    return caught.value.code


def test_an_alias_follows_its_file_at_once(folder: Path) -> None:
    zoo = served(folder)
    assert refused(zoo, "prod") == "variant-not-found"
    set_alias(folder, "prod", "blue")
    before = zoo.find("prod")
    assert (before.name, before.root) == ("prod", "blue")
    assert before.opened().digest == zoo.find("blue").opened().digest
    set_alias(folder, "prod", "green")
    assert zoo.find("prod").opened().digest == zoo.find("green").opened().digest
    assert [(e.name, e.root) for e in zoo.entries()] == [
        ("blue", ""),
        ("green", ""),
        ("prod", "green"),
    ]
    # The old delta is gone from the disk; whoever holds it can still read it.
    remove_variant(folder, "blue")
    assert all(before.opened().parts(name) for name in before.opened().manifest.tensors)
    # Another delta under the old name is not what the alias means.
    root = folder.parent
    compress_checkpoint(root / "base", root / "blue", folder / "green", overwrite=True)
    assert zoo.find("green").opened().digest == before.opened().digest
    assert refused(zoo, "prod") == "variant-not-found"
    remove_alias(folder, "prod")
    assert [e.name for e in zoo.entries()] == ["green"]


def test_what_an_alias_cannot_be(folder: Path) -> None:
    set_alias(folder, "the-base", "blue")
    zoo = served(folder)
    assert refused(zoo, "the-base") == "bad-argument"
    (folder / ALIASES_NAME).write_text("{}")
    assert refused(zoo, "prod") == "bad-manifest"
    assert {e.name: e.error and e.error.code for e in zoo.entries()} == {
        ALIASES_NAME: "bad-manifest",
        "blue": None,
        "green": None,
    }


def test_collecting_while_it_is_served(folder: Path) -> None:
    zoo, stop, failed = served(folder), threading.Event(), list[str]()

    def read() -> None:
        while not stop.is_set():
            for name in ("blue", "green"):
                try:
                    repo = zoo.find(name).opened()
                    assert repo.parts("model.norm.weight")[0].parts["value"].dtype is torch.bfloat16
                except DeltafoldError as error:
                    failed.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert collect(folder, min_bytes=1).freed > 0
    finally:
        stop.set()
        reader.join()
    assert failed == []
