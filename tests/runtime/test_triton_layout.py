"""The layout of packed weights, and each form of it by itself, against float64."""

from __future__ import annotations

import sys

import pytest
import torch

from deltafold.compress import parse_spec
from deltafold.compress.terms import Codebook, Codes, Context, Encoded, Planes
from deltafold.compress.terms.blocks import block_context, join
from deltafold.runtime.kernels.forms import Target, product_form, table_form
from deltafold.runtime.kernels.reference import dense_delta

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

from slices import BOUNDS, DEVICE, DTYPES, noise, random_kind

from deltafold.runtime.kernels.triton.forms import BitSlices, bit_slices
from deltafold.runtime.kernels.triton.layout import lay, unlay
from deltafold.runtime.kernels.triton.sparse import SparseRows


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltafold.runtime.kernels.forms.applies_packed", lambda device: True)


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


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["stratified", "nm:keep=1,of=8,bits=3", "topk:keep=0.28"])
def test_sparse_rows_are_added_to_a_base(spec: str, dtype: torch.dtype) -> None:
    """A row that holds nothing, rows of one column each, lists longer than a step, and a base in a
    wider tensor.
    """
    for shape in [(37, 300), (70, 1), (33, 45)]:
        delta = torch.randn(shape, generator=noise(1)) * 0.05
        delta[3] = 0
        base = torch.randn(shape, generator=noise(2)).to(dtype)
        context = Context("layer.weight", base.float(), base.float() + delta)
        terms = parse_spec(spec).encode(delta, context)
        form = product_form(terms, shape, context, Target(DEVICE, dtype))
        if not isinstance(form, SparseRows):
            assert shape[1] == 1
            continue
        exact = base.double() + dense_delta(terms, shape, context).double()
        wide = torch.nn.functional.pad(base, (2, 5)).to(DEVICE)
        found = form.dense(dtype, wide[:, 2:-5]).cpu().double()
        # float16 values in the lists, and one rounding, which the interpreter does by cutting off.
        assert (found - exact).abs().max() <= 2 * BOUNDS[dtype] * exact.abs().max() + 5e-5
        assert torch.equal(found[3], base[3].double())


@pytest.mark.parametrize("spec", ["bitdelta:group=40", "int:bits=4,group=24", "codebook:bits=4"])
def test_terms_that_the_layout_cannot_hold_are_left_to_others(spec: str) -> None:
    ((term, parts),), _, _ = encoded(spec, (20, 96))
    assert isinstance(term, Planes | Codes | Codebook)
    assert bit_slices(term, parts, (20, 96), DEVICE) is None


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize(
    ("spec", "form"),
    [
        ("bitdelta", BitSlices),
        ("bitdelta:bits=2,group=32", BitSlices),
        ("int:bits=3,group=32", BitSlices),
        ("dare:drop=0.9", SparseRows),
        ("stratified", SparseRows),
    ],
)
def test_blocks_of_rows_are_one_matrix_to_the_kernels(spec: str, form: type) -> None:
    """Tensors of more than 2^24 entries are coded in blocks; pieces could not share a launch."""
    shape, rows = (100, 96), 33
    base, delta = torch.zeros(shape), torch.randn(shape, generator=noise(1)) * 0.05
    delta[rows:] *= 30
    context = Context("w", base, base + delta)
    pieces = []
    for number, start in enumerate(range(0, shape[0], rows)):
        block = block_context(context, start, rows, number)
        (piece,) = parse_spec(spec).encode(delta[start : start + rows], block)
        pieces.append(piece)
    made = [join(rows, pieces)]
    exact = dense_delta(made, shape, context)
    target = Target(DEVICE, torch.float32)
    found = product_form(made, shape, context, target)
    assert type(found) is form
    x = torch.randn(5, shape[1], generator=noise(2))
    off = found.matmul(x.to(DEVICE)).cpu().double() - x.double() @ exact.double().T
    # Lists hold float16.
    assert (
        off.norm()
        <= (1e-3 if form is SparseRows else 1e-6) * (x.double() @ exact.double().T).norm()
    )
    if form is BitSlices:
        table = table_form(made, shape, context, target)
        assert type(table) is form
        assert torch.allclose(
            table.gather(torch.tensor([99, 0, 40], device=DEVICE)).cpu(), exact[[99, 0, 40]]
        )
