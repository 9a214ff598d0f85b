"""What a process says of its memory."""

from __future__ import annotations

import subprocess
import sys

from deltafold.compress.memory import peak_memory, resident


def test_the_peak_is_this_processs_own():
    """A small process that a large one starts is small."""
    large = b"x" * 2**29
    code = "from deltafold.compress.memory import peak_memory; print(peak_memory())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert 2**20 < int(found.stdout) < len(large) < peak_memory()


def test_the_peak_is_no_less_than_what_is_held():
    held = resident()
    assert peak_memory() >= held > 2**20
