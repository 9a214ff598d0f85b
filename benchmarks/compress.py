"""Packing at the size of an 8B model: speed beside reading and hashing, memory, and lossless ratios.

    python benchmarks/compress.py [--layers 2] [--zipnn PYTHON] [--json OUT]

Makes a base and a fine-tune with the shapes of Llama-3.1-8B, scaled down by layers (the factor is
printed), of random bfloat16 weights. Every measured run is a process of its own with an empty cache
of digests. Reading comes from the system's cache of files on both sides, so that the disk does not
decide. ZipNN is run where `--zipnn` names a Python that has it; it is never installed here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deltafold.compress.dtypes import raw_bytes
from deltafold.compress.safetensors_file import file_head

EMBEDDING = {"model.embed_tokens.weight": (128256, 4096), "lm_head.weight": (128256, 4096)}
LAYER = {
    "self_attn.q_proj.weight": (4096, 4096),
    "self_attn.k_proj.weight": (1024, 4096),
    "self_attn.v_proj.weight": (1024, 4096),
    "self_attn.o_proj.weight": (4096, 4096),
    "mlp.gate_proj.weight": (14336, 4096),
    "mlp.up_proj.weight": (14336, 4096),
    "mlp.down_proj.weight": (4096, 14336),
    "input_layernorm.weight": (4096,),
    "post_attention_layernorm.weight": (4096,),
}
FULL_LAYERS = 32
#: Spread of the weights, and of the step relative to it.
SIGMA, STEP = 0.02, 3e-3
BLOCK = 2**22


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model with so many layers."""
    found: dict[str, tuple[int, ...]] = dict(EMBEDDING) | {"model.norm.weight": (4096,)}
    for layer in range(layers):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in LAYER.items()}
    return found


def weights(
    count: int, seed: int, steps: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks of a base's numbers and of its fine-tune's, whose steps may have a seed of their own."""
    draw = torch.Generator().manual_seed(seed)
    moves = draw if steps is None else torch.Generator().manual_seed(steps)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        base = (torch.randn(size, generator=draw) * SIGMA).to(torch.bfloat16)
        step = torch.randn(size, generator=moves) * (SIGMA * STEP)
        yield base, (base.float() + step).to(torch.bfloat16)


def make_pair(folder: Path, layers: int) -> tuple[Path, Path]:
    """Write both checkpoints, a block at a time."""
    specs = {name: (torch.bfloat16, shape) for name, shape in shapes(layers).items()}
    head, order = file_head(specs, {"format": "pt"})
    folders = folder / "base", folder / "fine-tune"
    for place in folders:
        place.mkdir()
        (place / "config.json").write_text("{}")
    with (
        (folders[0] / "model.safetensors").open("wb") as base,
        (folders[1] / "model.safetensors").open("wb") as tuned,
    ):
        for file in (base, tuned):
            file.write(head)
        for number, name in enumerate(order):
            for first, second in weights(math.prod(specs[name][1]), number):
                base.write(raw_bytes(first).numpy().data)
                tuned.write(raw_bytes(second).numpy().data)
    return folders


HASH = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from deltafold.compress import Checkpoint
sources = [Checkpoint.open(p) for p in sys.argv[1:3]]
work = [(s, n) for s in sources for n in s.names()]
with ThreadPoolExecutor(int(sys.argv[3])) as pool:
    list(pool.map(lambda one: one[0].sha256(one[1]), work))
"""
PACK = """
import sys
from deltafold.compress import Recipe, compress_checkpoint, parse_spec
from deltafold.compress.memory import peak_memory
base, tuned, jobs, out, codec, bound = sys.argv[1:7]
codec = parse_spec(codec)
compress_checkpoint(base, tuned, out, recipe=Recipe(default=codec), jobs=int(jobs), max_memory=bound)
print(peak_memory())
"""
RESTORE = """
import sys
from deltafold.compress import restore_checkpoint
from deltafold.compress.memory import peak_memory
base, delta, out = sys.argv[1:4]
restore_checkpoint(delta, base, out)
print(peak_memory())
"""
ZSTD = """
import sys, time, zstandard
raw = open(sys.argv[1], "rb").read(2**28)
began = time.perf_counter()
packed = zstandard.ZstdCompressor(level=3, threads=int(sys.argv[2])).compress(raw)
middle = time.perf_counter()
zstandard.ZstdDecompressor().decompress(packed)
print(len(packed) / len(raw), len(raw) / (middle - began), len(raw) / (time.perf_counter() - middle))
"""
ZIPNN = """
import sys, time
from zipnn import ZipNN
raw, base = (open(p, "rb").read(2**28) for p in sys.argv[1:3])
import numpy as np
raw = (np.frombuffer(raw, np.uint8) ^ np.frombuffer(base, np.uint8)).tobytes()
zipper = ZipNN(bytearray_dtype="bfloat16", threads=int(sys.argv[3]))
began = time.perf_counter()
packed = zipper.compress(raw)
middle = time.perf_counter()
assert bytes(ZipNN(bytearray_dtype="bfloat16").decompress(packed)) == raw
print(len(packed) / len(raw), len(raw) / (middle - began), len(raw) / (time.perf_counter() - middle))
"""


def run(code: str, *arguments: object, python: str = sys.executable) -> tuple[float, str]:
    """Seconds and output of a process of its own, its cache of digests empty."""
    with tempfile.TemporaryDirectory() as home:
        native = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deltafold"
        if (native / "native").is_dir():  # compiled code is not what is measured
            (Path(home) / "native").symlink_to(native / "native")
        began = time.perf_counter()
        done = subprocess.run(
            [python, "-c", code, *map(str, arguments)],
            env={**os.environ, "DELTAFOLD_HOME": home},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds, done.stdout.strip()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def measure(folder: Path, layers: int, jobs: int, zipnn: str | None) -> dict[str, Any]:
    """All figures of one pair."""
    base, tuned = make_pair(folder, layers)
    files = [p / "model.safetensors" for p in (base, tuned)]
    read = sum(f.stat().st_size for f in files)
    parameters = sum(math.prod(s) for s in shapes(layers).values())
    result: dict[str, Any] = {
        "layers": layers,
        "parameters": parameters,
        "factor": sum(math.prod(s) for s in shapes(FULL_LAYERS).values()) / parameters,
        "bytes_read": read,
        "jobs": jobs,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "packing": {},
    }
    run(HASH, base, tuned, jobs)  # fills the system's cache, and compiles
    hashing = min(run(HASH, base, tuned, jobs)[0] for _ in range(2))
    result["hash_seconds"] = hashing
    for codec in ("bitdelta", "bitdelta:bits=4,group=128", "lossless"):
        out = folder / "delta"
        seconds, peak = run(PACK, base, tuned, jobs, out, codec, "2GiB")
        row = {
            "seconds": seconds,
            "speed_over_hashing": hashing / seconds,
            "peak_bytes": int(peak),
            "ratio": folder_bytes(out) / (read / 2),
        }
        if codec == "lossless":
            row["restore_seconds"], peak = run(RESTORE, base, out, folder / "again")
            row["restore_peak_bytes"] = int(peak)
        result["packing"][codec] = row
        subprocess.run(["rm", "-rf", out, folder / "again"], check=True)
    result["zstd"] = [float(x) for x in run(ZSTD, files[1], jobs)[1].split()]
    if zipnn:
        result["zipnn"] = [
            float(x) for x in run(ZIPNN, files[1], files[0], jobs, python=zipnn)[1].split()
        ]
    return result


def show(result: dict[str, Any]) -> None:
    """The figures as a table."""
    read, hashing = result["bytes_read"], result["hash_seconds"]
    print(
        f"{result['parameters'] / 1e9:.2f} B parameters; "
        f"the whole model is {result['factor']:.1f} times this"
    )
    print(
        f"reading and hashing both: {hashing:.1f} s, {read / hashing / 1e9:.2f} GB/s, "
        f"{result['jobs']} jobs\n"
    )
    print(f"{'codec':<28}{'seconds':>9}{'of hashing speed':>18}{'peak GiB':>10}{'size':>8}")
    for codec, row in result["packing"].items():
        print(
            f"{codec:<28}{row['seconds']:>9.1f}{row['speed_over_hashing']:>18.0%}"
            f"{row['peak_bytes'] / 2**30:>10.2f}{row['ratio']:>8.1%}"
        )
    row = result["packing"]["lossless"]
    one = read / 2
    print(
        f"\nlossless                    {row['ratio']:.1%}, "
        f"packed at {one / row['seconds'] / 1e6:.0f} MB/s, "
        f"restored at {one / row['restore_seconds'] / 1e6:.0f} MB/s"
    )
    for name in ("zipnn", "zstd"):
        if name in result:
            ratio, there, back = result[name]
            what = "ZipNN on the XOR" if name == "zipnn" else "zstd -3, plain"
            print(
                f"{what:<28}{ratio:.1%}, {there / 1e6:.0f} MB/s, back {back / 1e6:.0f} MB/s "
                "(256 MiB, in memory)"
            )
    if "zipnn" not in result:
        print("ZipNN: not measured; name a Python that has it with --zipnn")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--zipnn", help="a Python with zipnn installed")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.layers, options.jobs, options.zipnn)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
