"""What `kernels.py` compares: our kernels, and other ways to serve many variants of one layer."""

from __future__ import annotations

import importlib.util
import os
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from timing import CALLS, Call

from deltafold.compress import parse_spec
from deltafold.compress.terms import Context
from deltafold.runtime.kernels.base import DeltaMatrix
from deltafold.runtime.kernels.forms import Target, product_form
from deltafold.runtime.kernels.simple import Factors

#: Bytes of weights that no cache holds; smaller layers get several copies.
_UNCACHED = 2**28
_KERNEL = (
    "https://raw.githubusercontent.com/FasterDecoding/BitDelta/"
    "386d2835f67025570d9f2c838ac0ce029ec35f51/bitdelta/binary_gemm_kernel.py"
)
_FETCHED = Path(__file__).parent / "results" / "fetched"
linear = torch.nn.functional.linear


@dataclass(frozen=True)
class Setting:
    """One layer and its batch.

    Attributes:
        rows: N.
        columns: M.
        variants: V.
        each: tokens of each variant.
        device: where it runs.
    """

    rows: int
    columns: int
    variants: int
    each: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def packed(self) -> bool:
        """Whether the GPU kernels run, be it in Triton's interpreter."""
        return self.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

    @property
    def dense_bytes(self) -> int:
        """Of one copy of the weight."""
        return self.rows * self.columns * self.dtype.itemsize

    def copies(self, size: int) -> int:
        """How many copies of data of this size make it uncached."""
        wanted = min(CALLS, -(-_UNCACHED // size)) if self.device.type == "cuda" else 1
        return max(1, wanted)

    @cached_property
    def x(self) -> torch.Tensor:
        """Activations `[V * each, M]`."""
        return torch.randn(
            self.variants * self.each, self.columns, device=self.device, dtype=self.dtype
        )

    @cached_property
    def weights(self) -> list[torch.Tensor]:
        """Copies of the base's weight."""
        return [self.random_weight() for _ in range(self.copies(self.dense_bytes))]

    def random_weight(self) -> torch.Tensor:
        """A weight `[N, M]`."""
        shape = (self.rows, self.columns)
        return torch.randn(shape, device=self.device, dtype=self.dtype) * 0.02

    def part(self, variant: int) -> slice:
        """A variant's tokens."""
        return slice(variant * self.each, (variant + 1) * self.each)


@dataclass(frozen=True)
class Case:
    """One way to compute the layer.

    Attributes:
        name: for the table.
        call: computes it with the i-th copy of the weights.
        packed_bytes: packed weights that one call reads.
        error: the largest error against float64, relative to the largest output; None if not checked.
    """

    name: str
    call: Call
    packed_bytes: int = 0
    error: Callable[[], float] | None = None


def make_cases(setting: Setting, fetch: bool) -> tuple[list[Case], dict[str, str]]:
    """The cases of one layer, and why others are left out."""
    refused: dict[str, str] = {}

    def base(i: int) -> torch.Tensor:
        return linear(setting.x, setting.weights[i % len(setting.weights)])

    cases = [Case("base alone", base), *_dense(setting, refused)]
    forms = {name: make(setting) for name, make in FORMS.items()}
    for name, make in forms.items():
        sets = [make() for _ in range(setting.copies(sum(f.nbytes for f in make())))]
        cases.append(_ours(setting, name, sets))
        if name in ("1 bit", "4 bits"):
            cases += _rebuilt(setting, name, sets[0])
        if name.startswith("rank"):
            cases.append(_factor_loop(setting, name, sets))
    if setting.packed:
        cases.append(_torch_unpack(setting))
    cases += _bitdelta(setting, refused, fetch)
    return cases, refused


def _dense(setting: Setting, refused: dict[str, str]) -> list[Case]:
    """A weight a variant: what serving merged checkpoints costs if all of them fit."""
    size = setting.variants * setting.dense_bytes
    names = ["dense copies, a product each", "dense copies, torch.bmm", "dense copies, grouped mm"]
    if setting.device.type == "cuda" and size > 0.5 * torch.cuda.mem_get_info()[0]:
        refused |= dict.fromkeys(names, f"some layers need {size / 2**30:.0f} GiB or more")
        return _swap(setting)
    shape = (setting.variants, setting.rows, setting.columns)
    stacks = [
        torch.randn(shape, device=setting.device, dtype=setting.dtype)
        for _ in range(setting.copies(size))
    ]
    x, variants = setting.x, range(setting.variants)

    def loop(i: int) -> torch.Tensor:
        held = stacks[i % len(stacks)]
        return torch.cat([linear(x[setting.part(v)], held[v]) for v in variants])

    def bmm(i: int) -> torch.Tensor:
        rows = x.reshape(setting.variants, setting.each, setting.columns)
        return torch.bmm(rows, stacks[i % len(stacks)].transpose(1, 2))

    ends = torch.arange(1, setting.variants + 1, dtype=torch.int32, device=setting.device)
    ends *= setting.each

    def grouped(i: int) -> torch.Tensor:
        held = stacks[i % len(stacks)].transpose(1, 2)
        return torch._grouped_mm(x, held, offs=ends)

    cases = [Case(names[0], loop), Case(names[1], bmm)]
    if setting.device.type == "cuda":
        cases.append(Case(names[2], grouped))
    return [*cases, *_swap(setting)]


def _swap(setting: Setting) -> list[Case]:
    """One weight in use, the others copied over it in turn."""
    live, other, x = setting.random_weight(), setting.random_weight(), setting.x
    host = other.to("cpu")
    if setting.device.type == "cuda":
        host = host.pin_memory()

    def swap(source: torch.Tensor) -> Call:
        def call(i: int) -> torch.Tensor:
            parts = []
            for v in range(setting.variants):
                live.copy_(source, non_blocking=True)
                parts.append(linear(x[setting.part(v)], live))
            return torch.cat(parts)

        return call

    return [
        Case("merged weights swapped, device copies", swap(other)),
        Case("merged weights swapped, from host memory", swap(host)),
    ]


Forms = list[DeltaMatrix]


def _sliced(*kinds: tuple[int, int]) -> Callable[[Setting], Callable[[], Forms]]:
    """Random slices of (bits, columns of a group, or 0) on a GPU: only their size matters to time."""

    def of(setting: Setting) -> Callable[[], Forms]:
        def one() -> DeltaMatrix:
            from deltafold.runtime.kernels.triton.forms import BitSlices
            from deltafold.runtime.kernels.triton.layout import Kind, Slice, pad_levels

            slices, device = [], setting.device
            for bits, group in kinds:
                width = min(group or setting.columns, setting.columns)
                kind = Kind(bits, setting.rows, setting.columns, width, False, torch.float16)
                shape = (kind.row_blocks, kind.column_tiles, kind.block_rows, kind.block_words)
                words = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=device)
                levels = torch.rand(kind.groups, setting.rows, device=device) + 0.5
                slices.append(Slice(kind, words, pad_levels(levels, kind), 1e-3))
            return BitSlices(tuple(slices))

        return lambda: [one() for _ in range(setting.variants)]

    return of


def _sparse(drop: float) -> Callable[[Setting], Callable[[], Forms]]:
    def of(setting: Setting) -> Callable[[], Forms]:
        def one() -> DeltaMatrix:
            from deltafold.runtime.kernels.triton.sparse import sparse_rows

            shape = (setting.rows, setting.columns)
            delta = torch.randn(shape, device=setting.device) * 1e-3
            delta *= torch.rand(shape, device=setting.device) >= drop
            form = sparse_rows(delta, setting.device)
            assert form is not None
            return form

        return lambda: [one() for _ in range(setting.variants)]

    return of


def _low_rank(rank: int) -> Callable[[Setting], Callable[[], Forms]]:
    def of(setting: Setting) -> Callable[[], Forms]:
        kind = {"device": setting.device, "dtype": setting.dtype}

        def one() -> DeltaMatrix:
            a = torch.randn(rank, setting.columns, **kind) * 0.02
            return Factors(a, torch.randn(setting.rows, rank, **kind) * 0.02)

        return lambda: [one() for _ in range(setting.variants)]

    return of


def _coded(spec: str) -> Callable[[Setting], Callable[[], Forms]]:
    """A codec's own form: of the CPU, and of layouts that only codecs make."""

    def of(setting: Setting) -> Callable[[], Forms]:
        shape, context = (setting.rows, setting.columns), Context("layer.weight")
        encoded = parse_spec(spec).encode(torch.randn(shape) * 1e-3, context)
        if setting.packed and spec == "stratified":
            from deltafold.runtime.kernels.triton.sparse import strata

            ((term, parts),) = encoded

            def one() -> DeltaMatrix:
                form = strata(term, parts, shape, setting.device, "layer")  # type: ignore[arg-type]
                assert form is not None
                return form

            return lambda: [one() for _ in range(setting.variants)]
        target = Target(setting.device, setting.dtype)
        return lambda: [
            product_form(encoded, shape, context, target) for _ in range(setting.variants)
        ]

    return of


def _either(
    gpu: Callable[[Setting], Callable[[], Forms]], spec: str
) -> Callable[[Setting], Callable[[], Forms]]:
    return lambda setting: (gpu if setting.packed else _coded(spec))(setting)


FORMS: dict[str, Callable[[Setting], Callable[[], Forms]]] = {
    "1 bit": _either(_sliced((1, 0)), "bitdelta"),
    "1 bit, groups of 128": _either(_sliced((1, 128)), "bitdelta:group=128"),
    "2 sign planes": _either(_sliced((1, 0), (1, 0)), "bitdelta:bits=2"),
    "2 bits": _either(_sliced((2, 0)), "int:bits=2"),
    "3 bits": _either(_sliced((2, 0), (1, 0)), "int:bits=3"),
    "4 bits": _either(_sliced((4, 0)), "int:bits=4"),
    "4 bits, groups of 128": _either(_sliced((4, 128)), "int:bits=4,group=128"),
    "1 of 16 kept": _coded("stratified"),
    "DARE 90 %": _either(_sparse(0.9), "dare:drop=0.9"),
    "DARE 99 %": _either(_sparse(0.99), "dare:drop=0.99"),
    "rank 16": _low_rank(16),
    "rank 64": _low_rank(64),
}


def _ours(setting: Setting, name: str, sets: Sequence[Forms]) -> Case:
    """The base's product and all variants' deltas added to it."""
    x, held = setting.x, sum(form.nbytes for form in sets[0])

    def add(i: int) -> torch.Tensor:
        y = linear(x, setting.weights[i % len(setting.weights)])
        for v, form in enumerate(sets[i % len(sets)]):
            part = setting.part(v)
            y[part] += form.matmul(x[part])
        return y

    call = _together(setting, sets) if setting.packed else add

    def error() -> float:
        form, part = sets[0][-1], setting.part(setting.variants - 1)
        dense = form.b.double() @ form.a.double() if isinstance(form, Factors) else None
        if dense is None:
            dense = _dense_of(form, setting)
        with torch.inference_mode():
            found = call(0)[part].double()
        weight = setting.weights[0].double() + dense
        expected = x[part].double() @ weight.T
        return float((found - expected).abs().max() / expected.abs().max())

    return Case(f"base + {name}", call, held, error)


def _dense_of(form: Any, setting: Setting) -> torch.Tensor:
    if hasattr(form, "dense"):
        return form.dense(torch.float32).double()
    eye = torch.eye(setting.columns, device=setting.device)
    return form.matmul(eye).T.double()


def _together(setting: Setting, sets: Sequence[Forms]) -> Call:
    from deltafold.runtime.kernels.triton.grouped import GroupedProducts
    from deltafold.runtime.kernels.triton.segments import block_for, make_segments

    layers = [GroupedProducts() for _ in sets]
    slots = torch.arange(setting.variants, device=setting.device).repeat_interleave(setting.each)
    segments = make_segments(slots, setting.variants, block_for(setting.each))

    def call(i: int) -> torch.Tensor:
        y = linear(setting.x, setting.weights[i % len(setting.weights)])
        which = i % len(sets)
        by_slot = dict(enumerate(sets[which]))
        layers[which].add(y, setting.x, by_slot, segments, setting.variants)
        return y

    return call


def _rebuilt(setting: Setting, name: str, forms: Forms) -> list[Case]:
    """A dense weight from base and delta for every variant and step, and from host memory."""
    if not setting.packed:
        return []
    from deltafold.runtime.kernels.triton.forms import BitSlices

    slices = [form for form in forms if isinstance(form, BitSlices)]
    words = [piece.words for piece in slices[0].slices]
    hosts = [w.to("cpu") for w in words]
    if setting.device.type == "cuda":
        hosts = [host.pin_memory() for host in hosts]

    def rebuild(copied: bool) -> Call:
        def call(i: int) -> torch.Tensor:
            base, parts = setting.weights[i % len(setting.weights)], []
            for v in range(setting.variants):
                form = slices[0] if copied else slices[v]
                if copied:
                    for there, host in zip(words, hosts, strict=True):
                        there.copy_(host, non_blocking=True)
                merged = form.dense(setting.dtype, base)
                parts.append(linear(setting.x[setting.part(v)], merged))
            return torch.cat(parts)

        return call

    return [
        Case(f"rebuilt every step, {name}", rebuild(False)),
        Case(f"copied from host and rebuilt, {name}", rebuild(True)),
    ]


def _factor_loop(setting: Setting, name: str, sets: Sequence[Forms]) -> Case:
    """Two thin products a variant: how adapters are applied where no kernel groups them."""
    x = setting.x

    def call(i: int) -> torch.Tensor:
        y = linear(x, setting.weights[i % len(setting.weights)])
        for v, form in enumerate(sets[i % len(sets)]):
            part = setting.part(v)
            y[part] += form.matmul(x[part])
        return y

    return Case(f"base + {name}, two torch products each", call)


def _torch_unpack(setting: Setting) -> Case:
    """Signs unpacked by torch's own operations in every step."""
    width = -(-setting.columns // 8)
    shape = (setting.variants, setting.rows, width)
    signs = torch.randint(0, 256, shape, dtype=torch.uint8, device=setting.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=setting.device)
    x = setting.x

    def call(i: int) -> torch.Tensor:
        y = linear(x, setting.weights[i % len(setting.weights)])
        for v in range(setting.variants):
            part = setting.part(v)
            fields = (signs[v].unsqueeze(-1) >> shifts) & 1
            plane = (fields.flatten(1)[:, : setting.columns].to(setting.dtype) * 2 - 1) * 1e-3
            y[part] += linear(x[part], plane)
        return y

    return Case("base + 1 bit, unpacked by torch", call)


def _bitdelta(setting: Setting, refused: dict[str, str], fetch: bool) -> list[Case]:
    """BitDelta's public kernel as it is, fetched at run time; one mask a sample, float16."""
    name = "base + BitDelta's public kernel"
    if setting.device.type != "cuda" or not fetch or setting.columns % 64:
        refused[name] = "it needs a GPU and --bitdelta, which fetches it from its repository"
        return []
    try:
        kernel = _fetched()
    except OSError as error:
        refused[name] = f"it could not be fetched: {error}"
        return []
    words = (setting.variants, setting.columns // 32, setting.rows)
    signs = [
        torch.randint(-(2**31), 2**31, words, dtype=torch.int32, device=setting.device)
        for _ in range(setting.copies(setting.variants * setting.rows * setting.columns // 8))
    ]
    half = setting.x.to(torch.float16)
    rows = half.reshape(setting.variants, setting.each, setting.columns).contiguous()
    weights = [weight.to(torch.float16) for weight in setting.weights]

    def call(i: int) -> torch.Tensor:
        y = linear(half, weights[i % len(weights)])
        delta = kernel.binary_bmm(rows, signs[i % len(signs)])
        return y.add_(delta.reshape(y.shape), alpha=1e-3)

    return [Case(name, call, signs[0].numel() * 4)]


def _fetched() -> Any:
    path = _FETCHED / "bitdelta_kernel.py"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(_KERNEL, timeout=20) as answer:
            path.write_bytes(answer.read())
    spec = importlib.util.spec_from_file_location("bitdelta_kernel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
