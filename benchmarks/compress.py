"""Packing at the size of an 8B model: speed beside reading and hashing, memory, and lossless ratios.

    python benchmarks/compress.py [--layers 2] [--vocabulary 128256] [--narrower 1] [--rounds 3]
                                  [--zipnn PYTHON] [--json OUT]

Makes a base and a fine-tune with the shapes of Llama-3.1-8B, of random bfloat16 weights, scaled down by
layers and by rows of the vocabulary (the factor is printed). Every measured run is a process of its own
with an empty cache of digests. It times itself from behind its imports to its end, by the clock and by
what it takes of the processor; the time of whole processes, importing torch included, is in the JSON.
Reading both checkpoints and hashing every tensor is a run like the others, with as many threads, and
takes turns with them, and so does what `--dry-run` predicts. Figures are the least of all rounds.
Reading comes from the system's cache of files, so that the disk does not decide; what is written
goes to a disk and is synced. Coders of 256 MiB in memory stand beside each other: ours, zstandard, and
ZipNN on the XOR of both models, where `--zipnn` names a Python that has it; it is never installed here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from deltafold.compress.dtypes import raw_bytes
from deltafold.compress.safetensors_file import file_head

EMBEDDING = ("model.embed_tokens.weight", "lm_head.weight")
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
FULL_LAYERS, FULL_VOCABULARY = 32, 128256
CODECS = ("bitdelta", "bitdelta:bits=4,group=128", "int:bits=4,group=128", "lossless")
#: Spread of the weights, and of the step relative to it.
SIGMA, STEP = 0.02, 3e-3
BLOCK = 2**22


def shapes(layers: int, vocabulary: int, narrower: int = 1) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model with so many layers and tokens, its layers so many times narrower."""
    found: dict[str, tuple[int, ...]] = dict.fromkeys(EMBEDDING, (vocabulary, 4096 // narrower))
    found |= {"model.norm.weight": (4096 // narrower,)}
    for layer in range(layers):
        for name, shape in LAYER.items():
            found[f"model.layers.{layer}.{name}"] = tuple(n // narrower for n in shape)
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


def make_pair(folder: Path, model: dict[str, tuple[int, ...]]) -> tuple[Path, Path]:
    """Write both checkpoints, a block at a time."""
    specs = {name: (torch.bfloat16, shape) for name, shape in model.items()}
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
import sys, time
from concurrent.futures import ThreadPoolExecutor
from deltafold.compress import Checkpoint
import torch
began, busy = time.perf_counter(), time.process_time()
sources = [Checkpoint.open(p) for p in sys.argv[1:3]]
work = [(s, n) for s in sources for n in s.names()]
work.sort(key=lambda one: -one[0].spec(one[1]).shape[0])
with ThreadPoolExecutor(int(sys.argv[3])) as pool:
    list(pool.map(lambda one: one[0].sha256(one[1]), work))
print(time.perf_counter() - began, time.process_time() - busy)
"""
PACK = """
import sys, time
import deltafold.compress.pipeline
from deltafold.compress import Recipe, compress_checkpoint, parse_spec
from deltafold.compress.memory import peak_memory
base, tuned, jobs, out, codec, bound = sys.argv[1:7]
recipe = Recipe(default=parse_spec(codec))
began, busy = time.perf_counter(), time.process_time()
compress_checkpoint(base, tuned, out, recipe=recipe, jobs=int(jobs), max_memory=bound)
print(time.perf_counter() - began, time.process_time() - busy, peak_memory())
"""
PREDICT = """
import sys
from deltafold.compress import Recipe, parse_spec, predict_checkpoint
from deltafold.compress.limits import Limits
base, tuned, jobs, codec = sys.argv[1:5]
recipe = Recipe(default=parse_spec(codec))
print(predict_checkpoint(base, tuned, recipe=recipe, limits=Limits(int(jobs))).seconds)
"""
RESTORE = """
import sys, time
import deltafold.compress.restore
from deltafold.compress import restore_checkpoint
from deltafold.compress.memory import peak_memory
base, delta, out = sys.argv[1:4]
began, busy = time.perf_counter(), time.process_time()
restore_checkpoint(delta, base, out)
print(time.perf_counter() - began, time.process_time() - busy, peak_memory())
"""
OURS = """
import sys, time, numpy as np, torch
from deltafold.compress.terms import Context, Lossless
read = lambda path: torch.from_numpy(np.fromfile(path, np.uint8, 2**28)).view(torch.bfloat16)
mine, base = map(read, sys.argv[1:3])
for _ in range(2):  # compiles, the first time on a machine
    began = time.perf_counter()
    coded = Lossless().encode(torch.empty(0), Context("w", base, mine))
    middle = time.perf_counter()
    back = coded.term.restore(coded.parts, tuple(mine.shape), mine.dtype, Context("w", base))
    done = time.perf_counter()
assert torch.equal(back.view(torch.int16), mine.view(torch.int16))
size = sum(p.numel() for p in coded.parts.values())
count = mine.nbytes
print(size / count, count / (middle - began), count / (done - middle))
"""
ZSTD = """
import sys, time, zstandard
raw = open(sys.argv[1], "rb").read(2**28)
began = time.perf_counter()
packed = zstandard.ZstdCompressor(level=3, threads=int(sys.argv[3])).compress(raw)
middle = time.perf_counter()
zstandard.ZstdDecompressor().decompress(packed)
print(len(packed) / len(raw), len(raw) / (middle - began), len(raw) / (time.perf_counter() - middle))
"""
ZIPNN = """
import sys, time
from zipnn import ZipNN
import numpy as np
raw, base = (np.fromfile(p, np.uint8, 2**28) for p in sys.argv[1:3])
raw = (raw ^ base).tobytes()
zipper = ZipNN(bytearray_dtype="bfloat16", threads=int(sys.argv[3]))
for _ in range(2):
    began = time.perf_counter()
    packed = zipper.compress(bytearray(raw))
    middle = time.perf_counter()
    back = zipper.decompress(packed)
    done = time.perf_counter()
assert bytes(back) == raw
print(len(packed) / len(raw), len(raw) / (middle - began), len(raw) / (done - middle))
"""


def output(code: str, *arguments: object, python: str = sys.executable) -> tuple[float, str]:
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


def run(code: str, *arguments: object, python: str = sys.executable) -> list[float]:
    """The figures that such a process prints, and behind them its seconds."""
    seconds, text = output(code, *arguments, python=python)
    return [*map(float, text.split()), seconds]


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


class Least:
    """Of several runs the least of each figure; of coders' speeds the greatest."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    def add(self, name: str, figures: list[float], pick: Callable[..., float] = min) -> None:
        """One more run."""
        before = self.found.get(name, figures)
        self.found[name] = [pick(a, b) for a, b in zip(before, figures, strict=True)]


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one pair."""
    model, jobs = shapes(options.layers, options.vocabulary, options.narrower), options.jobs
    base, tuned = make_pair(folder, model)
    files = [p / "model.safetensors" for p in (tuned, base)]
    read = sum(f.stat().st_size for f in files)
    parameters = sum(math.prod(s) for s in model.values())
    whole = sum(math.prod(s) for s in shapes(FULL_LAYERS, FULL_VOCABULARY).values())
    out, again = folder / "delta", folder / "again"
    least, ratios = Least(), dict[str, float]()
    run(HASH, base, tuned, jobs)  # fills the system's cache
    run(PACK, base, tuned, jobs, out, "lossless", "2GiB")  # compiles
    for _ in range(options.rounds):
        for codec in options.codec:
            subprocess.run(["rm", "-rf", out, again], check=True)
            least.add("hash", run(HASH, base, tuned, jobs))
            least.add(codec, run(PACK, base, tuned, jobs, out, codec, "2GiB"))
            least.add(f"predicted {codec}", run(PREDICT, base, tuned, jobs, codec)[:1])
            ratios[codec] = folder_bytes(out) / (read / 2)
        least.add("restore", run(RESTORE, base, out, again))
        coders = {"lossless": OURS, "zstd": ZSTD} | ({"zipnn": ZIPNN} if options.zipnn else {})
        for name, code in coders.items():
            python = options.zipnn if name == "zipnn" else sys.executable
            least.add(f"coder {name}", run(code, *files, jobs, python=python)[:3], max)
    hashing, hash_busy, hash_process = least.found["hash"]
    packing = {}
    for codec in options.codec:
        seconds, busy, peak, process = least.found[codec]
        packing[codec] = {
            "seconds": seconds,
            "predicted_seconds": least.found[f"predicted {codec}"][0],
            "speed_over_hashing": hashing / seconds,
            "cpu_seconds": busy,
            "cpu_speed_over_hashing": hash_busy / busy,
            "process_seconds": process,
            "process_speed_over_hashing": hash_process / process,
            "peak_bytes": int(peak),
            "ratio": ratios[codec],
        }
    seconds, busy, peak, process = least.found["restore"]
    return {
        "layers": options.layers,
        "vocabulary": options.vocabulary,
        "parameters": parameters,
        "factor": whole / parameters,
        "bytes_read": read,
        "jobs": jobs,
        "rounds": options.rounds,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "hash_seconds": hashing,
        "hash_cpu_seconds": hash_busy,
        "hash_process_seconds": hash_process,
        "packing": packing,
        "restore": {
            "seconds": seconds,
            "cpu_seconds": busy,
            "process_seconds": process,
            "peak_bytes": int(peak),
        },
        "coders": {
            name.removeprefix("coder "): dict(zip(("ratio", "code", "decode"), row, strict=True))
            for name, row in least.found.items()
            if name.startswith("coder ")
        },
    }


def show(result: dict[str, Any]) -> None:
    """The figures as a table."""
    read, hashing = result["bytes_read"], result["hash_seconds"]
    print(
        f"{result['parameters'] / 1e9:.2f} B parameters; "
        f"the whole model is {result['factor']:.1f} times this"
    )
    print(
        f"reading and hashing both: {hashing:.2f} s, {read / hashing / 1e9:.2f} GB/s, "
        f"{result['jobs']} threads; imports are not counted\n"
    )
    print(
        f"{'codec':<28}{'seconds':>9}{'dry run':>9}{'of hashing speed':>18}{'by CPU time':>13}"
        f"{'peak GiB':>10}{'size':>8}"
    )
    for codec, row in result["packing"].items():
        print(
            f"{codec:<28}{row['seconds']:>9.2f}{row['predicted_seconds']:>9.2f}"
            f"{row['speed_over_hashing']:>18.0%}"
            f"{row['cpu_speed_over_hashing']:>13.0%}"
            f"{row['peak_bytes'] / 2**30:>10.2f}{row['ratio']:>8.1%}"
        )
    one, row, back = read / 2, result["packing"]["lossless"], result["restore"]
    print(
        f"\nlossless, checkpoints on disk: packed at {one / row['seconds'] / 1e6:.0f} MB/s, "
        f"restored at {one / back['seconds'] / 1e6:.0f} MB/s "
        f"with a peak of {back['peak_bytes'] / 2**30:.2f} GiB\n"
    )
    names = {"lossless": "lossless", "zipnn": "ZipNN on the XOR", "zstd": "zstd -3, plain"}
    for name, row in result["coders"].items():
        print(
            f"{names[name]:<20}{row['ratio']:>7.1%}, {row['code'] / 1e6:.0f} MB/s, "
            f"back {row['decode'] / 1e6:.0f} MB/s (256 MiB, in memory)"
        )
    if "zipnn" not in result["coders"]:
        print("ZipNN: not measured; name a Python that has it with --zipnn")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=FULL_VOCABULARY)
    parser.add_argument(
        "--narrower", type=int, default=1, help="layers this much narrower; to try it"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--codec", action="append", help="one of the codecs, beside lossless; may be repeated"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--zipnn", help="a Python with zipnn installed")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    options.codec = [c for c in CODECS if c in (options.codec or CODECS) or c == "lossless"]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
