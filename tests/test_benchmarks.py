"""The quality benchmark runs, and its figures are those of real fine-tunes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_quality_benchmark_runs(tmp_path):
    """Takes seconds: it packs and runs real models in a process of its own."""
    out = tmp_path / "quality.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "quality.py", "--quick", "--json", out],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    rows = {row["spec"]: row for row in found["rows"]}
    assert rows["no delta"]["accuracy"] < 0.1
    assert rows["bitdelta:bits=4"]["accuracy"] > 0.9
    assert rows["bitdelta:bits=4"]["kl"] < rows["bitdelta:bits=1"]["kl"] < rows["no delta"]["kl"]
    assert rows["bitdelta:bits=1"]["bits"] < rows["bitdelta:bits=4"]["bits"]
    assert {cost["note"] for cost in found["cost"]} == {""}
    assert all(shape["holds"] for shape in found["shapes"])
    assert "| codec `bitdelta:bits=4` |" in done.stdout
