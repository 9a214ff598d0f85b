"""Compiles the GPU kernels for machines that need not be there, and prints what each one takes.

    python tests/runtime/triton_compile.py TARGET [NAME]

TARGET is 80, 90 or the like; NAME is what the kernels' names shall begin with. One line of JSON a
kernel: registers a thread, bytes of stack (what does not fit registers), shared memory, how many
instructions of each kind there are, and how many of the main loop for each weight of a thread.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltafold.runtime.kernels.triton.apply import add_splits, apply_slices
from deltafold.runtime.kernels.triton.dense import multiply
from deltafold.runtime.kernels.triton.expand import expand
from deltafold.runtime.kernels.triton.launch import compute_type, constants, options
from deltafold.runtime.kernels.triton.layout import Kind
from deltafold.runtime.kernels.triton.lookup import look_up
from deltafold.runtime.kernels.triton.lowrank import (
    columns_for,
    ranks_for,
    shrink,
    stretch,
    warps_for,
)
from deltafold.runtime.kernels.triton.merge import merge_constants, merge_slices
from deltafold.runtime.kernels.triton.scatter import scatter
from deltafold.runtime.kernels.triton.sparse import apply_sparse
from deltafold.runtime.kernels.triton.table import make_table

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
#: Arguments that are addresses, by name; all other arguments are whole numbers.
POINTERS = {
    **dict.fromkeys(["order", "tile_slot", "tile_start", "tile_length", "counts", "ranks"], "*i32"),
    **dict.fromkeys(["begin", "slot_rows", "first", "first_block", "widths"], "*i32"),
    **dict.fromkeys(["scales", "partial", "ranked", "factors_table"], "*fp32"),
    **dict.fromkeys(
        ["words_table", "levels_table", "columns_table", "a_table", "b_table", "weights_table"],
        "*i64",
    ),
    **dict.fromkeys(["places_table", "values_table", "starts_table"], "*i64"),
    "places": "*i16",
    "values": "*fp16",
    "starts": "*i32",
    "levels": "*fp32",
    "index": "*i64",
    "ids": "*i64",
}
#: Numbers that are multiples of 16 in every model worth a GPU.
EVEN = {
    *("rows", "columns", "base_stride", "x_stride", "place_stride", "split_stride", "level_stride"),
    *("y0_stride", "y1_stride", "y2_stride", "y3_stride"),
}
#: Arguments of the activations' dtype.
DATA = {"x", "y", "y0", "y1", "y2", "y3", "out", "base"}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compiled(
    kernel: Any, constexprs: dict[str, Any], dtype: str, target: int, launch: dict[str, int]
) -> Any:
    """A kernel's machine code for `sm_<target>`; x, y and the like are of `dtype`."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
            continue
        data = f"*{dtype}" if name in DATA else "i32"
        signature[name] = POINTERS.get(name, data)
        if name in ("places", "values") and constexprs["OF"]:
            signature[name] = "*u8"
        if signature[name].startswith("*") or name in EVEN:
            attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constexprs.items()}
    source = ASTSource(kernel, signature, places, attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch)


def usage(binary: bytes) -> dict[str, Any]:
    """Registers, stack and instructions of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        found = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", found)
    assert numbers, found
    names = [name for name, _ in instructions(code) if not name.startswith(".L")]
    return {
        "registers": int(numbers[1]),
        "stack": int(numbers[2]) + int(numbers[3]),
        "loop": main_loop(code),
        "instructions": dict(Counter(names).most_common()),
    }


def instructions(code: str) -> list[tuple[str, str]]:
    """Names and operands, in order; labels have the name of what they are."""
    found = []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            found.append((label[1], ""))
        parts = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)(.*)", line)
        if parts:
            found.append((parts[1], parts[2]))
    return found


def main_loop(code: str) -> int:
    """Instructions of the shortest loop in which tensor cores multiply; 0 where there is none."""
    listed = instructions(code)
    places = {name: i for i, (name, _) in enumerate(listed) if name.startswith(".L")}
    lengths = []
    for i, (name, operands) in enumerate(listed):
        target = re.search(r"\.L_x_\d+", operands) if name == "BRA" else None
        start = places.get(target[0], i) if target else i
        body = [n for n, _ in listed[start:i] if not n.startswith(".L")]
        if {"HMMA", "HGMMA"} & set(body):
            lengths.append(len(body) + 1)
    return min(lengths, default=0)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / tool, *arguments], capture_output=True, text=True, check=True
    ).stdout


def cases() -> Iterator[tuple[str, Any, dict[str, Any], str, dict[str, int]]]:
    """Every kernel with the constants that a model of real size gives it."""
    cpu = torch.device("cpu")
    for bits, block, dtype, group, splits, parts in [
        (1, 8, torch.bfloat16, 4096, 1, 1),
        (1, 8, torch.bfloat16, 4096, 1, 3),
        (1, 8, torch.float16, 128, 4, 1),
        (1, 64, torch.bfloat16, 4096, 1, 1),
        (1, 64, torch.bfloat16, 4096, 1, 3),
        (2, 16, torch.bfloat16, 4096, 1, 1),
        (4, 16, torch.bfloat16, 128, 1, 2),
        (2, 8, torch.float32, 4096, 1, 1),
    ]:
        kind = Kind(bits, 4096, 4096, group, False, torch.float16)
        table = make_table(kind.of_blocks, [[[]]] * parts, cpu)
        made = constants(table, block, dtype, splits, False)
        name = f"apply {bits} bit, {block} tokens, groups of {group}, {parts} parts, {NAMES[dtype]}"
        yield name, apply_slices, made, NAMES[dtype], options(kind.block_rows, block, dtype)
    for bits, group, entries, dtype in [
        (1, 4096, 1, torch.bfloat16),
        (1, 4096, 2, torch.float16),
        (2, 4096, 1, torch.bfloat16),
        (4, 128, 1, torch.bfloat16),
    ]:
        kind = Kind(bits, 4096, 4096, group, False, torch.float16)
        name = f"merge {bits} bit, {entries} slices, groups of {group}, {NAMES[dtype]}"
        made = merge_constants(kind, entries, dtype)
        yield name, merge_slices, made, NAMES[dtype], {"num_warps": 8}
    for parts in (1, 3):
        split = {"SPLITS": 4, "BN": 1024, "BLOCK_ROWS": 128, "PARTS": parts}
        yield f"add splits, {parts} parts", add_splits, split, "bf16", {}
    for bits in (1, 4):
        kind = Kind(bits, 4096, 4096, 4096, False, torch.float16)
        flags = dict.fromkeys(["INDEXED", "BY_COLUMN"], False) | {
            "BASED": True,
            "HALF_LEVELS": True,
        }
        shape = {"FIELDS": kind.fields, "USED": kind.used_fields, "TILES": kind.column_tiles}
        more = {"BITS": bits, "BN": 128, "BW": 32, "BR": 16, "ENTRIES": 1, "ONE_GROUP": True}
        yield f"expand {bits} bit", expand, {**flags, **shape, **more}, "bf16", {"num_warps": 2}
        flags = dict.fromkeys(["BY_COLUMN", "SCALED"], False) | {"HALF_LEVELS": True}
        more = {
            "BITS": bits,
            "BN": 128,
            "BW": 32,
            "BT": 8,
            "BR": 8,
            "ENTRIES": 2,
            "ONE_GROUP": True,
        }
        yield f"look up {bits} bit", look_up, {**flags, **shape, **more}, "bf16", {"num_warps": 1}
    for rank, block, dtype in [
        (16, 8, torch.bfloat16),
        (2048, 8, torch.float16),
        (2048, 64, torch.bfloat16),
        (2048, 64, torch.float32),
    ]:
        low = {"BT": block, "BR": ranks_for(rank), "ENTRIES": 1, "ALIGNED": 16, "PARTS": 3}
        low["COMPUTE"] = compute_type(dtype)
        more = {"BN": 64, "SCALED": True, "SPLITS": 8, "EVEN": 16}
        name = f"rank {rank}, {block} tokens, {NAMES[dtype]}"
        step, warps = columns_for(dtype), warps_for(block, dtype)
        made = {**low, "BK": step, "STEPS": 4096 // step}
        yield f"shrink {name}", shrink, made, NAMES[dtype], warps
        yield f"stretch {name}", stretch, {**low, **more}, NAMES[dtype], warps
    for block, dtype in [(8, torch.bfloat16), (64, torch.float16), (64, torch.float32)]:
        step, warps = columns_for(dtype), warps_for(block, dtype)
        sizes = {"BT": block, "BN": 64, "BK": step, "ENTRIES": 1, "STEPS": 4096 // step}
        flags = {"SCALED": True, "ALIGNED": 16, "PARTS": 3, "COMPUTE": compute_type(dtype)}
        name = f"dense, {block} tokens, {NAMES[dtype]}"
        yield name, multiply, {**sizes, **flags}, NAMES[dtype], warps
    sparse = {"BLOCK": 32, "STEP": 32, "ENTRIES": 1, "SCALED": False, "PARTS": 3}
    yield "sparse lists", apply_sparse, {**sparse, "OF": 0, "HALF": 0}, "bf16", {}
    yield "sparse strata", apply_sparse, {**sparse, "OF": 16, "HALF": 8}, "bf16", {}

    spread = {"BLOCK": 32, "STEP": 64, "BASED": True}
    yield "scatter lists", scatter, {**spread, "OF": 0, "HALF": 0}, "bf16", {}
    yield "scatter strata", scatter, {**spread, "OF": 16, "HALF": 8}, "bf16", {}


def main() -> None:
    """Compile the kernels that the command line asks for."""
    target, which = int(sys.argv[1]), "".join(sys.argv[2:3])
    for name, kernel, constexprs, dtype, launch in cases():
        if name.startswith(which):
            found = compiled(kernel, constexprs, dtype, target, launch)
            row = {"kernel": name, "target": target, "shared": found.metadata.shared}
            row |= usage(found.asm["cubin"])
            if "FIELDS" in constexprs and row["loop"]:
                fields = constexprs.get("EACH", constexprs["FIELDS"])
                weights = constexprs["BN"] * constexprs["BW"] * fields
                each = weights / (32 * launch.get("num_warps", 4))
                row["loop_a_weight"] = round(row["loop"] / each, 2)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
