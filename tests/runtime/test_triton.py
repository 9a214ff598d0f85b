"""The GPU kernels against float64, in Triton's interpreter where there is no GPU (see conftest)."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from deltafold.compress import parse_spec
from deltafold.compress.terms import Codebook, Codes, Context, Encoded, Planes
from deltafold.runtime.kernels.base import Scaled, Sum
from deltafold.runtime.kernels.forms import Target, product_form, table_form
from deltafold.runtime.kernels.reference import dense_delta
from deltafold.runtime.kernels.simple import Factors

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

from deltafold.runtime.kernels.triton.forms import BitSlices, bit_slices
from deltafold.runtime.kernels.triton.grouped import GroupedProducts
from deltafold.runtime.kernels.triton.launch import add_slices
from deltafold.runtime.kernels.triton.layout import Kind, Slice, lay, make_slice, unlay, values
from deltafold.runtime.kernels.triton.segments import TILE_TOKENS, make_segments
from deltafold.runtime.kernels.triton.sparse import (
    SparseRows,
    add_sparse,
    make_sparse_table,
    sparse_rows,
)
from deltafold.runtime.kernels.triton.table import make_table
from deltafold.runtime.kernels.triton.unpack import unpack_code

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Relative to the largest output: the rounding of what is returned (the interpreter cuts digits off),
#: and for half precision that of activations which met column scales.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltafold.runtime.kernels.forms.applies_packed", lambda device: True)


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_kind(bits: int, rows: int, columns: int, group: int = 0, half: bool = False) -> Kind:
    levels = torch.float16 if half else torch.float32
    return Kind(bits, rows, columns, group or columns, False, levels)


def random_slice(kind: Kind, seed: int) -> Slice:
    made = noise(seed)
    fields = torch.randint(0, 2**kind.bits, (kind.rows, kind.columns), generator=made)
    levels = torch.rand(kind.groups, kind.rows, generator=made) - 0.3
    by_column = torch.rand(kind.columns, generator=made).to(DEVICE) if kind.by_column else None
    return make_slice(
        fields.to(torch.uint8).to(DEVICE), kind, levels.to(DEVICE), 0.01, columns=by_column
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 1), (17, 100), (130, 513), (300, 1100)], ids=str)
@pytest.mark.parametrize("group", [0, 16, 64])
def test_words_hold_every_field(bits: int, shape: tuple[int, int], group: int) -> None:
    kind = random_kind(bits, *shape, min(group, shape[1]))
    fields = torch.randint(0, 2**bits, shape, generator=noise(0)).to(torch.uint8)
    words = lay(fields, kind)
    assert torch.equal(unlay(words, kind), fields)
    # Column t * TK + j * BW + w is field j of word w, by the definition itself.
    for n, k in [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 3)]:
        tile, rest = divmod(k, kind.tile_columns)
        j, w = divmod(rest, kind.block_words)
        word = int(words[n // kind.block_rows, tile, n % kind.block_rows, w]) & 0xFFFF
        assert word >> (bits * j) & (2**bits - 1) == int(fields[n, k])


SPECS = [
    "bitdelta:scale=tensor",
    "bitdelta:bits=3",
    "bitdelta:bits=2,group=32",
    "bitdelta:scale=column,bits=2",
    "codebook:bits=2",
    "lloyd:bits=3,scale=row",
    "int:bits=2",
    "int:bits=3,group=48",
    "int:bits=4,group=16",
    "int:bits=6",
    "int:bits=8",
    "dare:drop=0.9",
    "stratified",
    "nm:keep=1,of=8,bits=3",
    "topk:keep=0.1",
]


def encoded(spec: str, shape: tuple[int, int]) -> tuple[list[Encoded], Context, torch.Tensor]:
    base = torch.randn(shape, generator=noise(sum(shape)))
    delta = torch.randn(shape, generator=noise(1)) * 0.05
    context = Context("layer.weight", base, base + delta)
    made = parse_spec(spec).encode(delta, context)
    return made, Context("layer.weight", base), dense_delta(made, shape, context)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("spec", SPECS)
def test_product_and_rows_equal_the_reference(spec: str) -> None:
    for i, shape in enumerate([(17, 33), (48, 96), (140, 50), (5, 3)]):
        terms, context, exact = encoded(spec, shape)
        dtype = DTYPES[i % 3]
        form = product_form(terms, shape, context, Target(DEVICE, dtype))
        assert isinstance(form, BitSlices | SparseRows), form
        x = torch.randn(4, shape[1], generator=noise(2)).to(dtype).to(DEVICE)
        expected = x.cpu().to(torch.float64) @ exact.to(torch.float64).T
        found = form.matmul(x)
        assert found.dtype == dtype
        off = (found.cpu().to(torch.float64) - expected).abs().max() / expected.abs().max()
        assert off < BOUNDS[dtype], shape
        whole = form.dense(torch.float32).cpu()
        # Lists hold float16 values beside one unit, as the terms themselves do.
        assert (whole - exact).abs().max() <= 5e-4 * exact.abs().max()


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize(
    "spec", ["bitdelta:bits=2,group=32", "int:bits=3", "bitdelta:scale=column"]
)
def test_rows_of_a_table_and_rebuilt_weights(spec: str) -> None:
    shape = (37, 96)
    terms, context, exact = encoded(spec, shape)
    form = table_form(terms, shape, context, Target(DEVICE, torch.bfloat16))
    assert isinstance(form, BitSlices)
    index = torch.tensor([0, 36, 5, 5, 17])
    rows = form.gather(index.to(DEVICE)).cpu()
    assert torch.allclose(rows, exact[index], rtol=1e-6, atol=1e-9)
    assert len(form.gather(index[:0].to(DEVICE))) == 0
    base = torch.randn(shape, generator=noise(3)).to(torch.bfloat16)
    rebuilt = form.dense(torch.bfloat16, base.to(DEVICE)).cpu()
    expected = base.to(torch.float64) + exact.to(torch.float64)
    # Rounded once, from the float32 sum. The interpreter cuts off instead.
    unit = 2**-8 if DEVICE.type == "cuda" else 2**-7
    assert ((rebuilt.to(torch.float64) - expected).abs() <= expected.abs() * unit).all()


@pytest.mark.parametrize("spec", ["bitdelta:group=40", "int:bits=4,group=24", "codebook:bits=4"])
def test_terms_that_the_layout_cannot_hold_are_left_to_others(spec: str) -> None:
    ((term, parts),), _, _ = encoded(spec, (20, 96))
    assert isinstance(term, Planes | Codes | Codebook)
    assert bit_slices(term, parts, (20, 96), DEVICE) is None


def assignments(tokens: int, slots: int) -> dict[str, torch.Tensor]:
    """Which slot each token has, in patterns that schedulers make."""
    return {
        "base alone": torch.full((tokens,), -1),
        "one variant": torch.zeros(tokens, dtype=torch.int64),
        "the last variant": torch.full((tokens,), slots - 1),
        "in turn": torch.arange(tokens) % (slots + 1) - 1,
        "random": torch.randint(-1, slots, (tokens,), generator=noise(tokens)),
    }


@pytest.mark.parametrize("tokens", [1, 7, 64, 200])
@pytest.mark.parametrize("slots", [1, 3, 64])
@pytest.mark.parametrize("block", TILE_TOKENS)
def test_segments_hold_each_token_once_with_its_slot(tokens: int, slots: int, block: int) -> None:
    for name, given in assignments(tokens, slots).items():
        made = make_segments(given.to(DEVICE), slots, block)
        seen = {}
        for slot, start, length in zip(
            made.slot.tolist(), made.start.tolist(), made.length.tolist(), strict=True
        ):
            assert 0 <= length <= block, name
            for token in made.order[start : start + length].tolist():
                assert token not in seen, name
                seen[token] = slot
        assert seen == {i: s for i, s in enumerate(given.tolist()) if s >= 0}, name
        assert int(made.begin) == int((given < 0).sum()), name


@pytest.mark.parametrize("pattern", list(assignments(1, 1)))
@pytest.mark.parametrize("splits", [1, 3])
def test_each_token_gets_its_own_variants_slices(pattern: str, splits: int) -> None:
    """Variants with 0 to 2 slices each; what belongs to no variant is poison."""
    kind, slots, tokens = random_kind(4, 20, 150, half=True), 3, 9
    slices = [[(random_slice(kind, 7 * v + i), 1.0 + i) for i in range(v)] for v in range(slots)]
    dense = [
        torch.zeros(20, 150) + sum(values(piece).cpu() * w for piece, w in each) for each in slices
    ]
    given = assignments(tokens, slots)[pattern]
    x = torch.randn(tokens, 150, generator=noise(1))
    y = torch.randn(tokens, 20, generator=noise(2))
    x[given < 0], y[given < 0] = torch.nan, 7.0
    scales = torch.rand(tokens, generator=noise(3))
    expected = y.to(torch.float64)
    for i, slot in enumerate(given.tolist()):
        if slot >= 0:
            expected[i] += scales[i] * (x[i].double() @ dense[slot].double().T)
    # Rows lie within a wider tensor, whose other columns nobody may touch.
    wide = torch.full((tokens, 24), 3.25).to(DEVICE)
    wide[:, :20] = y.to(DEVICE)
    table = make_table(kind, slices, DEVICE)
    segments = make_segments(given.to(DEVICE), slots, 8, scales.to(DEVICE))
    add_slices(wide[:, :20], x.to(DEVICE), table, segments, splits)
    assert torch.allclose(wide[:, :20].cpu().double(), expected, rtol=1e-5, atol=1e-5)
    assert bool((wide[:, 20:] == 3.25).all())
    assert torch.equal(wide[:, :20].cpu()[given < 0], y[given < 0])


def test_sixty_four_variants_with_one_token_each() -> None:
    kind = random_kind(1, 16, 40)
    slices = [[(random_slice(kind, v), 1.0)] for v in range(64)]
    x = torch.randn(64, 40, generator=noise(0)).to(DEVICE)
    y = torch.zeros(64, 16, device=DEVICE)
    order = torch.randperm(64, generator=noise(1)).to(DEVICE)
    add_slices(y, x, make_table(kind, slices, DEVICE), make_segments(order, 64, 8))
    for i, slot in enumerate(order.tolist()):
        expected = values(slices[slot][0][0]).double() @ x[i].double()
        assert torch.allclose(y[i].double(), expected, rtol=1e-5, atol=1e-6)


def test_outliers_of_one_token_reach_no_other() -> None:
    kind = random_kind(1, 16, 600, group=64)
    piece = random_slice(kind, 0)
    table = make_table(kind, [[(piece, 1.0)]], DEVICE)
    x = torch.randn(5, 600, generator=noise(4)).to(DEVICE)
    segments = make_segments(torch.zeros(5, dtype=torch.int64, device=DEVICE), 1, 8)
    plain, wild = torch.zeros(5, 16, device=DEVICE), torch.zeros(5, 16, device=DEVICE)
    add_slices(plain, x, table, segments)
    x[3, 17], x[2] = 1e5, 1e30
    add_slices(wild, x, table, segments)
    others = [0, 1, 4]
    assert torch.equal(plain[others], wild[others])
    exact = values(piece).double() @ x[3].double()
    assert (wild[3].double() - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("tokens", [1, 40])
def test_sparse_rows_of_several_variants(tokens: int) -> None:
    made = [random_sparse(v) for v in range(3)]
    table = make_sparse_table([[(f, 0.5)] for f, _ in made], DEVICE)
    given = assignments(tokens, 3)["in turn"]
    x = torch.randn(tokens, 70, generator=noise(5))
    x[given < 0] = torch.nan
    y = torch.ones(tokens, 40)
    expected = y.double()
    for i, slot in enumerate(given.tolist()):
        if slot >= 0:
            expected[i] += 0.5 * (made[slot][1].double() @ x[i].double())
    out = y.to(DEVICE)
    add_sparse(out, x.to(DEVICE), table, make_segments(given.to(DEVICE), 3, 16))
    assert torch.allclose(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def random_sparse(seed: int) -> tuple[SparseRows, torch.Tensor]:
    delta = torch.randn(40, 70, generator=noise(seed))
    delta[torch.rand(40, 70, generator=noise(seed + 50)) < 0.9] = 0
    delta[seed] = 0
    form = sparse_rows(delta, DEVICE)
    assert form is not None
    # float16 values beside one unit.
    assert (form.dense(torch.float32).cpu() - delta).abs().max() <= 5e-4 * delta.abs().max()
    return form, form.dense(torch.float32).cpu()


def test_a_layer_whose_variants_come_and_go() -> None:
    """Slots change hands; what the variant before left there is never applied."""
    shape, tokens = (24, 48), 4
    layer = GroupedProducts()
    x = torch.randn(tokens, shape[1], generator=noise(0)).to(DEVICE)
    segments = make_segments(torch.tensor([0, 1, 1, -1], device=DEVICE), 4, 8)
    slices = BitSlices(
        (random_slice(random_kind(1, *shape), 1), random_slice(random_kind(4, *shape), 2))
    )
    factors = Factors(torch.randn(5, 48).to(DEVICE), torch.randn(24, 5).to(DEVICE))
    sparse = random_slice(random_kind(2, *shape), 3)
    other = BitSlices((sparse,))
    mixed = Sum([Scaled(slices, 0.5), Scaled(factors, 2.0), slices])

    def check(forms: dict[int, object]) -> None:
        y = torch.zeros(tokens, shape[0], device=DEVICE)
        layer.add(y, x, forms, segments, 4)  # type: ignore[arg-type]
        for token, slot in enumerate([0, 1, 1]):
            form = forms[slot]
            expected = torch.zeros(shape[0], device=DEVICE)
            if form is not None:
                expected = form.matmul(x[token : token + 1])[0]  # type: ignore[attr-defined]
            assert torch.allclose(y[token], expected, rtol=1e-4, atol=1e-4), (token, form)
        assert not y[3].any()

    check({0: slices, 1: mixed})
    check({0: None, 1: mixed})
    check({0: factors, 1: slices})
    check({0: other, 1: None})
    del other
    gc.collect()
    # The dropped variant's memory is gone; its slot is used by one that leaves this layer alone.
    check({0: None, 1: factors})


@pytest.mark.parametrize("bfloat", [True, False], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_assembly_unpacks_every_word(bits: int, bfloat: bool) -> None:
    """Each of its five instructions, done by numpy on all words: only a GPU runs the real ones."""
    low = np.arange(2**16, dtype=np.uint32)
    pairs = low | (np.roll(low, 12345) << np.uint32(16))
    for field in range(16 // bits):
        out = run_ptx(unpack_code(bits, field, bfloat), pairs, bfloat)
        for half, words in ((out & 0xFFFF, pairs & 0xFFFF), (out >> 16, pairs >> 16)):
            q = (words >> (bits * field) & (2**bits - 1)).astype(np.float32)
            expected = 2 * q - 1 if bits == 1 else q - 2 ** (bits - 1)
            assert np.array_equal(from_half(half, bfloat), expected), (bits, field)


def from_half(bits: np.ndarray, bfloat: bool) -> np.ndarray:
    if bfloat:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def to_half(values_: np.ndarray, bfloat: bool) -> np.ndarray:
    """Only for numbers that the type holds exactly."""
    if bfloat:
        raw = values_.astype(np.float32).view(np.uint32)
        assert not (raw & 0xFFFF).any()
        return raw >> np.uint32(16)
    assert np.array_equal(values_.astype(np.float16).astype(np.float32), values_)
    return values_.astype(np.float16).view(np.uint16).astype(np.uint32)


def run_ptx(code: str, word: np.ndarray, bfloat: bool) -> np.ndarray:
    names: dict[str, np.ndarray] = {"$1": word}

    def value(name: str) -> np.ndarray:
        return names[name] if name in names else np.uint32(int(name, 0))

    for line in code.strip("{} ").split(";"):
        op, _, rest = line.strip().partition(" ")
        if not op or op == ".reg":
            continue
        to, *given = [part.strip() for part in rest.split(",")]
        a = value(given[0])
        names[to] = PTX[op](a, [value(g) for g in given[1:]], bfloat)
    return names["$0"]


def _lop3(a: np.ndarray, rest: list[np.ndarray], bfloat: bool) -> np.ndarray:
    b, c, table = rest
    out = np.zeros_like(a)
    for i in range(8):
        if int(table) >> i & 1:
            terms = [v if i >> s & 1 else ~v for v, s in ((a, 2), (b, 1), (c, 0))]
            out |= terms[0] & terms[1] & terms[2]
    return out


def _fma(a: np.ndarray, rest: list[np.ndarray], bfloat: bool) -> np.ndarray:
    halves = []
    for shift in (0, 16):
        x, m, c = (from_half(v >> np.uint32(shift) & np.uint32(0xFFFF), bfloat) for v in (a, *rest))
        halves.append(to_half(x * m + c, bfloat))
    return halves[0] | halves[1] << np.uint32(16)


PTX: dict[str, Callable[[np.ndarray, list[np.ndarray], bool], np.ndarray]] = {
    "mov.b32": lambda a, rest, bfloat: a,
    "shl.b32": lambda a, rest, bfloat: a << rest[0],
    "shr.u32": lambda a, rest, bfloat: a >> rest[0],
    "lop3.b32": _lop3,
    "fma.rn.bf16x2": _fma,
    "fma.rn.f16x2": _fma,
}


@pytest.mark.parametrize(("target", "which"), [("80", "apply 1"), ("90", "")])
def test_kernels_compile_for_gpus_that_are_not_here(
    target: str, which: str, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("triton_compile.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    call = [sys.executable, str(script), target, which]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= (3 if which else 12)
    for row in rows:
        print(row)
        # What does not fit the registers would lie on the stack.
        assert row["stack"] == 0, row
        assert row["shared"] <= 160 * 1024, row
        if row["kernel"].startswith("apply 1 bit, 8 tokens") and row["kernel"].endswith("bf16"):
            # 14 of 16 fields take one multiply-add a pair of weights, and nothing is converted.
            counts = row["instructions"]
            assert counts["HFMA2"] == 14 * 16, row
            assert counts.get("HMMA", 0) + counts.get("HGMMA", 0) >= 64, row
            assert row["loop_a_weight"] < 1.7, row
            assert not {"I2F", "I2FP"} & set(counts), row


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_graph_serves_other_assignments(dtype: torch.dtype) -> None:
    """Nothing waits for the device, so one graph is replayed for every batch of its size."""
    kind = random_kind(1, 256, 1024)
    slices = [[(random_slice(kind, v), 1.0)] for v in range(5)]
    table = make_table(kind, slices, DEVICE)
    dense = torch.stack([values(piece) for ((piece, _),) in slices])
    x = torch.randn(16, 1024, device=DEVICE).to(dtype)
    y = torch.zeros(16, 256, dtype=dtype, device=DEVICE)
    slots = torch.zeros(16, dtype=torch.int64, device=DEVICE)

    def step() -> None:
        y.zero_()
        add_slices(y, x, table, make_segments(slots, 5, 8), splits=2)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for given in assignments(16, 5).values():
        slots.copy_(given)
        graph.replay()
        for i, slot in enumerate(given.tolist()):
            expected = dense[slot].double() @ x[i].double() if slot >= 0 else torch.zeros(256)
            off = (y[i].double() - expected.to(DEVICE)).abs().max()
            assert off <= BOUNDS[dtype] * (1e-30 + float(expected.abs().max()))
