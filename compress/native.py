"""Compiling our C files with the machine's own compiler, once, on first use.

A wheel that runs everywhere cannot hold machine code for every CPU, and each of our C files is a short
one. Where there is no compiler or no fitting CPU callers get None and take their portable path.
Nothing happens at import.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deltafold.compress.fingerprint import cache_folder

_log = logging.getLogger(__name__)

#: Without contraction a product and a sum round twice on every machine, as the portable paths do.
FLAGS = ("-O3", "-mavx2", "-mf16c", "-mfma", "-ffp-contract=off", "-fPIC", "-std=c11")


def compiled(source: Path, flags: Sequence[str] = FLAGS) -> ctypes.CDLL | None:
    """A C file as a loaded library, or None where this machine cannot have it.

    Args:
        source: the file; it must define `int <stem>_supported(void)`, which asks the CPU.
        flags: of the compiler.
    """
    if platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        return None
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        _log.info("no C compiler: %s takes its portable path", source.stem)
        return None
    # torch has an OpenMP runtime in the process already. A second one would fight it for the cores,
    # so the library is not linked to any and finds torch's by its symbols.
    for openmp in (["-fopenmp"], []):
        library = _load(source, compiler, [*flags, *openmp])
        if library is not None and getattr(library, f"{source.stem}_supported")():
            return library
    return None


def _load(source: Path, compiler: str, flags: Sequence[str]) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_built(source, compiler, flags)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("%s could not be built or loaded: %s", source.name, error)
        return None


def _built(source: Path, compiler: str, flags: Sequence[str]) -> Path:
    key = hashlib.sha256()
    for part in (*_texts(source), compiler.encode(), " ".join(flags).encode()):
        key.update(part + b"\0")
    target = cache_folder() / "native" / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made, linked = Path(folder) / "one.o", Path(folder) / "one.so"
        _run([compiler, *flags, "-c", str(source), "-o", str(made)])
        _run([compiler, "-shared", str(made), "-o", str(linked)])
        linked.replace(target)
    return target


def _texts(source: Path) -> list[bytes]:
    """A file and all of ours that it includes, each once."""
    found: dict[Path, bytes] = {}
    left = [source]
    while left:
        path = left.pop()
        if path not in found:
            found[path] = path.read_bytes()
            names = re.findall(rb'^#include "([^"]+)"$', found[path], re.MULTILINE)
            left += [path.with_name(name.decode()) for name in names]
    return list(found.values())


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=120)
