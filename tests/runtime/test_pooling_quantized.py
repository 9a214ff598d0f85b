"""Labels and vectors on a quantised base: applied, taken against it, and rebuilt beside it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pooling_zoo
import pytest
import torch
import transformers
from arch_encoders import _TEXT

from deltafold.compress import Checkpoint, DeltafoldError
from deltafold.compress.quantized import dequantized, quantization_of
from deltafold.runtime import PoolingEngine, PoolRequest
from deltafold.runtime.quantized import QuantizedLinear

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
pytest.importorskip("bitsandbytes")

WIDE = {**_TEXT, "hidden_size": 64, "intermediate_size": 128}
CLASSIFY = transformers.BertForSequenceClassification


def make(folder: Path, method: str) -> pooling_zoo.Made:
    """A masked-language model, whose own head has a layer that would be quantised too."""
    made = pooling_zoo.Made(folder)
    pooling_zoo.save(transformers.BertForMaskedLM, transformers.BertConfig(**WIDE), made.base)
    made.tune(CLASSIFY, "plain", "lossless", num_labels=3)
    made.tune(CLASSIFY, "mended", "lossless", num_labels=2, against=method)
    few = {"num_hidden_layers": 1, "num_labels": 2}
    kept = lambda name: "query" not in name and "key" not in name  # noqa: E731
    made.tune(CLASSIFY, "short", "lossless", moved=kept, **few)
    return made


def expected(made: pooling_zoo.Made, method: str, name: str) -> Any:
    """The fine-tune; where the engine adds its delta to codes, with the codes' error."""
    model, base = made.dense(name), Checkpoint.open(made.base)
    full = Checkpoint.open(made.folder / f"{name}-full")
    with torch.no_grad():
        for tensor in quantization_of(base, method).tensors:
            held = dict(model.named_parameters()).get(tensor)
            unchanged = held is not None and full.sha256(tensor) == base.sha256(tensor)
            if held is not None and (name == "plain" or (name == "short" and unchanged)):
                original = base.tensor(tensor)
                held += dequantized(tensor, original, method) - original.float()  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_each_kind_of_variant(method: str, tmp_path: Path) -> None:
    made = make(tmp_path, method)
    names = ["plain", "mended", "short", "plain", "mended"]
    asked = [PoolRequest(n, [2, *range(5, 7 + i), 3]) for i, n in enumerate(names)]
    with PoolingEngine.open(made.base, made.zoo, device="cpu", base_quantization=method) as engine:
        found = engine.classify(asked)
        (base,) = engine.embed([PoolRequest("base", [2, 5, 3])], normalize=False)
        infos = {info.name: info for info in engine.variants()}
        rebuilt = engine._deltas.acquire("short").model  # type: ignore[union-attr]
        shared = [m for m in engine._encoder.model.modules() if isinstance(m, QuantizedLinear)]
    assert {n: i.applied for n, i in infos.items() if i.parent} == {
        "plain": "delta",
        "mended": "delta",
        "short": "rebuilt",
    }
    assert infos["base"].codec == method
    for request, scores in zip(asked, found, strict=True):
        with torch.inference_mode():
            truth = expected(made, method, request.variant)(torch.tensor([request.input])).logits
        assert (torch.tensor(scores.logits) - truth[0]).abs().max() < 1e-4, request.variant
    # The layers that the rebuilt variant left alone are the base's own codes.
    kept = [m for m in rebuilt.whole.model.modules() if isinstance(m, QuantizedLinear)]
    assert [m.tensor.rpartition(".self.")[2] for m in kept] == ["query.weight", "key.weight"]
    codes = {m.tensor: m.weight.data_ptr() for m in shared}
    assert all(m.weight.data_ptr() == codes[m.tensor] for m in kept)
    model = transformers.BertModel.from_pretrained(made.base, dtype=torch.float32).eval()
    with torch.no_grad():
        own = Checkpoint.open(made.base)
        for tensor in quantization_of(own, method).tensors:
            held = dict(model.named_parameters()).get(tensor.removeprefix("bert."))
            if held is not None:
                held.copy_(dequantized(tensor, own.tensor(tensor), method))  # type: ignore[arg-type]
        states = model(torch.tensor([[2, 5, 3]])).last_hidden_state[0]
    assert (base.vector - states.mean(0)).abs().max() < 1e-4


def test_a_delta_for_another_quantisation_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path, "int8")
    for served in (None, "nf4"):
        with pytest.raises(DeltafoldError) as caught:
            PoolingEngine.open(made.base, made.zoo, device="cpu", base_quantization=served)
        assert caught.value.code == "base-mismatch"
