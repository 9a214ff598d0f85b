"""Lossless coding of fine-tunes: ratio and MB/s, ours beside plain zstandard and ZipNN.

    python benchmarks/lossless.py [--elements 4194304] [--rounds 3] [--zipnn PYTHON] [--json FILE]

Data: bf16, fp16 and fp32 weights of standard deviation 0.02 and the same moved by a normal step of
0.001, 0.003 and 0.01 of that; and the demo's five real fine-tunes (bf16, half a million weights each).
Coders: `lossless` (differences under the base's exponents), `lossless:level=3` (XOR, byte streams,
zstandard), zstandard at level 3 on the plain words and on their XOR with the base, and ZipNN on the
XOR, if `--zipnn` names a Python that has it. Ratio is coded over plain bytes. Times are the least of
the rounds, round-robin, of one run; MB/s counts the tensor's own bytes. ZipNN is timed in its own
process on the same data, without the XOR, and with its own choice of threads.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import zstandard

from deltafold.compress import Checkpoint, DeltaRepo, dtypes
from deltafold.compress.terms import Context, ExactTerm, Lossless, LosslessStreams

DEMO = Path(__file__).parents[1] / "server" / "demo" / "data"
ZIPNN = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
from zipnn import ZipNN
rounds, names = int(sys.argv[1]), json.loads(sys.argv[2])
found = {"plain": 0, "coded": 0, "encode": 0.0, "decode": 0.0}
for path, dtype in names:
    data = open(path, "rb").read()
    coder = ZipNN(input_format="byte", bytearray_dtype=dtype)
    into, back = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        coded = coder.compress(bytearray(data))
        middle = time.perf_counter()
        plain = coder.decompress(coded)
        into.append(middle - began)
        back.append(time.perf_counter() - middle)
    assert bytes(plain) == data
    found["plain"] += len(data)
    found["coded"] += len(coded)
    found["encode"] += min(into)
    found["decode"] += min(back)
print(json.dumps(found))
"""


class Pair(NamedTuple):
    """A base's tensor and a fine-tune's."""

    base: torch.Tensor
    variant: torch.Tensor


class Measured(NamedTuple):
    """Sums over the tensors of one case; sizes in bytes, times in seconds."""

    plain: int
    coded: int
    encode: float
    decode: float


Coder = tuple[Callable[[Pair], Any], Callable[[Any, Pair], torch.Tensor], Callable[[Any], int]]


def main() -> None:
    """Measure and print."""
    options = _options()
    rows = []
    for name, pairs in _cases(options.elements):
        found = {coder: _measure(how, pairs, options.rounds) for coder, how in _coders().items()}
        if options.zipnn:
            found["ZipNN on XOR"] = _zipnn(options.zipnn, pairs, options.rounds)
        rows += [_row(name, coder, m) for coder, m in found.items()]
        _print(rows[-len(found) :])
    if options.json:
        machine = {
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }
        result = {"date": str(datetime.date.today()), **machine, "rows": rows}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--elements", type=int, default=2**22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--zipnn", help="a Python interpreter that has zipnn")
    parser.add_argument("--json")
    return parser.parse_args()


def _cases(elements: int) -> Iterator[tuple[str, list[Pair]]]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for step in (1e-3, 3e-3, 1e-2):
            draw = torch.Generator().manual_seed(0)
            weight = torch.randn(elements, generator=draw) * 0.02
            base = weight.to(dtype)
            moved = base.float() + torch.randn(elements, generator=draw) * 0.02 * step
            yield f"{dtypes.NAMES[dtype]} {step:g}", [Pair(base, moved.to(dtype))]
    source = Checkpoint.open(DEMO / "base")
    for folder in sorted((DEMO / "zoo").iterdir()):
        repo = DeltaRepo.open(folder)
        names = [n for n in repo.manifest.tensors if n in source]
        pairs = [Pair(source.tensor(n), repo.restored(n, source.tensor(n))) for n in names]
        yield f"demo {folder.name}", pairs


def _coders() -> dict[str, Coder]:
    return {
        "lossless": _term(Lossless()),
        "lossless:level=3": _term(LosslessStreams(level=3)),
        "zstd -3 on XOR": _zstd(xor=True),
        "zstd -3": _zstd(xor=False),
    }


def _term(term: Lossless | LosslessStreams) -> Coder:
    def encode(pair: Pair) -> Any:
        return term.encode(torch.empty(0), Context("w", pair.base, pair.variant))

    def decode(coded: Any, pair: Pair) -> torch.Tensor:
        assert isinstance(coded.term, ExactTerm)
        shape = tuple(pair.variant.shape)
        return coded.term.restore(coded.parts, shape, pair.variant.dtype, Context("w", pair.base))

    return encode, decode, lambda coded: sum(part.numel() for part in coded.parts.values())


def _xored(pair: Pair) -> torch.Tensor:
    return dtypes.raw_bytes(pair.variant) ^ dtypes.raw_bytes(pair.base)


def _zstd(*, xor: bool) -> Coder:
    def encode(pair: Pair) -> bytes:
        data = _xored(pair) if xor else dtypes.raw_bytes(pair.variant)
        return zstandard.ZstdCompressor(level=3).compress(data.numpy().tobytes())

    def decode(coded: bytes, pair: Pair) -> torch.Tensor:
        raw = bytearray(zstandard.ZstdDecompressor().decompress(coded))
        words = torch.frombuffer(raw, dtype=torch.uint8)
        if xor:
            words = words ^ dtypes.raw_bytes(pair.base)
        return words.view(pair.variant.dtype).reshape(pair.variant.shape)

    return encode, decode, len


def _measure(coder: Coder, pairs: Sequence[Pair], rounds: int) -> Measured:
    encode, decode, nbytes = coder
    plain = coded_bytes = 0
    into = back = 0.0
    for pair in pairs:
        times: list[tuple[float, float]] = []
        for _ in range(rounds):
            began = time.perf_counter()
            coded = encode(pair)
            middle = time.perf_counter()
            found = decode(coded, pair)
            times.append((middle - began, time.perf_counter() - middle))
        assert dtypes.sha256(found) == dtypes.sha256(pair.variant)
        plain += pair.variant.numel() * pair.variant.element_size()
        coded_bytes += nbytes(coded)
        into += min(t for t, _ in times)
        back += min(t for _, t in times)
    return Measured(plain, coded_bytes, into, back)


def _zipnn(python: str, pairs: Sequence[Pair], rounds: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i, pair in enumerate(pairs):
            path = Path(folder) / str(i)
            path.write_bytes(_xored(pair).numpy().tobytes())
            files.append((str(path), str(pair.variant.dtype).removeprefix("torch.")))
        command = [python, "-c", ZIPNN, str(rounds), json.dumps(files)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _row(case: str, coder: str, found: Measured) -> dict[str, Any]:
    return {
        "case": case,
        "coder": coder,
        "bytes": found.coded,
        "ratio": found.coded / found.plain,
        "encode_MB_s": found.plain / found.encode / 1e6,
        "decode_MB_s": found.plain / found.decode / 1e6,
    }


def _print(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['case']:<16} {row['coder']:<17} {row['ratio']:7.2%}"
            f"  encode {row['encode_MB_s']:6.0f} MB/s  decode {row['decode_MB_s']:6.0f} MB/s"
        )
    print()


if __name__ == "__main__":
    main()
