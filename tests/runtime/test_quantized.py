"""A quantised base: what runs is its dequantised values, plus each variant's delta."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo_models
from devices import DEVICES

from deltafold.compress import (
    Checkpoint,
    DeltafoldError,
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    parse_spec,
)
from deltafold.compress.quantized import dequantized, quantization_of
from deltafold.runtime import EmbeddedEngine, Request, Sampling
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.embedded.opening import open_model
from deltafold.runtime.host import Row
from deltafold.runtime.quantized import QuantizedLinear, quantization_in
from deltafold.runtime.quantizing import quantize_base

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
bnb = pytest.importorskip("bitsandbytes")

METHODS = ("nf4", "int8")
#: Variants of every family: name, codec, and the quantisation that it was taken against.
KINDS = {
    "sign": ("bitdelta:bits=2,group=32", None),
    "exact": ("lossless", None),
    "rank8": ("svd:rank=8", None),
    "mended": ("int:bits=8,group=32", "own"),
    "whole": ("lossless", "own"),
}
#: No layer has as many rows as there are words: it would be taken for a table.
WIDE = {"intermediate_size": 192}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "GPT2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256},
}


def make(folder: Path, family: str, method: str) -> Path:
    """A base under `folder/base` and a zoo of `KINDS`."""
    torch.manual_seed(0)
    changes = {**zoo_models.SIZES, **FAMILIES[family], **WIDE}
    if family == "GPT2":
        changes = {**FAMILIES[family], "vocab_size": 128, "initializer_range": 0.2}
        changes |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = getattr(transformers, f"{family}Config")(**changes)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    zoo_models.tokenizer(folder / "base")
    for name, (codec, against) in KINDS.items():
        full = zoo_models.fine_tune(folder, name, step=0.02)
        compress_checkpoint(
            folder / "base",
            full,
            folder / "zoo" / name,
            recipe=Recipe(default=parse_spec(codec)),
            base_quantization=method if against else None,
        )
    return folder


@pytest.fixture(scope="module", params=[f"{f}-{m}" for f in FAMILIES for m in METHODS])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    family, method = request.param.split("-")
    return make(tmp_path_factory.mktemp(request.param), family, method), method


def dense(folder: Path, method: str, name: str) -> Any:
    """A float32 model whose weights are the dequantised base's plus the decoded delta."""
    base = Checkpoint.open(folder / "base")
    quantised = quantization_of(base, method).tensors
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    values = {n: base.tensor(n).float() for n in base.names()}
    running = values | {n: dequantized(n, base.tensor(n), method) for n in quantised}
    if name != "base":
        repo = DeltaRepo.open(folder / "zoo" / name)
        for tensor in repo.manifest.tensors:
            delta = repo.delta(tensor, repo.base_tensor(base, tensor))
            running[tensor] = running[tensor] + delta
    prefix = "transformer." if "h.0.ln_1.weight" in running else ""
    with torch.no_grad():
        for tensor, value in running.items():
            model.get_parameter(prefix + tensor).copy_(value)
    return model.eval()


def answer(model: Any, ids: list[int], new: int) -> tuple[list[int], list[float]]:
    tokens, logprobs = list(ids), []
    with torch.inference_mode():
        for _ in range(new):
            last = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(last.argmax()))
            logprobs.append(float(last[tokens[-1]]))
    return tokens[len(ids) :], logprobs


@pytest.mark.parametrize("device", DEVICES)
def test_a_mixed_batch_equals_dequantised_base_plus_delta(
    made: tuple[Path, str], device: str
) -> None:
    folder, method = made
    names = ["base", *KINDS]
    sampling = Sampling(max_tokens=8, logprobs=0, ignore_eos=True)
    with EmbeddedEngine.open(
        folder / "base",
        zoo=folder / "zoo",
        device=device,
        dtype="float32",
        base_quantization=method,
    ) as engine:
        outputs = list(engine.generate([Request(n, "hello there", sampling) for n in names]))
        ids = engine.encode("base", "hello there")
    for name, out in zip(names, outputs, strict=True):
        tokens, logprobs = answer(dense(folder, method, name), ids, 8)
        assert list(out.token_ids) == tokens, name
        worst = max(abs(a.logprob - b) for a, b in zip(out.logprobs, logprobs, strict=True))
        assert worst < 1e-4, name
    assert len({out.token_ids for out in outputs}) > 2


def test_deltas_against_the_dequantised_base_give_the_fine_tune(made: tuple[Path, str]) -> None:
    folder, method = made
    opened = open_model(folder / "base", folder / "zoo", device="cpu", base_quantization=method)
    ids = torch.arange(24).reshape(3, 8)
    rows = [Row(opened.deltas.acquire(n)) for n in ("whole", "exact", "mended")]
    with torch.inference_mode(), opened.deltas.batch(rows):
        mixed = opened.model(ids).logits.log_softmax(-1)
    errors = []
    for row, name in enumerate(("whole", "exact", "mended")):
        tuned = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "full" / name, dtype=torch.float32
        )
        with torch.inference_mode():
            errors.append(float((mixed[row] - tuned(ids).logits[row].log_softmax(-1)).abs().max()))
    # What was taken against the original base keeps the quantisation's error.
    assert errors[0] < 1e-4
    assert errors[1] > 20 * errors[0]
    assert errors[2] < 0.5 * errors[1]


@pytest.mark.parametrize("device", DEVICES)
def test_base_rows_are_bit_identical_to_the_plain_model(
    made: tuple[Path, str], device: str
) -> None:
    """For nf4 the plain model is made of bitsandbytes' own layers."""
    folder, method = made
    base = Checkpoint.open(folder / "base")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    quantize_base(plain, base, method)
    gpt2 = any(m.transposed for m in plain.modules() if isinstance(m, QuantizedLinear))
    if method == "nf4" and not gpt2:
        plain = _with_linear4bit(base)
    opened = open_model(
        base.folder, folder / "zoo", device=device, dtype="float32", base_quantization=method
    )
    rows = [Row(opened.deltas.acquire(n)) for n in ("sign", "base", "whole", "base")]
    ids = torch.arange(32).reshape(4, 8).to(device)
    with torch.inference_mode():
        expected = plain.eval().to(device)(ids).logits
        with opened.deltas.batch(rows):
            mixed = opened.model(ids).logits
    assert torch.equal(mixed[[1, 3]], expected[[1, 3]])
    assert not torch.equal(mixed[[0, 2]], expected[[0, 2]])


def _with_linear4bit(base: Checkpoint) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    for name in quantization_of(base, "nf4").tensors:
        path = name.removesuffix(".weight")
        old = model.get_submodule(path)
        new = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=torch.float32,
            compress_statistics=False,
            quant_type="nf4",
        )
        new.weight = bnb.nn.Params4bit(
            old.weight.data, compress_statistics=False, quant_type="nf4", module=new
        )
        new.bias = old.bias
        # Its short cut for some CPUs computes in bfloat16.
        new.support_avx512bf16_for_cpu = False
        model.set_submodule(path, new.to("cpu"))
    return model


def test_the_base_takes_the_bytes_that_its_codes_take(made: tuple[Path, str]) -> None:
    folder, method = made
    opened = open_model(folder / "base", None, device="cpu", base_quantization=method)
    assert opened.deltas.variants()[0].codec == method
    base, share = Checkpoint.open(folder / "base"), {"nf4": 0.28125, "int8": 0.5}[method]
    layers = {m.tensor: m for m in opened.model.modules() if isinstance(m, QuantizedLinear)}
    assert set(layers) == set(quantization_of(base, method).tensors)
    for tensor, layer in layers.items():
        stored = base.tensor(tensor)
        held = sum(t.untyped_storage().nbytes() for t in (layer.weight, layer.absmax))
        scales = 4 * stored.shape[0] if method == "int8" else 0
        assert held == layer.nbytes == share * stored.numel() * stored.element_size() + scales
    kept = [p for p in opened.model.parameters() if p.is_floating_point() and p.dim() > 1]
    words = [p for p in kept if p.shape[0] == 128 and p.shape[1] == 64]
    # Tables and output layers stay as they are; of everything else only positions are a matrix.
    assert len(kept) - len(words) == (1 if opened.model.config.model_type == "gpt2" else 0)


def code_of(folder: Path, zoo: Path, method: str | None, name: str) -> tuple[str, str]:
    with pytest.raises(DeltafoldError) as caught:
        open_model(folder / "base", zoo, device="cpu", base_quantization=method)
    opened = open_model(folder / "base", zoo, device="cpu", base_quantization=method, strict=False)
    assert [e.name for e in opened.deltas.broken()] == ["mended", "whole"]
    with pytest.raises(DeltafoldError) as again:
        opened.deltas.acquire(name)
    assert again.value.code == caught.value.code
    return caught.value.code, str(caught.value)


def test_a_delta_for_another_quantisation_is_refused(made: tuple[Path, str]) -> None:
    folder, method = made
    other = "int8" if method == "nf4" else "nf4"
    for served in (None, other):
        code, text = code_of(folder, folder / "zoo", served, "whole")
        assert code == "base-mismatch"
        assert f"--base-quantization {method}" in text
        assert (served or "unquantised") in text


@pytest.fixture
def llama(tmp_path: Path) -> zoo_models.Models:
    return zoo_models.make(tmp_path, codecs={}, **WIDE)


def test_a_model_that_keeps_a_layer_dense_refuses_deltas_that_need_it_quantised(
    llama: zoo_models.Models, tmp_path: Path
) -> None:
    full = zoo_models.fine_tune(tmp_path, "whole")
    compress_checkpoint(llama.base, full, tmp_path / "zoo/whole", base_quantization="int8")
    model, base = llama.plain(), Checkpoint.open(llama.base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    quantize_base(model, base, "int8")
    found = quantization_in(model)
    assert found is not None
    left = set(quantization_of(base, "int8").tensors) - set(found.tensors)
    assert left == {"model.layers.0.mlp.up_proj.weight"}
    with pytest.raises(DeltafoldError) as caught:
        Deltas(model, base, tmp_path / "zoo")
    assert caught.value.code == "base-mismatch"
    assert "up_proj" in str(caught.value)


def test_without_bitsandbytes_the_error_names_the_extra(
    llama: zoo_models.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DeltafoldError) as caught:
        open_model(llama.base, None, device="cpu", base_quantization="nf4")
    assert caught.value.code == "missing-extra"
    assert caught.value.fix == "pip install 'deltafold[quant]'"
    # 8 bits need nothing but torch.
    assert open_model(llama.base, None, device="cpu", base_quantization="int8")


def test_unknown_methods_and_quantised_checkpoints_are_refused(llama: zoo_models.Models) -> None:
    with pytest.raises(DeltafoldError) as caught:
        open_model(llama.base, None, device="cpu", base_quantization="int3")
    assert caught.value.code == "bad-argument"
    config = llama.base / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"a": 1},', 1))
    with pytest.raises(DeltafoldError, match="already") as caught:
        open_model(llama.base, None, device="cpu", base_quantization="int8")
    assert caught.value.code == "bad-argument"


def test_a_weight_that_is_read_elsewhere_is_refused(llama: zoo_models.Models) -> None:
    model, base = llama.plain(), Checkpoint.open(llama.base)
    quantize_base(model, base, "int8")
    mlp = model.model.layers[0].mlp
    forward = type(mlp).forward
    mlp.forward = lambda x: forward(mlp, x) + mlp.gate_proj.weight.to(x.dtype).mean()
    with pytest.raises(DeltafoldError) as caught:
        Deltas(model, base)
    assert caught.value.code == "engine-unsupported"
    assert "gate_proj" in str(caught.value)
