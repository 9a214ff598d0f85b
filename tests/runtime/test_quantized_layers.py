"""One quantised layer: what it computes is the product with the values that its codes stand for."""

from __future__ import annotations

import logging
from typing import Any

import arch_sequences
import pytest
import torch
import transformers
from devices import DEVICES

from deltafold.compress import Checkpoint, DeltafoldError
from deltafold.compress.quantized import dequantized, quantization_of, quantize
from deltafold.runtime.embedded.opening import open_model
from deltafold.runtime.quantized import QuantizedLinear, need_bitsandbytes

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
pytest.importorskip("bitsandbytes")

METHODS = ("nf4", "int8")
#: Relative to the largest number. bitsandbytes' kernels round each product to 16 bits on a GPU.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def layer_of(
    method: Any, dtype: torch.dtype, device: str, *, transposed: bool = False, bias: bool = True
) -> tuple[QuantizedLinear, torch.Tensor]:
    """A layer of 128 inputs (transposed: 96) with rows of very different sizes, and its values."""
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=noise) * 0.02
    weight[3], weight[4], weight[5] = weight[3] * 1e-3, weight[4] * 1e-6, 0
    packed = quantize("w", weight, method)
    columns = 128 if transposed else 96
    shift = torch.randn(columns, generator=noise).to(dtype) if bias else None
    own = None if shift is None else torch.nn.Parameter(shift, requires_grad=False)
    layer = QuantizedLinear("w", packed, own, transposed=transposed).eval().to(device)
    return layer, packed.values().T if transposed else packed.values()


def product(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.cpu().double() @ values.double().T
    return y if bias is None else y + bias.cpu().double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("method", METHODS)
def test_the_product_with_the_values(
    method: str, transposed: bool, dtype: torch.dtype, device: str
) -> None:
    """So few and so many rows that every way of multiplying comes up, and inputs that lie apart."""
    layer, values = layer_of(method, dtype, device, transposed=transposed)
    noise = torch.Generator().manual_seed(1)
    wide = torch.randn(2000, 2 * values.shape[1], generator=noise).to(device, dtype)
    with torch.inference_mode():
        for rows in (1, 3, 4, 8, 40, 2000):
            for x in (wide[:rows, : values.shape[1]], wide[:rows, ::2]):
                y, expected = layer(x), product(x, values, layer.bias)
                assert (y.dtype, y.device, y.shape) == (dtype, x.device, (rows, values.shape[0]))
                gap = (y.cpu().double() - expected).abs().max() / expected.abs().max()
                assert gap < LIMITS[dtype], rows
                assert torch.equal(layer(x), y), "the same bits every time"
        x = wide[:6, ::2].reshape(2, 3, -1)
        gap = (layer(x).reshape(6, -1) - layer(x.reshape(6, -1))).abs().max()
        assert gap < LIMITS[dtype] * layer(x).abs().max()
        assert layer(wide[:0, ::2]).shape == (0, values.shape[0])
    assert torch.equal(layer.values(), values.T if transposed else values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_that_fit_into_float16_are_reached(
    method: str, transposed: bool, device: str
) -> None:
    """Some models have activations of thousands; what is added up on the way must hold them too."""
    kind = torch.float16
    layer, values = layer_of(method, kind, device, transposed=transposed, bias=False)
    x = values[7].sign() * 20000 / values[7].abs().sum()
    y = layer(x.to(device, kind).unsqueeze(0))
    expected = product(x.to(kind).unsqueeze(0), values, None)
    assert expected.abs().max() > 15000
    assert bool(torch.isfinite(y).all())
    assert (y.cpu().double() - expected).abs().max() < 3e-3 * expected.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_a_model_made_of_the_codes_dtype_are_refused(method: str) -> None:
    layer, _ = layer_of(method, torch.float32, "cpu")
    with pytest.raises(DeltafoldError, match="codes") as caught:
        layer(torch.randn(2, 128).to(layer.weight.dtype))
    assert caught.value.code == "engine-unsupported"


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_asks_for_a_weights_dtype(method: str, tmp_path: Any) -> None:
    """T5 brings what it gives to one layer to that layer's dtype, unless that is int8."""
    sizes = {**arch_sequences._T5, "d_model": 64, "d_ff": 128, "d_kv": 16}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    opened = open_model(base.folder, None, device="cpu", dtype="float32", base_quantization=method)
    plain = transformers.T5ForConditionalGeneration.from_pretrained(
        base.folder, dtype=torch.float32
    ).eval()
    tensors = quantization_of(base, method).tensors
    assert any(name.endswith("wo.weight") for name in tensors)
    with torch.no_grad():
        for name in tensors:
            plain.get_parameter(name).copy_(dequantized(name, base.tensor(name), method))  # type: ignore[arg-type]
    ids = torch.arange(4, 18).reshape(2, 7)
    asked = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    with torch.inference_mode():
        found, expected = opened.model(**asked).logits, plain(**asked).logits
    assert (found - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


def test_a_device_that_bitsandbytes_cannot_use_is_told_of() -> None:
    """It can be imported where it has no library for the machine's CUDA."""
    need_bitsandbytes(torch.device("cpu"))
    with pytest.raises(DeltafoldError) as caught:
        need_bitsandbytes(torch.device("meta"))
    assert caught.value.code == "missing-extra"
    assert "meta" in str(caught.value)


@pytest.mark.parametrize("broken", ["wrong", "refuses its arguments", "has no such function"])
def test_a_bitsandbytes_whose_products_do_not_work_is_told_of(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Another version may want more of a state than this one, or give something else."""
    functions = pytest.importorskip("bitsandbytes")
    if broken == "has no such function":
        monkeypatch.delattr(functions, "matmul_4bit")
    else:

        def product(x: torch.Tensor, codes: Any, state: Any, bias: Any) -> torch.Tensor:
            if broken == "wrong":
                return x.new_zeros(len(x), state.shape[0])
            raise TypeError("a state needs its codes")

        monkeypatch.setattr(functions, "matmul_4bit", product)
    with pytest.raises(DeltafoldError) as caught:
        need_bitsandbytes(torch.device("cpu"))
    assert caught.value.code == "missing-extra"
    assert "cpu" in str(caught.value)
