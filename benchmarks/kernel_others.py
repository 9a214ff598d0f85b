"""The cases of `kernels.py` that are not ours: other ways to serve many variants of one layer.

What a machine lacks is left out with a reason. Public kernels are fetched or installed by whoever runs
the benchmark, and are used as they are.
"""

from __future__ import annotations

import importlib.util
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from kernel_setting import MOST_SWAPPED, Case, Refused, Setting, linear
from timing import Call, why_not

_KERNEL = (
    "https://raw.githubusercontent.com/FasterDecoding/BitDelta/"
    "386d2835f67025570d9f2c838ac0ce029ec35f51/bitdelta/binary_gemm_kernel.py"
)
_FETCHED = Path(__file__).parent / "results" / "fetched"


def other_cases(setting: Setting, fetch: bool) -> tuple[list[Case], Refused]:
    """The cases, and why others are left out."""
    refused: Refused = {}
    cases: list[Case] = []
    groups: dict[str, Callable[[], list[Case]]] = {"dense copies": lambda: _dense(setting, refused)}
    if setting.variants <= MOST_SWAPPED:
        groups["merged weights, swapped"] = lambda: _swap(setting)
    if setting.packed:
        groups["base + 1 bit, unpacked by torch"] = lambda: [_torch_unpack(setting)]
    for name, made in groups.items():
        try:
            cases += made()
        except Exception as error:  # memory, most of all
            refused[name] = why_not(error)
    for name, make in (
        ("base + BitDelta's public kernel", lambda: _bitdelta(setting, fetch)),
        ("base + 1 bit, gemlite, a call each", lambda: _gemlite(setting)),
        ("base + rank 16, vLLM's LoRA kernels", lambda: _vllm_lora(setting, 16)),
        ("base + rank 64, vLLM's LoRA kernels", lambda: _vllm_lora(setting, 64)),
    ):
        try:
            call, size = make()
        except Exception as error:  # whatever another package may raise
            refused[name] = why_not(error)
        else:
            cases.append(Case(name, call, size))
    return cases, refused


def _dense(setting: Setting, refused: Refused) -> list[Case]:
    """A weight a variant: what serving merged checkpoints costs if all of them fit."""
    size = setting.variants * setting.dense_bytes
    names = ["dense copies, a product each", "dense copies, torch.bmm", "dense copies, grouped mm"]
    if setting.device.type == "cuda" and size > 0.4 * torch.cuda.mem_get_info()[0]:
        refused |= dict.fromkeys(names, f"some layers need {size / 2**30:.0f} GiB or more")
        return []
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

    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    def grouped(i: int) -> torch.Tensor:
        return product(x, stacks[i % len(stacks)].transpose(1, 2), offs=ends)

    cases = [Case(names[0], loop), Case(names[1], bmm)]
    if setting.device.type == "cuda":
        cases.append(Case(names[2], grouped))
    return cases


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


def _torch_unpack(setting: Setting) -> Case:
    """Signs unpacked by torch's own operations in every step."""
    width = -(-setting.columns // 8)
    # One plane is read by all variants: what is measured is the arithmetic, which is far slower.
    shape = (setting.rows, width)
    signs = torch.randint(0, 256, shape, dtype=torch.uint8, device=setting.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=setting.device)
    x = setting.x

    def call(i: int) -> torch.Tensor:
        y = setting.base(i)
        for v in range(setting.variants):
            part = setting.part(v)
            fields = (signs.unsqueeze(-1) >> shifts) & 1
            plane = (fields.flatten(1)[:, : setting.columns].to(setting.dtype) * 2 - 1) * 1e-3
            y[part] += linear(x[part], plane)
        return y

    return Case("base + 1 bit, unpacked by torch", call)


def _bitdelta(setting: Setting, fetch: bool) -> tuple[Call, int]:
    """BitDelta's public kernel as it is; one mask a sample, float16."""
    path = _FETCHED / "bitdelta_kernel.py"
    if setting.device.type != "cuda" or not (fetch or path.exists()):
        raise RuntimeError("it needs a GPU and --bitdelta, which fetches it from its repository")
    if setting.columns % 64:
        raise RuntimeError("its last block of columns is read unmasked")
    kernel = _fetched(path)
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

    return call, signs[0].numel() * 4


@cache
def _download(path: Path) -> str:
    """Why a file could not be had, or nothing; tried once, since packets that vanish take long."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(_KERNEL, timeout=20) as answer:
            content = answer.read()
        # Whole or not at all.
        half = path.with_suffix(".part")
        half.write_bytes(content)
        half.replace(path)
    except OSError as error:
        return f"its download failed: {error}"
    return ""


def _fetched(path: Path) -> Any:
    failed = "" if path.exists() else _download(path)
    if failed:
        raise RuntimeError(failed)
    spec = importlib.util.spec_from_file_location("bitdelta_kernel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _gemlite(setting: Setting) -> tuple[Call, int]:
    """gemlite's products with 1-bit weights, one variant at a time."""
    if setting.device.type != "cuda" or importlib.util.find_spec("gemlite") is None:
        raise RuntimeError("it needs a GPU and the package gemlite")
    from gemlite.helper import A16Wn

    # One plane for all variants: the calls, not the memory, are what this way pays for.
    shape = (setting.rows, setting.columns)
    codes = torch.randint(0, 2, shape, dtype=torch.uint8, device=setting.device)
    scales = torch.full((setting.rows, 1), 2e-3, dtype=torch.float16, device=setting.device)
    zeros = torch.full_like(scales, 0.5)
    maker = A16Wn(device=str(setting.device))
    layer = maker.from_weights(codes, scales, zeros, 1, setting.columns)
    half = setting.x.to(torch.float16)
    weights = [weight.to(torch.float16) for weight in setting.weights]

    def call(i: int) -> torch.Tensor:
        y = linear(half, weights[i % len(weights)])
        for v in range(setting.variants):
            y[setting.part(v)] += layer(half[setting.part(v)])
        return y

    call(0)
    return call, setting.variants * setting.rows * setting.columns // 8


def _vllm_lora(setting: Setting, rank: int) -> tuple[Call, int]:
    """vLLM's own kernels for a mixed batch of adapters, with its own preparation done before."""
    if setting.device.type != "cuda" or importlib.util.find_spec("vllm") is None:
        raise RuntimeError("it needs a GPU and the package vllm")
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    kind: dict[str, Any] = {"device": setting.device, "dtype": setting.dtype}
    count, tokens, slices = setting.variants, setting.tokens, len(setting.widths)
    down = [torch.randn(count, 1, rank, setting.columns, **kind) * 0.02 for _ in range(slices)]
    up = [torch.randn(count, 1, rows, rank, **kind) * 0.02 for rows in setting.widths]
    meta = LoRAKernelMeta.make(count, tokens, setting.device)
    slots = torch.arange(count, device=setting.device, dtype=torch.int32)
    meta.prepare_tensors(slots.repeat_interleave(setting.each))
    given = meta.meta_args(tokens, False)

    def call(i: int) -> torch.Tensor:
        y = setting.base(i)
        inner = torch.empty(slices, tokens, rank, dtype=torch.float32, device=setting.device)
        lora_shrink(setting.x, down, inner, *given, 1.0)
        lora_expand(inner, up, y, *given, offset_start=0, add_inputs=True)
        return y

    call(0)
    return call, sum(t.numel() * t.element_size() for t in (*down, *up))
