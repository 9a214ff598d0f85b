"""The journal of a packing run: what is whole counts, what is torn is done again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltafold.compress.journal import Journal, Record
from deltafold.compress.repo import payload_digest

PARTS = [{"a": torch.arange(40, dtype=torch.int32), "b": torch.ones(3, 5)}, {"a": torch.zeros(0)}]


def finish(journal: Journal, name: str, shift: float = 0.0) -> None:
    parts = [{k: p + shift for k, p in one.items()} for one in PARTS]
    places = tuple({k: journal.put(p) for k, p in one.items()} for one in parts)
    entry = {"payload_sha256": payload_digest(parts)}
    journal.add(Record(name, "0" * 64, "1" * 64, entry, {"error": 0.5}, places))


def made(folder: Path) -> Path:
    with Journal(folder, "run") as journal:
        finish(journal, "one")
        journal.add(Record("two", "2" * 64, "2" * 64))
        finish(journal, "three", 2.0)
    return folder


def test_a_later_run_finds_what_was_finished(tmp_path):
    with Journal(made(tmp_path), "run") as journal:
        assert sorted(journal.done) == ["one", "three", "two"]
        assert journal.resumed == 3
        assert journal.done["two"].entry is None
        (first, _) = journal.done["three"].parts
        assert torch.equal(journal.part(first["a"]), PARTS[0]["a"] + 2)
        finish(journal, "four", 3.0)
    with Journal(tmp_path, "run") as journal:
        assert sorted(journal.done) == ["four", "one", "three", "two"]


def test_another_run_starts_over(tmp_path):
    with Journal(made(tmp_path), "other") as journal:
        assert not journal.done
        finish(journal, "one")
    with Journal(tmp_path, "other") as journal:
        assert list(journal.done) == ["one"]


@pytest.mark.parametrize("cut", [1, 5, 60, 400])
def test_a_torn_line_counts_for_nothing(tmp_path, cut):
    path = made(tmp_path) / ".journal"
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(tmp_path, "run") as journal:
        assert "three" not in journal.done
        assert "one" in journal.done
        finish(journal, "three", 2.0)
    with Journal(tmp_path, "run") as journal:
        assert {"one", "three"} <= set(journal.done)


def test_lines_of_chance_count_for_nothing(tmp_path):
    path = made(tmp_path) / ".journal"
    with path.open("ab") as file:
        file.write(b"\x00" * 100 + b"deadbeef {}\n[]\n")
    with Journal(tmp_path, "run") as journal:
        assert len(journal.done) == 3


@pytest.mark.parametrize("keep", [0, 3, 300])
def test_lost_parts_are_found_out(tmp_path, keep):
    """A power cut may keep the line and lose the parts that it tells of."""
    path = made(tmp_path) / ".spool"
    raw = path.read_bytes()
    path.write_bytes(raw[:keep] + b"\x00" * (len(raw) - keep))
    with Journal(tmp_path, "run") as journal:
        assert "three" not in journal.done
        assert "two" in journal.done
        assert ("one" in journal.done) == (keep == 300)


def test_a_shorter_spool_is_found_out(tmp_path):
    path = made(tmp_path) / ".spool"
    path.write_bytes(path.read_bytes()[:-1])
    with Journal(tmp_path, "run") as journal:
        assert sorted(journal.done) == ["one", "two"]
