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


@pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(),
    reason="Triton exists for Linux alone, and where there is a GPU it does not interpret",
)
def test_on_a_gpu_slices_are_added_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("forms", "merged"):
        monkeypatch.setattr(
            f"deltafold.runtime.kernels.{where}.applies_packed", lambda device: True
        )
    form, exact = coded("int:bits=3")
    weight = torch.randn(SHAPE, generator=noise(3))
    x = torch.randn(5, SHAPE[1], generator=noise(5))

    class OnGpu:
        """A weight that says it lies on one."""

        device = torch.device("cuda")
        shape = weight.shape

    assert merges(form, OnGpu, 400)  # type: ignore[arg-type]
    assert not merges(form, OnGpu, 300)  # type: ignore[arg-type]
    dense = form.dense(torch.float32, weight)  # type: ignore[attr-defined]
    assert torch.allclose(x @ dense.T, x @ (weight + exact).T, atol=1e-5)


def hooked(
    rows: list[tuple[LoadedVariant | None, float]],
) -> tuple[LinearHook, BatchState, list[int]]:
    layer = nn.Linear(SHAPE[1], SHAPE[0])
    nn.init.normal_(layer.weight, generator=noise(6))
    layer.requires_grad_(False)
    state, calls = BatchState(torch.device("cpu")), list[int]()
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
