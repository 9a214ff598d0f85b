"""The base's faster products on a CPU compute the same, and hooks, loans and observers see them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo_models
from torch import nn

from deltafold.runtime import EmbeddedEngine, Request, Sampling
from deltafold.runtime.embedded import opening
from deltafold.runtime.embedded.products import Product, quicken
from deltafold.runtime.kernels import onednn

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture
def all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "LEAST", 0)


@pytest.mark.usefixtures("all_sizes")
@pytest.mark.parametrize(
    "shape", [(2, 7), (1, 3, 7), (4, 1, 7), (1, 7), (0, 7), (1, 1, 7)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_equals_the_layers_own(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 5, bias=bias).requires_grad_(False)
    x = torch.randn(shape)
    expected = layer(x)
    assert quicken(layer) == [""]
    assert isinstance(layer.forward, Product)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    other = {"weight": torch.randn(5, 7)}
    lent = torch.func.functional_call(layer, other, (x,))
    assert torch.allclose(lent, nn.functional.linear(x, other["weight"], layer.bias), atol=1e-6)


def test_what_it_is_not_for_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(7, 5)
    assert quicken(layer) == []
    monkeypatch.setattr(onednn, "LEAST", 0)
    assert quicken(nn.Linear(7, 5, dtype=torch.bfloat16)) == []
    quicken(layer)
    layer(torch.randn(3, 7)).sum().backward()
    assert layer.weight.grad is not None
    assert layer(torch.randn(3, 7, dtype=torch.float64).float()).dtype == torch.float32


def test_variants_are_served_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = zoo_models.make(tmp_path, "Qwen2", codecs={"sign": "bitdelta", "exact": "lossless"})
    quickened: list[str] = []
    monkeypatch.setattr(opening, "quicken", lambda model: quickened.extend(quicken(model)))
    monkeypatch.setattr(onednn, "LEAST", 0)
    asked = Sampling(max_tokens=3, logprobs=0, ignore_eos=True)
    names = ["base", "sign", "exact", "sign*0.5"]

    def answers() -> list[list[float]]:
        with EmbeddedEngine.open(made.base, zoo=made.zoo, device="cpu", dtype="float32") as engine:
            outputs = list(engine.generate([Request(n, "the fox", asked) for n in names]))
        return [[token.logprob for token in out.logprobs] for out in outputs]

    quick = answers()
    assert len(quickened) == 2 * 7 + 1
    monkeypatch.setattr(opening, "quicken", lambda model: [])
    for mine, plain in zip(quick, answers(), strict=True):
        assert max(abs(a - b) for a, b in zip(mine, plain, strict=True)) < 1e-4
