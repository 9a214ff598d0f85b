"""Every run-time form against the contract: x @ D^T in float64, and rows of D."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltafold.compress import parse_spec
from deltafold.compress.terms import Banded, Codes, Columns, Context, Encoded, Rows, Shared
from deltafold.compress.terms import Dense as CodedDense
from deltafold.runtime.kernels import shared
from deltafold.runtime.kernels.base import Sum
from deltafold.runtime.kernels.cpu import Int4
from deltafold.runtime.kernels.forms import Target, product_form, table_form
from deltafold.runtime.kernels.native import signs_library
from deltafold.runtime.kernels.reference import Dense, dense_delta
from deltafold.runtime.kernels.signs import ColumnScaled, SignWords
from deltafold.runtime.kernels.simple import Csr, Factors
from deltafold.runtime.kernels.tables import PackedTable

CPU = torch.device("cpu")
SPECS = [
    "bitdelta:scale=tensor",
    "bitdelta",
    "bitdelta:bits=2",
    "bitdelta:bits=4,group=32",
    "bitdelta:bits=3,group=128",
    "bitdelta:bits=6",
    "bitdelta:scale=column",
    "bitdelta:bits=3,scale=column",
    "codebook:bits=1",
    "codebook:bits=2,scale=row",
    "lloyd:bits=3",
    "codebook:bits=4",
    "d-qrelo",
    "impart:ratio=4",
    "dct",
    "nm",
    "nm:keep=1,of=5,bits=16",
    "quantize-and-drop",
    "stratified",
    "topk:keep=0.2,bits=8",
    "int:bits=2",
    "int:bits=3",
    "int:bits=6,group=32",
    "int:bits=4,group=64",
    "int:bits=8",
    "int:bits=8,group=32",
    "dare:drop=0.5",
    "dare:drop=0.95",
    "svd:rank=5",
    "exact",
    "lossless",
]
SHAPES = [(64, 256), (48, 96), (17, 32), (33, 100), (1, 7), (130, 640), (520, 512)]


def encoded(spec: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Encoded], Context]:
    noise = torch.Generator().manual_seed(sum(shape))
    base = torch.randn(shape, generator=noise).to(dtype)
    variant = (base + torch.randn(shape, generator=noise) * 0.05).to(dtype)
    delta = variant.to(torch.float32) - base.to(torch.float32)
    made = parse_spec(spec).encode(delta, Context("layer.weight", base, variant))
    return made, Context("layer.weight", base)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)], ids=["f32", "bf16"]
)
def test_product_equals_reference(
    spec: str, shape: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    terms, context = encoded(spec, shape, dtype)
    form = product_form(terms, shape, context, Target(CPU, dtype))
    exact = dense_delta(terms, shape, context).to(torch.float64)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    got, expected = form.matmul(x), x.to(torch.float64) @ exact.T
    assert got.dtype == dtype
    assert got.shape == expected.shape
    scale = expected.norm() + 1e-30
    assert (got.to(torch.float64) - expected).norm() / scale < bound
    assert form.nbytes > 0


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_rows_equal_reference(spec: str, dtype: torch.dtype) -> None:
    shape = (37, 96)
    terms, context = encoded(spec, shape, dtype)
    form = table_form(terms, shape, context, Target(CPU, dtype))
    index = torch.tensor([0, 36, 5, 5, 17])
    expected = dense_delta(terms, shape, context)[index]
    got = form.gather(index).to(torch.float32)
    bound = 1e-6 if dtype == torch.float32 else 8e-3
    assert (got - expected).abs().max() <= bound * max(expected.abs().max().item(), 1.0)


PACKED = [
    "int:bits=3",
    "int:bits=5,group=128",
    "bitdelta",
    "bitdelta:bits=3,group=128",
    "int:bits=4",
    "int:bits=8,group=64",
    "int:bits=2",
]


@pytest.mark.skipif(signs_library() is None, reason="needs AVX2 and a C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("spec", PACKED)
def test_planes_and_codes_use_our_kernel(spec: str, dtype: torch.dtype) -> None:
    terms, context = encoded(spec, (64, 256), dtype)
    form = product_form(terms, (64, 256), context, Target(CPU, dtype))
    assert isinstance(form, SignWords)
    assert form.nbytes < 64 * 256 * 4


@pytest.mark.parametrize("spec", PACKED)
@pytest.mark.parametrize("shape", [(64, 256), (33, 128), (48, 100)], ids=str)
def test_without_a_compiler_torch_does_the_products(
    spec: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltafold.runtime.kernels.signs.signs_library", lambda: None)
    dtype = torch.bfloat16
    terms, context = encoded(spec, shape, dtype)
    form = product_form(terms, shape, context, Target(CPU, dtype))
    assert isinstance(form, Int4 | Sum if shape[1] % 128 == 0 else Dense)
    exact = dense_delta(terms, shape, context).to(torch.float64)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.to(torch.float64) @ exact.T
    assert (form.matmul(x).to(torch.float64) - expected).norm() / expected.norm() < 6e-3


@pytest.mark.skipif(signs_library() is None, reason="needs AVX2 and a C compiler")
@pytest.mark.parametrize(
    ("spec", "form", "share"),
    [
        ("bitdelta:scale=column", ColumnScaled, 0.06),
        ("codebook:bits=2", SignWords, 0.09),
        ("lloyd:bits=3,scale=row", SignWords, 0.16),
        ("codebook:bits=4", Dense, 1.0),
        ("impart:ratio=16", Factors, 0.7),
        ("stratified", Csr, 0.2),
        ("nm", Dense, 1.0),
        ("topk:keep=0.05", Csr, 0.2),
    ],
)
def test_new_terms_take_their_form(spec: str, form: type, share: float) -> None:
    shape = (512, 640)
    terms, context = encoded(spec, shape, torch.float32)
    made = product_form(terms, shape, context, Target(CPU, torch.float32))
    assert isinstance(made, form)
    assert made.nbytes <= share * 4 * 512 * 640


@pytest.mark.parametrize("spec", ["bitdelta:scale=column", "codebook:bits=2", "nm:keep=1,of=16"])
def test_tables_stay_packed(spec: str) -> None:
    terms, context = encoded(spec, (64, 96), torch.float32)
    assert isinstance(table_form(terms, (64, 96), context, Target(CPU, torch.float32)), PackedTable)


def test_column_scales_and_tables_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltafold.runtime.kernels.signs.signs_library", lambda: None)
    for spec in ("bitdelta:scale=column,bits=2", "codebook"):
        terms, context = encoded(spec, (48, 96), torch.float32)
        form = product_form(terms, (48, 96), context, Target(CPU, torch.float32))
        assert isinstance(form, Dense)
        assert torch.equal(form.weight, dense_delta(terms, (48, 96), context))


def test_factors_that_are_larger_than_the_matrix_become_it() -> None:
    delta = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    context = Context("layer.weight")
    for rank, form in ((4, Factors), (16, Dense)):
        made = Banded(ranks=(rank,), widths=(8,)).encode(delta, context)
        found = product_form([made], (24, 32), context, Target(CPU, torch.float32))
        assert isinstance(found, form)
        dense = dense_delta([made], (24, 32), context)
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(found.matmul(x), x @ dense.T, atol=1e-4)


@pytest.mark.skipif(signs_library() is None, reason="needs AVX2 and a C compiler")
def test_tokens_are_independent_of_each_other_and_of_outliers() -> None:
    terms, context = encoded("bitdelta:bits=2", (96, 640), torch.float32)
    form = product_form(terms, (96, 640), context, Target(CPU, torch.float32))
    x = torch.randn(7, 640, generator=torch.Generator().manual_seed(2))
    x[3, 17] = 1e5
    together = form.matmul(x)
    for i in range(len(x)):
        assert torch.equal(form.matmul(x[i : i + 1])[0], together[i])


@pytest.mark.parametrize("added", [0, 3])
def test_changed_and_added_rows(added: int) -> None:
    base = torch.randn(20 + added, 32)
    base[20:] = 0
    variant = base.clone()
    variant[torch.tensor([2, 7, 19])] += 0.1
    variant[20:] = 1.5
    context = Context("table", base, variant)
    made = Rows(inner=Codes(bits=8), added=added).encode(variant - base, context)
    shape = tuple(variant.shape)
    dense = dense_delta([made], shape, context)
    assert (dense - (variant - base)).abs().max() < 1e-3
    target = Target(CPU, torch.float32)
    x = torch.randn(4, 32)
    product = product_form([made], shape, context, target)
    assert torch.allclose(product.matmul(x), x @ dense.T, atol=1e-5)
    table = table_form([made], shape, context, target)
    index = torch.arange(shape[0])
    assert torch.allclose(table.gather(index), dense, atol=1e-6)


def test_no_changed_rows() -> None:
    base = torch.randn(8, 4)
    context = Context("table", base, base)
    made = Rows(inner=Codes(bits=8)).encode(torch.zeros(8, 4), context)
    table = table_form([made], (8, 4), context, Target(CPU, torch.float32))
    assert torch.equal(table.gather(torch.tensor([1, 3])), torch.zeros(2, 4))


def test_changed_columns_are_multiplied_alone() -> None:
    delta = torch.zeros(24, 40)
    delta[:, [3, 17, 39]] = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    context = Context("w")
    made = Columns(inner=CodedDense()).encode(delta, context)
    target = Target(CPU, torch.float32)
    form = product_form([made], (24, 40), context, target)
    assert form.nbytes == 24 * 3 * 4 + 3 * 8
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(form.matmul(x), x @ delta.T)
    assert torch.equal(form.gather(torch.tensor([23, 0])), delta[[23, 0]])


@pytest.mark.parametrize("term", [Shared(scale=0.5), Shared(groups=3), Shared(groups=9)], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_what_is_shared_is_multiplied_by_pieces(
    monkeypatch: pytest.MonkeyPatch, term: Shared, masked: bool
) -> None:
    monkeypatch.setattr(shared, "_PIECE", 100)
    noise = torch.Generator().manual_seed(term.groups + masked)
    table = torch.randn(term.groups * 23, 37, generator=noise)
    context = Context("w", shared=lambda family, key: table)
    term = replace(term, masked=masked, key=f"{term.groups}{masked}")
    made = term.encode(torch.randn(23, 37, generator=noise), context)
    delta = made.term.decode(made.parts, (23, 37), context)
    form = product_form([made], (23, 37), context, Target(CPU, torch.float32))
    x = torch.randn(5, 37, generator=noise)
    torch.testing.assert_close(form.matmul(x), x @ delta.T)
    assert torch.equal(form.gather(torch.tensor([22, 0, 7])), delta[[22, 0, 7]])
