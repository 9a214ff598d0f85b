"""A whole decode step of an 8B-shaped model in one CUDA graph: the base, and the base with variants.

    python benchmarks/decode_step.py [--device cuda] [--models NAME ...] [--variants 1 8 32]

Random weights, all layers with memory of their own: the embedding, per layer two norms, q, k and v in
one product, attention over `--context` cached tokens, the output product, gate and up in one, down; the
head. With variants every product and the embedding get each token's delta, 1 bit a weight (`--bits`),
one token a variant; segments are made once a step, on the device, inside the graph. `base rows` is a
batch without variants that goes the same way. On a CPU a tiny model runs, with TRITON_INTERPRET=1 by
the interpreted kernels, and results are compared with a step of dense weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from kernels import MODELS, Layer
from linear import machine
from timing import copy_bandwidth, time_in_turn

from deltafold.runtime.kernels.triton.forms import BitSlices
from deltafold.runtime.kernels.triton.grouped import GroupedProducts, GroupedRows
from deltafold.runtime.kernels.triton.layout import Kind, Slice, pad_levels, values
from deltafold.runtime.kernels.triton.segments import Segments, block_for, make_segments

#: Heads of queries and of keys, and the size of one.
HEADS = {"llama-3.1-8b": (32, 8, 128), "qwen2.5-7b": (28, 4, 128), "tiny": (3, 1, 16)}
TINY = (
    Layer("qkv", (48, 16, 16), 48, 2), Layer("o", (48,), 48, 2), Layer("gate_up", (64, 64), 48, 2),
    Layer("down", (48,), 64, 2), Layer("head", (96,), 48, 1),
)  # fmt: skip
#: What the project wants of an H200 at 1 bit: times of the base's step, by variants.
GOALS = {8: 1.65, 16: 2.3, 32: 3.5}
linear = torch.nn.functional.linear


@dataclass(eq=False)
class Product:
    """One linear layer of the model, and its deltas by variant and part."""

    layer: Layer
    weight: torch.Tensor
    forms: list[tuple[BitSlices, ...]] = field(default_factory=list)
    together: GroupedProducts | None = None


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.manual_seed(0)
    device = torch.device(options.device)
    found = []
    print(", ".join(f"{key} {value}" for key, value in machine(options.device).items()))
    for model in options.models:
        for variants in options.variants:
            found += _measure(model, variants, device, options)
            print(f"{model} {variants}", file=sys.stderr, flush=True)
    print(f"{'model':<14} {'variants':>8} {'case':<34} {'ms':>8} {'x base':>7}  note")
    for row in found:
        print(
            f"{row['model']:<14} {row['variants']:>8} {row['case']:<34} {row['ms'] or 0:>8.3f} "
            f"{row['over_base'] or 0:>7.2f}  {row['note']}"
        )
    if options.json:
        facts = machine(options.device)
        speed = copy_bandwidth(device, 2**24 if device.type == "cpu" else 2**30)
        result = {"machine": facts, "copy_bytes_per_s": speed, "rows": found}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(HEADS))
    parser.add_argument("--variants", nargs="+", type=int)
    parser.add_argument("--bits", type=int, default=1, choices=[1, 2, 4])
    parser.add_argument("--context", type=int)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json")
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    options.models = options.models or (["llama-3.1-8b"] if on_gpu else ["tiny"])
    options.variants = options.variants or ([1, 8, 16, 32] if on_gpu else [2])
    options.context = options.context or (1024 if on_gpu else 8)
    return options


def _measure(
    model: str, variants: int, device: torch.device, options: argparse.Namespace
) -> list[dict[str, object]]:
    step = Step(model, variants, device, options)
    cases = {"the base's step": lambda i: step.run(None)}
    if step.packed:
        # Each token a variant; then the same graph's worth of work for base rows alone.
        mixed = torch.arange(variants, device=device)
        base = torch.full_like(mixed, -1)
        cases[f"{options.bits} bit, one token a variant"] = lambda i: step.run(mixed)
        cases["base rows, through the mixed path"] = lambda i: step.run(base)
    times = time_in_turn(cases, device, options.rounds)
    plain = times["the base's step"]
    rows: list[dict[str, object]] = []
    for case, time in times.items():
        ran = not isinstance(time, str) and not isinstance(plain, str)
        ratio = time[0] / plain[0] if ran else None  # type: ignore[operator]
        note = time if isinstance(time, str) else ""
        if case.startswith("1 bit") and variants in GOALS and device.type == "cuda":
            note += f"goal: at most {GOALS[variants]}"
        if case.startswith("base rows") and device.type == "cuda":
            note += "goal: at most 1.03"
        row = {"model": model, "variants": variants, "bits": options.bits, "case": case}
        least = None if isinstance(time, str) else time[0]
        rows.append(row | {"ms": least, "over_base": ratio, "note": note})
    if device.type == "cpu" and step.packed:
        off = step.check()
        assert off < 1e-4, off
        rows[-2]["note"] = f"largest error {off:.0e}"
    return rows


class Step:
    """A model's weights and deltas, and one step over them."""

    def __init__(
        self, model: str, variants: int, device: torch.device, options: argparse.Namespace
    ) -> None:
        on_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        self.packed = on_gpu or os.environ.get("TRITON_INTERPRET") == "1"
        self.device, self.variants, self.bits = device, variants, options.bits
        self.heads = HEADS[model]
        shapes = TINY if model == "tiny" else MODELS[model]
        self.layers = [
            [self._product(layer) for layer in shapes[:-1]] for _ in range(shapes[0].count)
        ]
        self.head = self._product(shapes[-1])
        self.table, self.rows = self._product(shapes[-1]), GroupedRows()
        _, keys, size = self.heads
        cache = (2, len(self.layers), variants, keys, options.context, size)
        self.cache = torch.randn(cache, device=device, dtype=self.dtype) * 0.1
        columns = shapes[0].columns
        self.norm = torch.ones(columns, device=device, dtype=self.dtype)
        self.ids = torch.randint(0, shapes[-1].widths[0], (variants,), device=device)
        self.dense = False

    def run(self, slots: torch.Tensor | None) -> torch.Tensor:
        """Logits `[T, vocabulary]`; `slots` int64 `[T]`, or None for the base without our kernels."""
        segments = None
        if slots is not None:
            segments = make_segments(slots, self.variants, block_for(1))
        x = torch.nn.functional.embedding(self.ids, self.table.weight)
        if segments is not None and not self.dense:
            forms = {v: parts[0] for v, parts in enumerate(self.table.forms)}
            self.rows.add(x, self.ids, forms, segments, self.variants)
        elif self.dense:
            x = x + torch.stack(
                [_dense(self.table.forms[v][0])[self.ids[v]] for v in range(self.variants)]
            ).to(x.dtype)
        for number, (qkv, o, gate_up, down) in enumerate(self.layers):
            y = self._apply(qkv, self._normed(x), segments)
            x = x + self._apply(o, self._attended(y, number), segments)
            gate, up = self._apply(gate_up, self._normed(x), segments).chunk(2, -1)
            x = x + self._apply(down, torch.nn.functional.silu(gate) * up, segments)
        return self._apply(self.head, self._normed(x), segments)

    def check(self) -> float:
        """The largest error of a mixed step against one with dense weights, relative."""
        with torch.inference_mode():
            found = self.run(torch.arange(self.variants, device=self.device))
            self.dense = True
            expected = self.run(torch.arange(self.variants, device=self.device))
            self.dense = False
        return float((found - expected).abs().max() / expected.abs().max())

    def _apply(self, product: Product, x: torch.Tensor, segments: Segments | None) -> torch.Tensor:
        y = linear(x, product.weight)
        if segments is None:
            return y
        outputs = list(y.split(product.layer.widths, dim=1))
        if self.dense:
            for v, parts in enumerate(product.forms):
                for out, form in zip(outputs, parts, strict=True):
                    out[v] += (x[v].double() @ _dense(form).double().T).to(y.dtype)
            return y
        assert product.together is not None
        by_slot = dict(enumerate(product.forms))
        product.together.add(outputs, x.contiguous(), by_slot, segments, self.variants)
        return y

    def _attended(self, y: torch.Tensor, number: int) -> torch.Tensor:
        queries, keys, size = self.heads
        q, k, v = y.split((queries * size, keys * size, keys * size), dim=-1)
        known = self.cache[:, number]
        known[0, :, :, -1], known[1, :, :, -1] = (
            k.unflatten(-1, (keys, size)),
            v.unflatten(-1, (keys, size)),
        )
        found = torch.nn.functional.scaled_dot_product_attention(
            q.unflatten(-1, (queries, size)).unsqueeze(2), known[0], known[1], enable_gqa=True
        )
        return found.squeeze(2).flatten(1)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.norm)

    def _product(self, layer: Layer) -> Product:
        shape = (sum(layer.widths), layer.columns)
        weight = torch.randn(shape, device=self.device, dtype=self.dtype) * 0.02
        product = Product(layer, weight)
        if self.packed:
            product.together = GroupedProducts(len(layer.widths))
            for _ in range(self.variants):
                product.forms.append(tuple(self._form(n, layer.columns) for n in layer.widths))
        return product

    def _form(self, rows: int, columns: int) -> BitSlices:
        kind = Kind(self.bits, rows, columns, columns, False, torch.float16)
        shape = (kind.row_blocks, kind.column_tiles, kind.block_rows, kind.block_words)
        words = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=self.device)
        levels = torch.rand(1, rows, device=self.device) + 0.5
        return BitSlices((Slice(kind, words, pad_levels(levels, kind), 1e-3),))


def _dense(form: BitSlices) -> torch.Tensor:
    return torch.stack([values(piece) for piece in form.slices]).sum(0)


if __name__ == "__main__":
    main()
