"""Make golden files: bytes that every later release must still decode.

    python tests/golden/make.py

Writes `<id>-v<version>[-variant].safetensors` and `.json` for every case below that has no file yet.
A file that exists is never written again: it stands for deltas that are out in the world. A term
whose bytes change gets a new version, and a new case here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from deltafold.compress.terms import (
    NM,
    Banded,
    Blocks,
    Codebook,
    Codes,
    ColumnPlanes,
    Columns,
    Context,
    Dense,
    Encoded,
    Exact,
    ExactTerm,
    Lossless,
    LosslessStreams,
    LowRank,
    Patches,
    Planes,
    Rows,
    Shared,
    Sparse,
    SparseCodes,
    Term,
    config_of,
    is_exact,
    rows_and_columns,
)
from deltafold.compress.terms.lowrank import truncated_svd

FOLDER = Path(__file__).parent
#: The tensor's name is part of what is fixed: seeded masks depend on it.
NAME = "model.layers.0.mlp.up_proj.weight"


class Golden(NamedTuple):
    """A case: the file's name after id and version, a term, and the tensor that it codes.

    Attributes:
        rows: how many rows changed; all if left out.
        without_base: the base has no such tensor.
        columns: with `Columns`, how many of them changed.
    """

    variant: str
    term: Term
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    rows: int | None = None
    without_base: bool = False
    columns: int | None = None


CASES = [
    Golden("planes", Blocks(rows=4, inner=(Planes(bits=2),)), (10, 24)),
    Golden("lossless", Blocks(rows=3, inner=(Lossless(),)), (2, 4, 33)),
    Golden("seed", Blocks(rows=2, inner=(Sparse(mask="seed", drop=0.5, seed=9),)), (5, 12)),
    Golden("", Banded(ranks=(2, 3, 4), widths=(8, 3, 2), group=8), (12, 20)),
    Golden("half", Banded(ranks=(2, 9), widths=(16, 5), symmetric=True, group=0), (4, 3, 3, 3)),
    Golden("masked", Banded(ranks=(1, 4), widths=(16, 4), group=6, masked=True, seed=9), (9, 14)),
    Golden("2of4", NM(bits=2, scale_format="float32"), (5, 27)),
    Golden("1of16", NM(keep=1, of=16, bits=4), (3, 2, 33)),
    Golden("half", NM(keep=2, of=5, bits=16), (6, 13), torch.float32),
    Golden("tensor", Planes(bits=1, scale="tensor", scale_format="float32"), (5, 27)),
    Golden("row", Planes(bits=2, scale="row", scale_format="float32"), (3, 2, 33)),
    Golden("group", Planes(bits=4, scale="group", group=16), (6, 40)),
    Golden("tensor", Codebook(), (5, 27)),
    Golden("row", Codebook(levels=16, scale="row", table_format="float16"), (3, 2, 33)),
    Golden("3bit", Codes(bits=3, group=8), (5, 21)),
    Golden("7bit", Codes(bits=7), (3, 10)),
    Golden("", ColumnPlanes(), (5, 27)),
    Golden("float32", ColumnPlanes(bits=2, scale_format="float32"), (3, 2, 33)),
    Golden("2bit", Codes(bits=2, group=8), (5, 21)),
    Golden("4bit", Codes(bits=4, scale_format="float32"), (4, 3, 3, 3)),
    Golden("8bit", Codes(bits=8, group=16), (6, 40), torch.float32),
    Golden("codes", Columns(inner=Codes(bits=4)), (6, 20), columns=7),
    Golden("dense", Columns(inner=Dense()), (3, 2, 33), columns=5),
    Golden("", LowRank(rank=3), (12, 20)),
    Golden("float32", LowRank(rank=2, factor_format="float32"), (7, 9), torch.float16),
    Golden("seed", Sparse(mask="seed", drop=0.75, seed=12345678901234567890), (8, 33)),
    Golden("bitmap", Sparse(mask="bitmap", value_format="float32"), (5, 13)),
    Golden("", Patches(size=4), (10, 22)),
    Golden("three", Patches(5, (4, 2, 0), (0.2, 0.5, 0.3)), (4, 3, 3, 3), torch.float32),
    Golden("runs", SparseCodes(), (6, 22), rows=2),
    Golden("bitmap", SparseCodes(mask="bitmap", bits=3), (4, 3, 3, 3), rows=1),
    Golden("seed", SparseCodes(mask="seed", bits=2, drop=0.75, seed=77), (7, 13)),
    Golden("half", SparseCodes(bits=16), (9, 11), rows=1),
    Golden("", Dense(), (5, 7)),
    Golden("float16", Dense(value_format="float16"), (4, 9)),
    Golden("", Exact(), (3, 7)),
    Golden("int64", Exact(), (2, 3), torch.int64),
    Golden("scalar-new", Exact(), (), torch.float32, without_base=True),
    Golden("bf16", LosslessStreams(), (9, 31)),
    Golden("f32", LosslessStreams(level=9), (4, 5), torch.float32),
    Golden("u8", LosslessStreams(), (4, 5), torch.uint8),
    Golden("raw", LosslessStreams(), (4, 5), torch.float16, without_base=True),
    Golden("bf16", Lossless(), (40, 31)),
    Golden("bf16-blocks", Lossless(block=300), (23, 31)),
    Golden("f16", Lossless(), (30, 40), torch.float16),
    Golden("f32", Lossless(block=512), (30, 30), torch.float32),
    Golden("f64", Lossless(), (20, 20), torch.float64),
    Golden("i64", Lossless(), (20, 20), torch.int64),
    Golden("u8", Lossless(), (30, 30), torch.uint8),
    Golden("plain", Lossless(), (4, 5)),
    Golden("raw", Lossless(), (20, 40), without_base=True),
    Golden("codes", Rows(inner=Codes(bits=4)), (12, 10), rows=4),
    Golden("planes-added", Rows(inner=Planes(bits=2), added=3), (12, 10), rows=4),
    Golden("lossless-added", Rows(inner=LosslessStreams(), added=2), (8, 10), rows=3),
    Golden("mask", Shared(scale=0.3), (5, 27)),
    Golden("rows", Shared(groups=5, masked=False), (7, 9)),
    Golden("mask-rows", Shared(groups=3, scale=1.5), (3, 2, 33)),
]


def stem(case: Golden) -> str:
    """The files' name without their endings."""
    parts = [f"{case.term.id}-v{case.term.version}", *([case.variant] if case.variant else [])]
    return "-".join(parts)


def make(case: Golden) -> None:
    """Write one case's two files."""
    base, variant = _tensors(case)
    shared = _shared(case)

    def read(family: str, key: str) -> torch.Tensor:
        return shared

    context = Context(NAME, base, variant, shared=read)
    delta = variant.float() - (0 if base is None else base.float())
    encoded = _encode(case.term, delta, context)
    reading = Context(NAME, base, shared=read)
    stored = {f"part.{key}": part for key, part in encoded.parts.items()}
    stored["decoded"] = encoded.term.decode(encoded.parts, case.shape, reading).clone()
    if base is not None:
        stored["base"] = base
    if isinstance(case.term, Shared):
        stored["shared"] = shared
    if is_exact(encoded.term):
        assert isinstance(encoded.term, ExactTerm)
        stored["restored"] = variant
    description = {
        "name": NAME,
        "shape": list(case.shape),
        "term": config_of(encoded.term),
        # A product of factors is summed in another order by every matrix library.
        "tolerance": 1e-6 if isinstance(case.term, Banded | LowRank | Patches) else 0.0,
    }
    save_file(stored, FOLDER / f"{stem(case)}.safetensors")
    text = json.dumps(description, indent=2)
    (FOLDER / f"{stem(case)}.json").write_text(f"{text}\n", "utf-8")


def _encode(term: Term, delta: torch.Tensor, context: Context) -> Encoded:
    if not (isinstance(term, Banded) and term.masked):
        return term.encode(delta, context)
    # What a mask drops is not the term's to decide: a method says how much of each vector is kept.
    rows, columns = delta.shape
    left, singular, right = truncated_svd(delta, term.rank((rows, columns)))
    k = torch.arange(len(singular), dtype=torch.int32)
    kept = torch.stack([columns - 2 * k, rows - k])
    return term.from_factors(singular.unsqueeze(1) * right, left.T, context, kept)


def _shared(case: Golden) -> torch.Tensor:
    rows, columns = rows_and_columns(case.shape)
    groups = case.term.groups if isinstance(case.term, Shared) else 1
    draw = torch.Generator().manual_seed(groups)
    return torch.randn(groups * rows, columns, generator=draw) * 0.01


def _tensors(case: Golden) -> tuple[torch.Tensor | None, torch.Tensor]:
    draw = torch.Generator().manual_seed(len(stem(case)))
    if not case.dtype.is_floating_point:
        base = torch.randint(0, 200, case.shape, generator=draw).to(case.dtype)
        variant = torch.randint(0, 200, case.shape, generator=draw).to(case.dtype)
    else:
        base = torch.randn(case.shape, generator=draw).mul(0.1).to(case.dtype)
        step = torch.randn(case.shape, generator=draw) * 0.01
        if case.rows is not None:
            step[case.rows :] = 0
        if case.columns is not None:
            step[..., case.columns :] = 0
        variant = (base.float() + step).to(case.dtype)
    if isinstance(case.term, Rows) and case.term.added:
        base[-case.term.added :] = 0
        variant[-case.term.added :] = 0.5
    return (None if case.without_base else base), variant


def main() -> None:
    """Write what is not there yet."""
    for case in CASES:
        if (FOLDER / f"{stem(case)}.json").exists():
            print(f"kept  {stem(case)}")
        else:
            make(case)
            print(f"wrote {stem(case)}")


if __name__ == "__main__":
    main()
