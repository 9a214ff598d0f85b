"""Compiling our C kernels with the machine's own compiler, once, on first use.

A wheel that runs everywhere cannot hold machine code for every CPU, and the kernels are one short
file. Where there is no compiler or no fitting CPU, `signs_library` is None and callers take their
portable path. Nothing happens at import.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from deltafold.compress.fingerprint import cache_folder

_log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("signs.c")
_FLAGS = ("-O3", "-mavx2", "-mfma", "-fPIC", "-std=c11")


@cache
def signs_library() -> ctypes.CDLL | None:
    """The compiled `signs.c`, or None where this machine cannot have it."""
    if platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        return None
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        _log.info("no C compiler: sign planes use torch's own products")
        return None
    # torch has an OpenMP runtime in the process already. A second one would fight it for the cores,
    # so the library is not linked to any and finds torch's by its symbols.
    for openmp in (True, False):
        library = _load(compiler, openmp=openmp)
        if library is not None and library.signs_supported():
            return library
    return None


def _load(compiler: str, *, openmp: bool) -> ctypes.CDLL | None:
    try:
        return _declare(ctypes.CDLL(str(_built(compiler, openmp=openmp))))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("the C kernels could not be built or loaded: %s", error)
        return None


def _built(compiler: str, *, openmp: bool) -> Path:
    flags = [*_FLAGS, *(["-fopenmp"] if openmp else [])]
    key = hashlib.sha256()
    for part in (_SOURCE.read_bytes(), compiler.encode(), " ".join(flags).encode()):
        key.update(part + b"\0")
    target = cache_folder() / "native" / f"signs-{key.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled, linked = Path(folder) / "signs.o", Path(folder) / "signs.so"
        _run([compiler, *flags, "-c", str(_SOURCE), "-o", str(compiled)])
        _run([compiler, "-shared", str(compiled), "-o", str(linked)])
        linked.replace(target)
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.signs_supported.restype = ctypes.c_int
    library.signs_product.restype = None
    library.signs_product.argtypes = [
        pointer, integer, integer,  # x, tokens, columns
        pointer, pointer, pointer,  # signs, levels, offsets
        integer, integer, integer, integer, integer,  # planes, groups, width, words, rows
        pointer, pointer,  # scratch, y
    ]  # fmt: skip
    return library
