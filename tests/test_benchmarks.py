"""The benchmarks run, and what they time computes what it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux alone")
def test_kernels_on_tiny_layers(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    script = ROOT / "benchmarks" / "kernels.py"
    call = [sys.executable, str(script), "--device", "cpu", "--quick", "--variants", "2"]
    # The GPU kernels, interpreted: the same code that a GPU runs.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*call, "--json", str(out)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text("utf-8"))["rows"]
    cases = {row["case"] for row in rows}
    assert {"base alone", "base + 1 bit", "base + DARE 99 %", "base + rank 64"} <= cases
    checked = [row for row in rows if row["error"] is not None]
    assert len(checked) == 2 * 12
    assert all(row["error"] < 1e-5 for row in checked)
    # What is left out says why, and everything else was timed.
    for row in rows:
        assert (row["least"] is not None) != bool(row["note"]), row
    assert "base + BitDelta's public kernel" in done.stdout
