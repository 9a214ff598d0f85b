"""The shipped demo models do what the demo says, through the whole path."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from deltafold.compress import DeltaRepo
from deltafold.server.demo.run import shipped_bytes
from deltafold.server.demo.tasks import VARIANT_TASKS
from deltafold.server.demo.zoo import CODECS, data_folder


def test_shipped_deltas_are_lossless_and_small() -> None:
    full = shipped_bytes(data_folder())
    total = full
    for task in VARIANT_TASKS:
        repo = DeltaRepo.open(data_folder() / "zoo" / task)
        assert repo.lossless
        assert repo.manifest.totals.ratio < 0.75
        total += repo.manifest.totals.delta_bytes
    assert total < 6 * 2**20


PROGRAM = "from deltafold.server.cli.main import main; main()"


@pytest.mark.slow
def test_demo_command() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "demo", "--json", "--words", "8"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["variants"] == len(CODECS) * len(VARIANT_TASKS)
    assert result["base_match"]["repeat"] >= 0.75
    for task in VARIANT_TASKS:
        cells = result["cells"][task]
        # The wrong variant would show at once: the base cannot do any of the tasks.
        assert result["base_match"][task] <= 0.25
        assert cells["lossless"]["match"] >= 0.75
        assert cells["lossless"]["agreement"] == 1.0
        assert cells["4 bit"]["match"] >= 0.75
        assert cells["1 bit"]["size"] < cells["2 bit"]["size"] < cells["4 bit"]["size"] < 0.5
    assert result["mixed"] > 0
