"""The cases of `kernels.py` that are ours: packed deltas applied, looked up, and rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from kernel_setting import MOST_SWAPPED, Case, Parts, Refused, Setting, linear
from timing import Call, why_not

from deltafold.compress import parse_spec
from deltafold.compress.terms import Context
from deltafold.runtime.kernels.base import DeltaMatrix
from deltafold.runtime.kernels.forms import Target, product_form
from deltafold.runtime.kernels.simple import Factors

#: Makes a form of so many rows.
Make = Callable[[int], DeltaMatrix]
CONTEXT = Context("layer.weight")


def our_cases(setting: Setting, forms: Sequence[str]) -> tuple[list[Case], Refused]:
    """Base and deltas by form, the mixed path without a variant, lookups, and rebuilt weights; and why
    others are left out.
    """
    cases: list[Case] = []
    refused: Refused = {}
    for name in forms:
        try:
            cases += _of_form(setting, name)
        except Exception as error:  # memory, most of all
            refused[f"base + {name}"] = why_not(error)
    return cases, refused


def _of_form(setting: Setting, name: str) -> list[Case]:
    sets = setting.sets(FORMS[name](setting))
    cases = [_added(setting, name, sets)]
    if setting.packed and name == "1 bit":
        cases += [*_all_base(setting, sets), *_rows(setting, sets)]
    if setting.packed and name in ("1 bit", "4 bits"):
        cases += _rebuilt(setting, name, sets)
        cases += _merged(setting, name, sets)
    if name.startswith("rank"):
        cases.append(_factor_loop(setting, name, sets))
    return cases


def _sliced(*kinds: tuple[int, int]) -> Callable[[Setting], Make]:
    """Random slices of (bits, columns of a group, or 0) on a GPU: only their size matters to time."""

    def of(setting: Setting) -> Make:
        def one(rows: int) -> DeltaMatrix:
            from deltafold.runtime.kernels.triton.forms import BitSlices
            from deltafold.runtime.kernels.triton.layout import Kind, Slice, pad_levels

            slices, device = [], setting.device
            for bits, group in kinds:
                width = min(group or setting.columns, setting.columns)
                kind = Kind(bits, rows, setting.columns, width, False, torch.float16)
                shape = (kind.row_blocks, kind.column_tiles, kind.block_rows, kind.block_words)
                words = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=device)
                levels = torch.rand(kind.groups, rows, device=device) + 0.5
                slices.append(Slice(kind, words, pad_levels(levels, kind), 1e-3))
            return BitSlices(tuple(slices))

        return one

    return of


def _sparse(drop: float) -> Callable[[Setting], Make]:
    def of(setting: Setting) -> Make:
        def one(rows: int) -> DeltaMatrix:
            from deltafold.runtime.kernels.triton.sparse import sparse_rows

            shape = (rows, setting.columns)
            delta = torch.randn(shape, device=setting.device) * 1e-3
            delta *= torch.rand(shape, device=setting.device) >= drop
            form = sparse_rows(delta, setting.device)
            assert form is not None
            return form

        return one

    return of


def _low_rank(rank: int) -> Callable[[Setting], Make]:
    def of(setting: Setting) -> Make:
        kind: dict[str, Any] = {"device": setting.device, "dtype": setting.dtype}

        def one(rows: int) -> DeltaMatrix:
            a = torch.randn(rank, setting.columns, **kind) * 0.02
            return Factors(a, torch.randn(rows, rank, **kind) * 0.02)

        return one

    return of


def _coded(spec: str) -> Callable[[Setting], Make]:
    """A codec's own form: of the CPU, and of layouts that only codecs make."""

    def of(setting: Setting) -> Make:
        def one(rows: int) -> DeltaMatrix:
            shape = (rows, setting.columns)
            encoded = _encoded(spec, shape)
            if setting.packed and spec == "stratified":
                return _own_memory(_strata(encoded, shape, setting.device))
            return product_form(encoded, shape, CONTEXT, Target(setting.device, setting.dtype))

        return one

    return of


@cache
def _encoded(spec: str, shape: tuple[int, int]) -> Any:
    return parse_spec(spec).encode(torch.randn(shape) * 1e-3, CONTEXT)


#: What `_strata` laid out, by shape: it takes longer than all that is measured.
_LAID: dict[tuple[int, int], Any] = {}


def _strata(encoded: Any, shape: tuple[int, int], device: torch.device) -> Any:
    from deltafold.runtime.kernels.triton.sparse import strata

    if shape not in _LAID:
        ((term, parts),) = encoded
        _LAID[shape] = strata(term, parts, shape, device, "layer")
        assert _LAID[shape] is not None
    return _LAID[shape]


def _own_memory(form: Any) -> DeltaMatrix:
    """The same numbers in other places of the memory."""
    names = ("places", "starts", "levels")
    copy: DeltaMatrix = replace(form, **{name: getattr(form, name).clone() for name in names})
    return copy


def _either(gpu: Callable[[Setting], Make], spec: str) -> Callable[[Setting], Make]:
    return lambda setting: (gpu if setting.packed else _coded(spec))(setting)


FORMS: dict[str, Callable[[Setting], Make]] = {
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


def _added(setting: Setting, name: str, sets: Sequence[Sequence[Parts]]) -> Case:
    """The base's product and all variants' deltas added to it."""
    held = sum(form.nbytes for parts in sets[0] for form in parts)
    call = _together(setting, sets) if setting.packed else _one_by_one(setting, sets)

    return Case(f"base + {name}", call, held, partial(_off, setting, sets, call))


def _off(setting: Setting, sets: Sequence[Sequence[Parts]], call: Call) -> float:
    """The largest error of the last variant's rows against float64, relative to the largest output."""
    rows = setting.part(setting.variants - 1)
    dense = torch.cat([_dense_of(form, setting) for form in sets[0][-1]])
    with torch.inference_mode():
        found = call(0)[rows].double()
    expected = setting.x[rows].double() @ (setting.weights[0].double() + dense).T
    return float((found - expected).abs().max() / expected.abs().max())


def _dense_of(form: Any, setting: Setting) -> torch.Tensor:
    if isinstance(form, Factors):
        return form.b.double() @ form.a.double()
    if setting.packed and hasattr(form, "dense"):
        dense: torch.Tensor = form.dense(torch.float32)
        return dense.double()
    eye = torch.eye(setting.columns, device=setting.device)
    return torch.cat([form.matmul(some).T for some in eye.split(8)], dim=1).double()


def _one_by_one(setting: Setting, sets: Sequence[Sequence[Parts]]) -> Call:
    def call(i: int) -> torch.Tensor:
        y = setting.base(i)
        for v, parts in enumerate(sets[i % len(sets)]):
            rows = setting.part(v)
            for out, form in zip(setting.outputs(y), parts, strict=True):
                out[rows] += form.matmul(setting.x[rows])
        return y

    return call


def _together(
    setting: Setting, sets: Sequence[Sequence[Parts]], slots: torch.Tensor | None = None
) -> Call:
    """What the engine does: one launch a layer, or rebuilt matrices where variants have many tokens."""
    from deltafold.runtime.kernels.triton.grouped import GroupedProducts
    from deltafold.runtime.kernels.triton.segments import block_for, make_segments

    if not _goes_together(setting, sets):
        return _one_by_one(setting, sets)
    layers = [GroupedProducts(len(setting.widths)) for _ in sets]
    if slots is None:
        slots = torch.arange(setting.variants, device=setting.device)
        slots = slots.repeat_interleave(setting.each)
    segments = make_segments(slots, setting.variants, block_for(setting.each))

    def call(i: int) -> torch.Tensor:
        y = setting.base(i)
        which = i % len(sets)
        by_slot = dict(enumerate(sets[which]))
        layers[which].add(setting.outputs(y), setting.x, by_slot, segments, setting.variants)
        return y

    return call


def _goes_together(setting: Setting, sets: Sequence[Sequence[Parts]]) -> bool:
    from deltafold.runtime.kernels.triton.grouped import groupable

    first = zip(sets[0][0], setting.widths, strict=True)
    return all(groupable(form, rows, setting.dtype, setting.each) for form, rows in first)


def _all_base(setting: Setting, sets: Sequence[Sequence[Parts]]) -> list[Case]:
    """A batch of the base alone that goes the way of mixed batches, as a captured graph must."""
    if not _goes_together(setting, sets):
        return []
    slots = torch.full((setting.tokens,), -1, device=setting.device)
    call = _together(setting, sets, slots)

    def error() -> float:
        with torch.inference_mode():
            return float((call(0) != setting.base(0)).sum())

    return [Case("base rows alone, through the mixed path", call, 0, error)]


def _rows(setting: Setting, sets: Sequence[Sequence[Parts]]) -> list[Case]:
    """Rows of the weight taken as a table, as an embedding does it: its own, and with the deltas'."""
    from deltafold.runtime.kernels.triton.grouped import GroupedRows
    from deltafold.runtime.kernels.triton.segments import block_for, make_segments

    if len(setting.widths) > 1:
        return []
    ids = torch.randint(0, setting.rows, (setting.tokens,), device=setting.device)
    slots = torch.arange(setting.variants, device=setting.device).repeat_interleave(setting.each)
    segments = make_segments(slots, setting.variants, block_for(setting.each))
    tables = [GroupedRows() for _ in sets]

    def plain(i: int) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, setting.weights[i % len(setting.weights)])

    def looked_up(i: int) -> torch.Tensor:
        y, which = plain(i), i % len(sets)
        forms = {slot: parts[0] for slot, parts in enumerate(sets[which])}
        tables[which].add(y, ids, forms, segments, setting.variants)
        return y

    def error() -> float:
        rows = setting.part(setting.variants - 1)
        delta = _dense_of(sets[0][-1][0], setting)[ids[rows]]
        with torch.inference_mode():
            found = looked_up(0)[rows].double()
        expected = setting.weights[0][ids[rows]].double() + delta
        return float((found - expected).abs().max() / expected.abs().max())

    read = 3 * setting.tokens * setting.columns * setting.dtype.itemsize
    return [
        Case("rows looked up, base", plain, moved_bytes=read),
        Case("rows looked up, base + 1 bit", looked_up, 0, error, moved_bytes=read),
    ]


def _rebuilt(setting: Setting, name: str, sets: Sequence[Sequence[Parts]]) -> list[Case]:
    """A dense weight from base and delta: alone, for every variant and step, and from host memory."""
    from deltafold.runtime.kernels.triton.forms import BitSlices

    forms = [parts for parts in sets[0] if all(isinstance(form, BitSlices) for form in parts)]
    assert forms, "these forms are slices"
    first: Any = forms[0]
    words = [piece.words for form in first for piece in form.slices]
    hosts = [w.to("cpu") for w in words]
    if setting.device.type == "cuda":
        hosts = [host.pin_memory() for host in hosts]

    def product(x: torch.Tensor, parts: Any, base: torch.Tensor) -> torch.Tensor:
        each = [
            linear(x, form.dense(setting.dtype, b))
            for form, b in zip(parts, base.split(setting.widths), strict=True)
        ]
        return each[0] if len(each) == 1 else torch.cat(each, 1)

    def alone(i: int) -> torch.Tensor:
        base = setting.weights[i % len(setting.weights)]
        for form, part in zip(sets[i % len(sets)][0], base.split(setting.widths), strict=True):
            found: torch.Tensor = form.dense(setting.dtype, part)  # type: ignore[attr-defined]
        return found

    def every_step(copied: bool) -> Call:
        def call(i: int) -> torch.Tensor:
            base, parts = setting.weights[i % len(setting.weights)], []
            for v in range(setting.variants):
                if copied:
                    for there, host in zip(words, hosts, strict=True):
                        there.copy_(host, non_blocking=True)
                own = first if copied else forms[v]
                parts.append(product(setting.x[setting.part(v)], own, base))
            return torch.cat(parts)

        return call

    moved = 2 * setting.dense_bytes + sum(form.nbytes for form in first)
    cases = [
        Case(f"one weight rebuilt, {name}", alone, moved_bytes=moved),
        Case(f"rebuilt every step, {name}", every_step(False)),
    ]
    if setting.variants <= MOST_SWAPPED:
        cases.append(Case(f"copied from host and rebuilt, {name}", every_step(True)))
    return cases


def _merged(setting: Setting, name: str, sets: Sequence[Sequence[Parts]]) -> list[Case]:
    """Prompts: one product by base and delta added up in registers, without the base's own."""
    from deltafold.runtime.kernels.triton.forms import BitSlices
    from deltafold.runtime.kernels.triton.merge import MergedProducts
    from deltafold.runtime.kernels.triton.segments import MERGED_TOKENS, make_segments

    if setting.each < MERGED_TOKENS // 2:
        return []
    layers = [[MergedProducts() for _ in setting.widths] for _ in sets]
    slots = torch.arange(setting.variants, device=setting.device).repeat_interleave(setting.each)
    tiles = setting.variants * -(-setting.each // MERGED_TOKENS)
    segments = make_segments(slots, setting.variants, MERGED_TOKENS, tiles=tiles)

    def call(i: int) -> torch.Tensor:
        base, which, found = setting.weights[i % len(setting.weights)], i % len(sets), []
        for part, weight in enumerate(base.split(setting.widths)):
            forms: dict[int, BitSlices] = {}
            for v, parts in enumerate(sets[which]):
                form = parts[part]
                assert isinstance(form, BitSlices)
                forms[v] = form
            made = layers[which][part]
            found.append(made.product(setting.x, weight, forms, segments, setting.variants))
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    held = sum(form.nbytes for parts in sets[0] for form in parts)
    error = partial(_off, setting, sets, call)
    return [Case(f"base + {name}, added up in registers", call, held, error)]


def _factor_loop(setting: Setting, name: str, sets: Sequence[Sequence[Parts]]) -> Case:
    """Two thin products a variant: how PEFT applies adapters of a mixed batch."""
    return Case(f"base + {name}, two torch products each", _one_by_one(setting, sets))
