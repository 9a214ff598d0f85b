"""The compiled `signs.c`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from deltafold.compress.native import compiled

_SOURCE = Path(__file__).with_name("signs.c")
_FLAGS = ("-O3", "-mavx2", "-mfma", "-fPIC", "-std=c11")


@cache
def signs_library() -> ctypes.CDLL | None:
    """The library, or None where this machine cannot have it and torch's own products do the work."""
    library = compiled(_SOURCE, _FLAGS)
    if library is None:
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.signs_product.restype = None
    library.signs_product.argtypes = [
        pointer, integer, integer,  # x, tokens, columns
        pointer, pointer, pointer,  # signs, levels, offsets
        integer, integer, integer, integer, integer,  # planes, groups, width, words, rows
        integer, pointer, pointer,  # columns of a lookup, scratch, y
    ]  # fmt: skip
    library.signs_lay.restype = None
    library.signs_lay.argtypes = [
        pointer, integer, integer, integer,  # fields, planes, rows, columns
        integer, integer, integer, integer, integer,  # groups, width, words, padded rows, columns of
        pointer,  # a lookup, out
    ]  # fmt: skip
    library.signs_dense.restype = None
    library.signs_dense.argtypes = [
        pointer, pointer, pointer,  # signs, levels, offsets
        integer, integer, integer, integer, integer,  # planes, groups, width, words, rows
        integer, integer, integer, integer,  # columns of a lookup, first and last block, columns
        pointer,  # out
    ]  # fmt: skip
    return library


def lookup_columns(library: ctypes.CDLL) -> int:
    """Columns of one lookup that this CPU is fastest at: 3, or 4 with AVX-512."""
    return int(library.signs_columns())
