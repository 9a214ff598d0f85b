"""Seconds and peak memory of every codec, edit, family and merge on a GiB of tensors.

    python benchmarks/method_cost.py [--kinds codec,edit,family,merge] [--only NAME,...] [--tiny]
        [--seconds 120] [--json FILE] [--docs docs/quality.md] [--from FILE]

The set has the vocabulary of Qwen2.5-0.5B and as many of its layers as fill a GiB: random bfloat16
weights and a small random step, written to disk and read from there by a real packing run: hashing,
coding, writing, verification. Each run is a process of its own with one thread and one job, and
without a cache of digests. Seconds are CPU seconds from the first call on, so that a busy machine
matters less; memory is the most that the process held, libraries included. What needs calibration data
loads the model of this set and runs it on rows of random tokens.

A run that would take longer than `--seconds` is made on a share of the set, with fewer layers and fewer
rows of the table; the share stands beside what was measured. `--from` draws the table of an earlier
run's JSON and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from quality import machine
from quality_specs import codec_specs, edit_specs, family_specs, name_of
from tables import put_between

from compress import output, weights
from deltafold.compress.dtypes import raw_bytes
from deltafold.compress.merges import MERGES
from deltafold.compress.safetensors_file import file_head

GIB = 2**30
LAYERS, VOCABULARY = 27, 151_936
#: Rows of calibration data and their length.
ROWS, LENGTH = 16, 128
#: Layers of the smaller sets.
SHARES = (1, 3, 9)
MARKS = "<!-- cost: begin -->", "<!-- cost: end -->"


@dataclass(frozen=True)
class Shape:
    """A model of Qwen2's kind.

    Attributes:
        layers: how many.
        vocabulary: rows of the table, which is the head too.
        hidden: width.
        inner: of the feed-forward part.
        keys: of the keys and values.
    """

    layers: int
    vocabulary: int
    hidden: int = 896
    inner: int = 4864
    keys: int = 128

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes."""
        h, i, k = self.hidden, self.inner, self.keys
        layer = {
            "self_attn.q_proj.weight": (h, h),
            "self_attn.q_proj.bias": (h,),
            "self_attn.k_proj.weight": (k, h),
            "self_attn.k_proj.bias": (k,),
            "self_attn.v_proj.weight": (k, h),
            "self_attn.v_proj.bias": (k,),
            "self_attn.o_proj.weight": (h, h),
            "mlp.gate_proj.weight": (i, h),
            "mlp.up_proj.weight": (i, h),
            "mlp.down_proj.weight": (h, i),
            "input_layernorm.weight": (h,),
            "post_attention_layernorm.weight": (h,),
        }
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, h),
            "model.norm.weight": (h,),
        }
        for number in range(self.layers):
            found |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
        return found

    @property
    def nbytes(self) -> int:
        """Of all tensors in bfloat16."""
        return 2 * sum(math.prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, Any]:
        """As transformers reads it."""
        heads = self.hidden // 64
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self.keys // 64,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True)
class Row:
    """What one method took.

    Attributes:
        kind: codec, edit, family or merge.
        spec: of it.
        share: of a GiB that was measured.
        cpu_seconds: from the first call to the end.
        wall_seconds: the same by the clock.
        peak_bytes: the most that the process held.
        idle_bytes: what it held before it began.
        needs: what it was given beyond the checkpoints.
        note: why there are no figures.
    """

    kind: str
    spec: str
    share: float = 0.0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_bytes: int = 0
    idle_bytes: int = 0
    needs: str = ""
    note: str = ""


PACK = """
import json, sys, time
kind, base, one, two, out, spec, data = sys.argv[1:8]
import torch
torch.set_num_threads(1)
from deltafold.compress import Recipe, compress_checkpoint, merge_deltas, parse_spec, twin_deltas
from deltafold.compress.edits import parse_edit
from deltafold.compress.families import parse_family
from deltafold.compress.families.pack import compress_family
from deltafold.compress.memory import peak_memory
from deltafold.compress.merges import parse_merge
from deltafold.compress.methods import LosslessMethod
recipe = Recipe(default=parse_spec(spec)) if kind == "codec" else None
if kind == "edit":
    recipe = Recipe(default=LosslessMethod(), edits=(("*", parse_edit(spec)),))
needs = recipe.needs() if recipe else ()
evidence = None
if needs:
    import transformers.models.qwen2.modeling_qwen2
    from deltafold.compress.calibration import calibrate
idle = peak_memory()
began = time.process_time(), time.perf_counter()
if needs:
    references = {"unaligned": two} if "reference" in needs else {}
    evidence = calibrate(base, one, data, wanted=needs, references=references, safe=data)
if kind == "merge":
    merge = twin_deltas if spec == "twin" else merge_deltas
    merge(base, [one + "-delta", two + "-delta"], out, method=parse_merge(spec))
elif kind == "family":
    spec, _, codec = spec.partition(" --codec ")
    codec = parse_spec(codec) if codec else None
    compress_family(base, [one, two], out, method=parse_family(spec), codec=codec)
else:
    compress_checkpoint(base, one, out, recipe=recipe, evidence=evidence)
print(json.dumps({
    "cpu_seconds": time.process_time() - began[0],
    "wall_seconds": time.perf_counter() - began[1],
    "peak_bytes": peak_memory(),
    "idle_bytes": idle,
    "needs": ", ".join(needs),
}))
"""


class Sets:
    """The set and its shares on disk, made when they are asked for; one at a time."""

    def __init__(self, folder: Path, whole: Shape) -> None:
        self.folder, self.whole = folder, whole
        self._made: Shape | None = None

    def shares(self) -> list[Shape]:
        """Smaller sets, ascending, then the whole."""
        whole = self.whole
        fewer = [n for n in SHARES if n < whole.layers]
        cut = [
            Shape(n, max(whole.vocabulary * n // whole.layers, 512), *self._widths()) for n in fewer
        ]
        return [*cut, whole]

    def make(self, shape: Shape) -> list[Path]:
        """Folders of the base and two fine-tunes, and the rows of calibration data."""
        places = [self.folder / name for name in ("base", "one", "two")]
        rows = self.folder / "rows.jsonl"
        if self._made != shape:
            self._clear()
            _write(places, shape)
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(0, shape.vocabulary, (ROWS, LENGTH), generator=draw).tolist()
            rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids), "utf-8")
            self._made = shape
        return [*places, rows]

    def measure(self, kind: str, spec: str, shape: Shape) -> Row:
        """Run one method on one set."""
        base, one, two, rows = self.make(shape)
        out = self.folder / "out"
        if kind == "merge":
            self._pack(base, one, two)
        try:
            _, text = output(PACK, kind, base, one, two, out, spec, rows)
        except SystemExit as error:
            return Row(kind, spec, note=str(error).strip().splitlines()[-1])
        finally:
            _remove(out)
        found = json.loads(text.splitlines()[-1])
        share = shape.nbytes / GIB
        # Within a per cent of a GiB it is one.
        share = 1.0 if shape == self.whole and abs(share - 1) < 0.01 else share
        return Row(kind, spec, share, **found)

    def _pack(self, base: Path, *tuned: Path) -> None:
        """Lossless deltas to be merged, once a set."""
        for place in tuned:
            delta = Path(f"{place}-delta")
            if not delta.is_dir():
                output(PACK, "codec", base, place, place, delta, "lossless", "-")

    def _widths(self) -> tuple[int, int, int]:
        return self.whole.hidden, self.whole.inner, self.whole.keys

    def _clear(self) -> None:
        for name in ("base", "one", "two", "one-delta", "two-delta"):
            _remove(self.folder / name)


def _write(places: list[Path], shape: Shape) -> None:
    """A base and two fine-tunes, a block at a time."""
    specs = {name: (torch.bfloat16, size) for name, size in shape.tensors().items()}
    head, order = file_head(specs, {"format": "pt"})
    files = []
    for place in places:
        place.mkdir()
        (place / "config.json").write_text(json.dumps(shape.config()), "utf-8")
        files.append((place / "model.safetensors").open("wb"))
        files[-1].write(head)
    for number, name in enumerate(order):
        count = math.prod(specs[name][1])
        pairs = zip(*(weights(count, number, k * 10_000 + number) for k in (1, 2)), strict=True)
        for (base, one), (_, two) in pairs:
            for file, block in zip(files, (base, one, two), strict=True):
                file.write(raw_bytes(block).numpy().data)
    for file in files:
        file.close()


def _remove(place: Path) -> None:
    if place.is_dir():
        for path in sorted(place.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        place.rmdir()


def methods(kinds: list[str], only: list[str]) -> Iterator[tuple[str, str]]:
    """Kind and spec of what is measured: the first spec of each name."""
    specs = {
        "codec": [spec for _, spec in codec_specs(False)],
        "edit": edit_specs(False),
        "family": family_specs(),
        "merge": sorted(MERGES),
    }
    for kind in kinds:
        seen: set[str] = set()
        for spec in specs[kind]:
            name = name_of(spec)
            if name not in seen and (not only or name in only):
                seen.add(name)
                yield kind, spec


def measured(sets: Sets, kinds: list[str], only: list[str], most: float) -> list[Row]:
    """The smallest set first; then the largest that will not take too long, judged by the last one."""
    first, *larger = sets.shares()
    wanted = list(methods(kinds, only))
    rows = {}
    for kind, spec in wanted:
        rows[kind, spec] = sets.measure(kind, spec, first)
        print(f"{kind} {spec}: {rows[kind, spec]}", file=sys.stderr)
    # From set to set, so that each is written once.
    for shape in larger:
        for key in wanted:
            if not rows[key].note and _largest(rows[key], larger, most) == shape:
                rows[key] = sets.measure(*key, shape)
                print(f"{key[0]} {key[1]}: {rows[key]}", file=sys.stderr)
    return [rows[key] for key in wanted]


def _largest(row: Row, larger: list[Shape], most: float) -> Shape | None:
    """The largest set that this would take less than `most` seconds on; None for the smallest."""
    fitting = [s for s in larger if row.cpu_seconds * _growth(row, s) <= most]
    return fitting[-1] if fitting else None


def _growth(row: Row, shape: Shape) -> float:
    """How much longer a set takes: as many times as it is larger.

    What runs the model once for each stage grows with the square of the layers, if that is all it does.
    """
    times = shape.nbytes / GIB / row.share
    return times**1.3 if "sequential" in row.needs else times


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    about = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    lines = [
        f"`python benchmarks/method_cost.py --seconds {result['seconds']:g}`; {about}. "
        "Before it begins a process holds "
        f"{_idle(result['rows'], False)}, and {_idle(result['rows'], True)} where it runs the model.",
        "",
        "| method | measured | CPU s | CPU s a GiB | peak MiB | given |",
        "|---|---|---|---|---|---|",
        *(_line(Row(**row)) for row in result["rows"]),
    ]
    return "\n".join(lines)


def _idle(rows: list[dict[str, Any]], needs: bool) -> str:
    held = [row["idle_bytes"] for row in rows if bool(row["needs"]) == needs and not row["note"]]
    return f"{max(held, default=0) / 2**20:.0f} MiB"


def _line(row: Row) -> str:
    if row.note:
        return f"| {row.kind} `{row.spec}` | {row.note} | - | - | - | - |"
    whole = row.share == 1
    share = "the whole GiB" if whole else f"{row.share:.1%}"
    a_gib = f"{row.cpu_seconds / row.share:.0f}" if whole else f"~{row.cpu_seconds / row.share:.0f}"
    return (
        f"| {row.kind} `{row.spec}` | {share} | {row.cpu_seconds:.0f} | {a_gib} | "
        f"{row.peak_bytes / 2**20:.0f} | {row.needs or '-'} |"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kinds", default="codec,edit,family,merge")
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--tiny", action="store_true", help="three layers of 64 columns")
    parser.add_argument("--folder", help="where to put the set; needs 6 GiB")
    parser.add_argument("--json")
    parser.add_argument("--docs", help="put the table into this page, between its marks")
    parser.add_argument(
        "--from", dest="source", help="draw the table of this JSON; measure nothing"
    )
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write down."""
    options = _options()
    result = (
        json.loads(Path(options.source).read_text("utf-8")) if options.source else _run(options)
    )
    text = markdown(result)
    print(text)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if options.docs:
        put_between(Path(options.docs), MARKS, text)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    whole = Shape(3, 1024, 64, 96, 64) if options.tiny else Shape(LAYERS, VOCABULARY)
    only = [name for name in options.only.split(",") if name]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sets = Sets(Path(folder), whole)
        rows = measured(sets, options.kinds.split(","), only, options.seconds)
    return {
        "machine": machine(),
        "set_bytes": whole.nbytes,
        "seconds": options.seconds,
        "rows": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    main()
