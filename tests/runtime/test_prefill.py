"""Long rows of variants take one product by base and delta added up; all others stay apart."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from deltafold.compress import parse_spec
from deltafold.compress.terms import Context
from deltafold.runtime.batch import BatchState
from deltafold.runtime.kernels import merged
from deltafold.runtime.kernels.base import DeltaMatrix, Scaled, Sum
from deltafold.runtime.kernels.forms import Target, product_form
from deltafold.runtime.kernels.merged import merged_product, merges
from deltafold.runtime.kernels.reference import Dense, dense_delta
from deltafold.runtime.kernels.signs import SignWords
from deltafold.runtime.layers import LinearHook
from deltafold.runtime.loading import LoadedVariant

CPU = Target(torch.device("cpu"), torch.float32)
SHAPE = (70, 40)


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coded(spec: str, seed: int = 0) -> tuple[DeltaMatrix, torch.Tensor]:
    delta = torch.randn(SHAPE, generator=noise(seed)) * 0.1
    encoded = parse_spec(spec).encode(delta, Context("w"))
    return product_form(encoded, SHAPE, Context("w"), CPU), dense_delta(
        encoded, SHAPE, Context("w")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_product_by_the_sum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one block of rows, a mixture of forms, and a bias."""
    monkeypatch.setattr(merged, "_PIECE", 1)
    words, first = coded("bitdelta:bits=2,group=16")
    if not isinstance(words, SignWords):
        pytest.skip("this machine has no kernel")
    codes, second = coded("int:bits=3", 1)
    third = torch.randn(SHAPE, generator=noise(2)) * 0.1
    form = Sum([Scaled(words, 0.5), codes, Scaled(Dense(third), -1.0)])
    weight = torch.randn(SHAPE, generator=noise(3)).to(dtype)
    bias = torch.randn(SHAPE[0], generator=noise(4)).to(dtype)
    x = torch.randn(64, SHAPE[1], generator=noise(5)).to(dtype)
    assert merges(form, weight, 64)
    assert not merges(form, weight, 2)
    exact = weight.double() + 0.5 * first + second - third
    expected = x.double() @ exact.T + bias.double()
    found = merged_product(x, weight, bias, form).double()
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert (found - expected).abs().max() < limit * expected.abs().max()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux alone")
@pytest.mark.parametrize(
    ("specs", "launches"),
    [(("int:bits=4", "int:bits=4"), 1), (("bitdelta:bits=2,group=32", "bitdelta:group=32"), 1),
     (("int:bits=3", "bitdelta"), 0), (("dare:drop=0.9", "dare:drop=0.9"), 0)],
)  # fmt: skip
def test_on_a_gpu_all_variants_take_one_launch(
    specs: tuple[str, str], launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where their slices are of one kind; others are rebuilt, and take a product each."""
    from slices import BOUNDS, DEVICE

    from deltafold.runtime.kernels.triton import forms, merge

    for where in ("kernels.forms", "kernels.merged", "batch"):
        monkeypatch.setattr(f"deltafold.runtime.{where}.applies_packed", lambda device: True)
    monkeypatch.setattr(forms, "REBUILD_ABOVE", 100)
    seen = []
    plain = merge.merged_slices
    monkeypatch.setattr(
        merge, "merged_slices", lambda *given: seen.append(given[3].tiles) or plain(*given)
    )
    dtype, target = torch.bfloat16, Target(DEVICE, torch.bfloat16)
    variants, exact = [], []
    for seed, spec in enumerate(specs):
        made = LoadedVariant(spec, Path())
        encoded = parse_spec(spec).encode(torch.randn(SHAPE, generator=noise(seed)), Context("w"))
        made.products["m"] = product_form(encoded, SHAPE, Context("w"), target)
        exact.append(dense_delta(encoded, SHAPE, Context("w")))
        variants.append(made)
    # The second has a bias of its own.
    variants[1].vectors["m"] = {"bias": torch.randn(SHAPE[0], generator=noise(9)).to(DEVICE)}
    rows: list[tuple[LoadedVariant | None, float]] = [(variants[i], 1.0) for i in (1, 0, 1)]
    hook, state, calls = hooked(rows, DEVICE, dtype)
    x = torch.randn(3, 130, SHAPE[1], generator=noise(7)).to(dtype)
    with state.running(rows):
        found = hook(x.to(DEVICE))
        again = hook(x.to(DEVICE))
    assert torch.equal(found, again)
    assert not calls
    # 130 tokens of one variant are two tiles, 260 of the other three.
    assert seen == [5] * 2 * launches
    layer = hook._module
    for i, which in enumerate((1, 0, 1)):
        weight = layer.weight.cpu().double() + exact[which]
        bias = layer.bias.cpu().double()  # type: ignore[union-attr]
        if which:
            bias = bias + variants[1].vectors["m"]["bias"].cpu().double()
        expected = x[i].double() @ weight.T + bias
        off = (found[i].cpu().double() - expected).abs().max()
        # The sum of base and delta is rounded, the product, and the sum with the bias.
        assert off <= 3 * BOUNDS[dtype] * expected.abs().max(), i
    with state.running([(variants[0], 1.0)] * 2):
        hook(x[:2, :40].to(DEVICE))
    assert calls, "few tokens keep base and delta apart"


def hooked(
    rows: list[tuple[LoadedVariant | None, float]],
    device: torch.device = CPU.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[LinearHook, BatchState, list[int]]:
    layer = nn.Linear(SHAPE[1], SHAPE[0])
    nn.init.normal_(layer.weight, generator=noise(6))
    layer.requires_grad_(False).to(device, dtype)
    state, calls = BatchState(device), list[int]()
    hook = LinearHook("m", layer, state)
    plain = hook.base

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        y: torch.Tensor = plain(x)
        return y

    hook.base = counted
    return hook, state, calls


def test_a_batch_of_long_rows_needs_no_product_of_the_base() -> None:
    variants = []
    for seed, spec in enumerate(("bitdelta", "int:bits=4")):
        made = LoadedVariant(spec, Path())
        made.products["m"], exact = coded(spec, seed)
        made.vectors["m"] = {"bias": torch.randn(SHAPE[0], generator=noise(seed))}
        variants.append((made, exact))
    (one, first), (two, second) = variants
    if not isinstance(one.products["m"], SignWords):
        pytest.skip("this machine has no kernel")
    rows: list[tuple[LoadedVariant | None, float]] = [(two, 1.0), (one, 1.0), (two, 1.0)]
    x = torch.randn(3, 130, SHAPE[1], generator=noise(7))
    for given, short, apart in (
        (rows, False, False),
        (rows, True, True),
        ([*rows[:2], (None, 1.0)], False, True),
        ([*rows[:2], (two, 0.5)], False, True),
    ):
        hook, state, calls = hooked(given)
        xs = x[:, :2] if short else x
        with state.running(given):
            found = hook(xs)
        assert bool(calls) == apart
        layer = hook._module
        for i, (variant, scale) in enumerate(given):
            weight, bias = layer.weight, layer.bias
            if variant is not None:
                weight = weight + scale * (first if variant is one else second)
                bias = bias + scale * variant.vectors["m"]["bias"]
            expected = nn.functional.linear(xs[i].double(), weight.double(), bias.double())
            assert torch.allclose(found[i].double(), expected, atol=1e-4)
        if given[-1][0] is None:
            # What the base's row gets does not depend on the others.
            assert torch.equal(found[2], hook.base(xs)[2])
