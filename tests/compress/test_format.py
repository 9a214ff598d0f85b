"""A second reader (`second_reader.py`), written from `docs/format.md` alone, finds the same."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_pair
from second_reader import decode, read

from deltafold.compress import Checkpoint, DeltaRepo, Recipe, compress_checkpoint, parse_spec

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("stem", sorted(path.stem for path in GOLDEN.glob("*.json")))
def test_golden_files(stem):
    description = json.loads((GOLDEN / f"{stem}.json").read_text("utf-8"))
    stored = read(GOLDEN / f"{stem}.safetensors")
    parts = {k.removeprefix("part."): v[1] for k, v in stored.items() if k.startswith("part.")}
    if description["term"]["id"] == "rows" and description["term"]["added"]:
        assert stored["part.added"][0] == description["term"]["dtype"]
    shared = stored["shared"][1] if "shared" in stored else None
    arguments = (parts, description["shape"], description["name"], stored.get("base"), shared)
    found, expected = decode(description["term"], *arguments), stored["decoded"][1]
    if description["tolerance"]:
        assert np.allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    else:
        assert np.array_equal(found, expected)


def compact(value) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def test_digests_of_a_real_delta(tmp_path):
    pair = make_pair(tmp_path)
    recipe = Recipe(default=parse_spec("int"), overrides=(("*up*", parse_spec("dare")),))
    compress_checkpoint(pair.base, pair.variant, pair.out, recipe=recipe)
    manifest = json.loads((pair.out / "delta_config.json").read_text("utf-8"))

    lines = b""
    for name, (dtype, array) in sorted(read(pair.base / "model.safetensors").items()):
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        lines += compact([name, dtype, list(array.shape), digest]) + b"\n"
    assert manifest["base"]["fingerprint"] == f"sha256:{hashlib.sha256(lines).hexdigest()}"

    payload = read(pair.out / "delta.safetensors")
    for name, entry in manifest["tensors"].items():
        total = hashlib.sha256()
        for number in range(len(entry["terms"])):
            prefix = f"{name}.{number}."
            for key in sorted(k for k in payload if k.startswith(prefix)):
                dtype, array = payload[key]
                head = compact([number, key.removeprefix(prefix), dtype, list(array.shape)])
                total.update(struct.pack("<Q", len(head)) + head + array.tobytes())
        assert entry["payload_sha256"] == total.hexdigest()

    content = {
        "absent": sorted(manifest["absent"]),
        "base": manifest["base"]["fingerprint"],
        "files": {n: f["sha256"] for n, f in manifest["files"].items() if f["sha256"]},
        "format": "deltafold",
        "major": "1",
        "tensors": {
            n: [e["shape"], e["dtype"], e["terms"], e["payload_sha256"]]
            for n, e in manifest["tensors"].items()
        },
        "unchanged": sorted(manifest["unchanged"]),
    }
    assert manifest["delta_id"] == f"sha256:{hashlib.sha256(compact(content)).hexdigest()}"


def test_a_real_delta(tmp_path):
    pair = make_pair(tmp_path)
    compress_checkpoint(pair.base, pair.variant, pair.out)
    repo, base = DeltaRepo.open(pair.out), Checkpoint.open(pair.base)
    plain, payload = read(pair.base / "model.safetensors"), read(pair.out / "delta.safetensors")
    for name, entry in repo.manifest.tensors.items():
        total = np.zeros(entry.shape, np.float32)
        for number, term in enumerate(entry.terms):
            prefix = f"{name}.{number}."
            parts = {k.removeprefix(prefix): v[1] for k, v in payload.items() if prefix in k}
            total += decode(term, parts, list(entry.shape), name, plain[name])
        assert torch.equal(torch.from_numpy(total), repo.delta(name, base.tensor(name)))
