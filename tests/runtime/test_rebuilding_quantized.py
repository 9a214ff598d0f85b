"""Rebuilt variants beside a quantised base: what the fine-tune changed is its own, unquantised."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import arch_table
import pytest
import torch
import transformers
from truth import greedy, moved

from deltafold.compress import (
    Checkpoint,
    DeltafoldError,
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    parse_spec,
    restore_checkpoint,
)
from deltafold.compress.quantized import dequantized, quantization_of
from deltafold.runtime import EmbeddedEngine, Request, Sampling
from deltafold.runtime.embedded.opening import open_model
from deltafold.runtime.quantized import QuantizedLinear

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

WIDE = {"state_size": 4, "hidden_size": 64, "intermediate_size": 128}
PROMPT = [3, 14, 15, 9, 2, 6]
#: Codec, whether it is taken against the dequantised base, and which tensors stay as they are.
KINDS: dict[str, tuple[str, bool, Any]] = {
    "whole": ("lossless", False, lambda name: False),
    "lossy": ("int:bits=8,group=32", False, lambda name: False),
    "mended": ("lossless", True, lambda name: False),
    "state": ("lossless", False, lambda name: not name.endswith("A_log")),
    "one": ("lossless", False, lambda name: not name.endswith(("0.mixer.A_log", "0.norm.weight"))),
    "applied": ("lossless", False, lambda name: not name.endswith("norm.weight")),
}


def pack(folder: Path, name: str, model: Any, codec: str, method: str | None, accept: Any) -> None:
    full, delta = folder / f"{name}-full", folder / "zoo" / name
    model.save_pretrained(full)
    recipe = Recipe(default=parse_spec(codec))
    compress_checkpoint(
        folder / "base", full, delta, recipe=recipe, base_quantization=method, accept=accept
    )
    restore_checkpoint(delta, folder / "base", folder / name, dtype=torch.float32)


def plain(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def expected(folder: Path, name: str, method: str) -> Any:
    """The fine-tune's own values, but for the quantised layers that it left alone."""
    base, model = Checkpoint.open(folder / "base"), plain(folder / name)
    chosen = set(quantization_of(base, method).tensors)
    if name != "base":
        chosen &= set(DeltaRepo.open(folder / "zoo" / name).manifest.unchanged)
    prefix = "" if set(base.names()) <= set(model.state_dict()) else "transformer."
    with torch.no_grad():
        for tensor in chosen:
            model.get_parameter(prefix + tensor).copy_(
                dequantized(tensor, base.tensor(tensor), method)  # type: ignore[arg-type]
            )
    return model


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_what_a_fine_tune_changed_is_its_own_and_the_rest_the_quantised_base(
    tmp_path: Path, method: str
) -> None:
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
    arch_table.Family("Mamba", WIDE).build().save_pretrained(tmp_path / "base")
    for seed, (name, (codec, against, keep)) in enumerate(KINDS.items()):
        model = moved(plain(tmp_path / "base"), keep, seed)
        pack(tmp_path, name, model, codec, method if against else None, ())
    opened = open_model(tmp_path / "base", tmp_path / "zoo", device="cpu", base_quantization=method)
    names = [*KINDS, "base"]
    with EmbeddedEngine(opened.model, opened.deltas) as engine:
        asked = [Request(n, PROMPT, Sampling(max_tokens=8, ignore_eos=True)) for n in names]
        outputs = list(engine.generate(asked))
        how = {info.name: info.applied for info in engine.variants()}
        variants = {n: opened.deltas.acquire(n) for n in KINDS}
    for name, out in zip(names, outputs, strict=True):
        assert how[name] == {"base": None, "applied": "delta"}.get(name, "rebuilt")
        if name != "applied":
            truth = expected(tmp_path, name, method)
            assert list(out.token_ids) == greedy(truth, PROMPT, 8), name
        model = getattr(variants.get(name), "model", None)
        if model is not None:
            ids = torch.tensor([PROMPT])
            with torch.inference_mode():
                gap = (model(ids).logits - truth(ids).logits).abs().max()
            assert gap < 1e-4, name
    # All of the base's codes, and not one byte of them more, where no linear layer was trained.
    own = sum(4 * v.numel() for n, v in opened.model.named_parameters() if n.endswith("A_log"))
    assert opened.deltas.resident()["state"] == own
    codes = {m.tensor: m for m in opened.model.modules() if isinstance(m, QuantizedLinear)}
    kept = [m for m in variants["state"].model.modules() if isinstance(m, QuantizedLinear)]
    assert len(kept) == len(codes) > 0
    assert all(m.weight.data_ptr() == codes[m.tensor].weight.data_ptr() for m in kept)
    assert not any(isinstance(m, QuantizedLinear) for m in variants["whole"].model.modules())


def test_a_longer_table_of_positions_beside_a_quantised_base(tmp_path: Path) -> None:
    """Layers that keep `[in, out]`, some with a bias of the fine-tune's own on the base's codes."""
    sizes = {**arch_table._GPT, "n_embd": 64, "n_inner": 128}
    arch_table.Family("GPT2", {}, sizes).build().save_pretrained(tmp_path / "base")
    longer = arch_table.Family("GPT2", {"n_positions": 80}, sizes).build()
    start = plain(tmp_path / "base").state_dict()
    longer.load_state_dict({n: v for n, v in start.items() if "wpe" not in n}, strict=False)
    tune = moved(longer, lambda name: name.endswith("c_fc.weight") or "h.1.attn" in name)
    pack(tmp_path, "longer", tune, "lossless", None, ["resized"])
    opened = open_model(tmp_path / "base", tmp_path / "zoo", device="cpu", base_quantization="int8")
    with EmbeddedEngine(opened.model, opened.deltas) as engine:
        request = Request("longer", PROMPT, Sampling(max_tokens=8, ignore_eos=True))
        (output,) = engine.generate([request])
        model = opened.deltas.acquire("longer").model
    truth = expected(tmp_path, "longer", "int8")
    assert list(output.token_ids) == greedy(truth, PROMPT, 8)
    kept = {name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    ours = ("0.mlp.c_fc", "1.attn.c_attn", "1.attn.c_proj", "1.mlp.c_fc")
    assert kept == {f"transformer.h.{name}" for name in ours}


def test_a_rebuilt_variant_for_another_quantisation_is_refused(tmp_path: Path) -> None:
    arch_table.Family("Mamba", WIDE).build().save_pretrained(tmp_path / "base")
    pack(tmp_path, "mended", moved(plain(tmp_path / "base")), "lossless", "int8", ())
    with pytest.raises(DeltafoldError) as caught:
        open_model(tmp_path / "base", tmp_path / "zoo", device="cpu")
    assert caught.value.code == "base-mismatch"
