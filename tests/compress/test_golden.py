"""Bytes of every term that was ever released, decoded again. See `tests/golden/make.py`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import bits
from safetensors.torch import load_file

from deltafold.compress.terms import REGISTRY, Context, config_of, is_exact, term_from_config

FOLDER = Path(__file__).parents[1] / "golden"
STEMS = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.mark.parametrize("stem", STEMS)
def test_old_bytes_decode_as_ever(stem):
    description = json.loads((FOLDER / f"{stem}.json").read_text("utf-8"))
    stored = load_file(FOLDER / f"{stem}.safetensors")
    shape = tuple(description["shape"])
    term = term_from_config(description["term"])
    parts = {k.removeprefix("part."): v for k, v in stored.items() if k.startswith("part.")}
    promised = {key: tuple(spec) for key, spec in term.parts(shape).items()}
    assert promised == {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()}
    context = Context(
        description["name"], stored.get("base"), shared=lambda family, key: stored["shared"]
    )
    found = term.decode(parts, shape, context)
    if description["tolerance"]:
        largest = stored["decoded"].abs().max().item()
        assert (found - stored["decoded"]).abs().max() <= description["tolerance"] * largest
    else:
        assert torch.equal(found, stored["decoded"])
    assert is_exact(term) == ("restored" in stored)
    if is_exact(term):
        expected = stored["restored"]
        restored = term.restore(parts, shape, expected.dtype, context)
        assert restored.dtype == expected.dtype
        assert bits(restored) == bits(expected)


def test_every_registered_term_has_golden_files():
    found = {
        (config["id"], config["v"])
        for stem in STEMS
        for config in [json.loads((FOLDER / f"{stem}.json").read_text("utf-8"))["term"]]
    }
    assert found >= set(REGISTRY), "run: python tests/golden/make.py"


def test_the_masked_case_is_made_as_its_file_was():
    """Its counts are those that `make.py` gives the term, fewer for each later vector."""
    spec = importlib.util.spec_from_file_location("golden_make", FOLDER / "make.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    (case,) = (c for c in made.CASES if c.variant == "masked")
    base, variant = made._tensors(case)
    encoded = made._encode(case.term, variant.float() - base.float(), Context(made.NAME, base))
    description = json.loads((FOLDER / f"{made.stem(case)}.json").read_text("utf-8"))
    assert config_of(encoded.term) == description["term"]
    assert torch.equal(
        encoded.parts["kept"], load_file(FOLDER / f"{made.stem(case)}.safetensors")["part.kept"]
    )


def test_files_are_small_and_come_in_pairs():
    files = [path for path in FOLDER.iterdir() if path.suffix in (".json", ".safetensors")]
    assert sorted({path.stem for path in files}) == STEMS
    assert len(files) == 2 * len(STEMS)
    assert all(path.stat().st_size < 16_000 for path in files)


def test_terms_are_written_as_they_are_read():
    for stem in STEMS:
        config = json.loads((FOLDER / f"{stem}.json").read_text("utf-8"))["term"]
        assert config_of(term_from_config(config)) == config


def test_making_them_again_changes_nothing():
    before = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "make.py")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert "wrote" not in done.stdout
    assert before == {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}
