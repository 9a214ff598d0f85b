"""Identity by content, and the cache that makes it cheap."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from checkpoints import base_tensors, write_checkpoint

from deltafold.compress import Checkpoint
from deltafold.compress import fingerprint as module
from deltafold.compress.fingerprint import TensorDigest, digest_source, fingerprint


def identity(folder) -> str:
    return fingerprint(digest_source(Checkpoint.open(folder)))


@pytest.fixture
def cached(monkeypatch, deltafold_home):
    """The cache takes files of any age; returns its folder."""
    monkeypatch.setattr(module, "_SETTLED_NS", -(2**62))
    return deltafold_home / "digests"


def test_a_fingerprint_worked_out_by_hand():
    digests = {
        "b": TensorDigest("F32", (), "22"),
        "a": TensorDigest("BF16", (2, 3), "11"),
    }
    # printf '["a","BF16",[2,3],"11"]\n["b","F32",[],"22"]\n' | sha256sum
    assert fingerprint(digests) == (
        "sha256:07e80e64208958b3cc4872cffd1c707892ef5a02ac37dba6774547a9d120c80a"
    )


def test_order_shards_and_file_names_do_not_matter(tmp_path):
    tensors = base_tensors()
    one = write_checkpoint(tmp_path / "one", tensors)
    backwards = write_checkpoint(tmp_path / "two", dict(reversed(tensors.items())), shards=3)
    assert identity(one) == identity(backwards)


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape", "more", "less"])
def test_content_does(tmp_path, change):
    tensors = base_tensors()
    before = identity(write_checkpoint(tmp_path / "one", tensors))
    norm = tensors.pop("model.norm.weight")
    if change == "value":
        norm[3] += 1
    if change == "dtype":
        norm = norm.view(torch.float16)
    if change == "shape":
        norm = norm.reshape(4, 10)
    if change == "more":
        tensors["more"] = norm.clone()
    if change != "less":
        tensors["other" if change == "name" else "model.norm.weight"] = norm
    assert identity(write_checkpoint(tmp_path / "two", tensors)) != before


def test_digests_are_cached(tmp_path, cached):
    folder = write_checkpoint(tmp_path / "one", base_tensors())
    before = identity(folder)
    (file,) = cached.iterdir()
    digests = json.loads(file.read_text())
    assert set(digests) == set(base_tensors())
    file.write_text(json.dumps(dict.fromkeys(digests, "00")))
    assert identity(folder) != before  # it came from the cache


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"a": "b"}'])
def test_a_broken_cache_is_not_believed(tmp_path, cached, text):
    folder = write_checkpoint(tmp_path / "one", base_tensors())
    before = identity(folder)
    (file,) = cached.iterdir()
    file.write_text(text)
    assert identity(folder) == before


def test_a_byte_changed_behind_the_clock_is_noticed(tmp_path, cached):
    folder = write_checkpoint(tmp_path / "one", base_tensors())
    path = folder / "model.safetensors"
    before, stat = identity(folder), path.stat()
    time.sleep(0.05)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert path.stat().st_size == stat.st_size
    assert identity(folder) != before


def test_files_just_written_are_not_cached(tmp_path, deltafold_home):
    folder = write_checkpoint(tmp_path / "one", base_tensors())
    identity(folder)
    assert not (deltafold_home / "digests").exists()


def test_a_change_while_hashing_is_not_cached(tmp_path, cached):
    folder = write_checkpoint(tmp_path / "one", base_tensors())
    path = folder / "model.safetensors"
    checkpoint = Checkpoint.open(folder)
    time.sleep(0.05)
    stamps = []

    def touch(name, nbytes):
        if not stamps:
            stamps.append(name)
            os.utime(path)

    digest_source(checkpoint, touch)
    (file,) = cached.iterdir()
    identity(folder)
    assert len(list(cached.iterdir())) == 2, "found under the stamp of the changed file"
    assert file.exists()


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, cached, monkeypatch):
    monkeypatch.setenv("DELTAFOLD_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way")
    folder = write_checkpoint(tmp_path / "one", base_tensors())
    assert identity(folder) == identity(folder)
