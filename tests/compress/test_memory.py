"""What a process says of its memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from deltafold.compress import scratch
from deltafold.compress.memory import MemoryBudget, peak_memory, resident
from deltafold.compress.scratch import Scratch


def test_the_peak_is_this_processs_own():
    """A small process that a large one starts is small."""
    large = b"x" * 2**29
    code = "from deltafold.compress.memory import peak_memory; print(peak_memory())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert 2**20 < int(found.stdout) < len(large) < peak_memory()


def test_the_peak_is_no_less_than_what_is_held():
    held = resident()
    assert peak_memory() >= held > 2**20


def test_memory_is_lent_again():
    scratch.forget()
    with Scratch() as memory:
        first = memory.lend("test", (64, 50)).fill_(1)
        assert memory.lend("test", (2, 3)).data_ptr() == first.data_ptr()
        assert memory.lend("other", (64, 50)).data_ptr() != first.data_ptr()
        assert memory.lend("test", (0, 7)).shape == (0, 7)
    place = first.data_ptr()
    with scratch.borrowed(64 * 50 * 4) as raw, scratch.borrowed(64 * 50 * 4) as other:
        assert place in (raw.ctypes.data, other.ctypes.data)
    with scratch.borrowed(3) as small:
        assert len(small) == 3


def test_what_nobody_borrows_is_given_back_down_to_a_bound():
    scratch.forget()
    with scratch.borrowed(2**18) as first, scratch.borrowed(2**18) as second:
        places = first.ctypes.data, second.ctypes.data
    scratch.forget(2**18)
    assert sum(map(len, scratch._kept)) == 2**18
    with scratch.borrowed(2**18) as kept:
        assert kept.ctypes.data in places
    scratch.forget()
    assert not scratch._kept


def test_a_budget_tells_what_nobody_holds():
    budget = MemoryBudget(10)
    with budget.hold(6) as first, budget.hold(3) as second:
        assert (first, second) == (4, 1)
    with budget.hold(12) as alone, MemoryBudget(None).hold(5) as unbounded:
        assert (alone, unbounded) == (0, None)


#: Of each codec that needs no model the one that takes most, and edits before them.
HUNGRY = (
    "bitdelta", "bitdelta:bits=2,scale=column", "d-qrelo", "dare", "dct:size=8,share=1.0,bits=4",
    "exact", "impart:ratio=4.0", "int:bits=2,group=16", "lloyd:bits=4,scale=row", "lossless",
    "lossless:level=3", "nm", "quantize-and-drop:bits=2", "shift-scale", "sparse", "svd:rank=4",
    "ultradelta", "della+lloyd:bits=4,scale=row",
)  # fmt: skip

MEASURE = """
import sys
from pathlib import Path
import torch
from deltafold.compress import Recipe, dtypes, parse_spec, scratch
from deltafold.compress.checkpoint import Checkpoint
from deltafold.compress.journal import Place
from deltafold.compress.limits import working_bytes
from deltafold.compress.memory import peak_memory, resident, trim
from deltafold.compress.naming import NamedBase
from deltafold.compress.streaming import Coder

base, target = Checkpoint.open(sys.argv[1]), Checkpoint.open(sys.argv[2])
sink = lambda part: Place(dtypes.NAMES[part.dtype], tuple(part.shape), 0)
for spec in sys.argv[3:]:
    coder = Coder(NamedBase(base), target, Recipe(default=parse_spec(spec)), sink, {})
    coder.code("small.weight")
    scratch.forget()
    trim()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    coder.code("large.weight")
    print(spec, peak_memory() - before, working_bytes(coder, "large.weight"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are Linux's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_codec_takes_more_than_is_planned_for(tmp_path, dtype):
    draw = torch.Generator().manual_seed(0)
    shapes = {"large.weight": (1024, 1024), "small.weight": (64, 64)}
    base = {n: torch.randn(s, generator=draw).mul(0.02).to(dtype) for n, s in shapes.items()}
    tuned = {
        n: (v.float() + 1e-3 * torch.randn(v.shape, generator=draw)).to(dtype)
        for n, v in base.items()
    }
    folders = write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "ft", tuned)
    specs = HUNGRY if dtype == torch.bfloat16 else ("lossless", "lossless:level=3", "int", "sparse")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders), *specs],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = [line.rsplit(" ", 2) for line in run.stdout.splitlines()]
    assert [spec for spec, _, _ in found] == list(specs)
    # A few MiB that do not grow with the tensor: tables, threads, code that is run for the first time.
    assert not [f for f in found if int(f[1]) > int(f[2]) + 6 * 2**20]
