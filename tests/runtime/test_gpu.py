"""The main promise on a GPU. Run by `benchmarks/gpu.sh`; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo_models

from deltafold.runtime import EmbeddedEngine, Request, Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("family", list(zoo_models.FAMILIES))
def test_mixed_batch_equals_restored_dense_models(family: str, tmp_path: Path) -> None:
    made = zoo_models.make(tmp_path, family)
    names = ["base", *made.variants]
    sampling = Sampling(max_tokens=12, logprobs=0, ignore_eos=True)
    options = {"device": "cuda", "dtype": "float32"}
    with EmbeddedEngine.open(made.base, zoo=made.zoo, **options) as engine:  # type: ignore[arg-type]
        mixed = list(engine.generate([Request(n, "the fox", sampling) for n in names]))
    for name, out in zip(names, mixed, strict=True):
        folder = made.base if name == "base" else made.dense / name
        with EmbeddedEngine.open(folder, **options) as plain:  # type: ignore[arg-type]
            (alone,) = plain.generate([Request("base", "the fox", sampling)])
        assert out.token_ids == alone.token_ids, name
        pairs = zip(out.logprobs, alone.logprobs, strict=True)
        assert max(abs(a.logprob - b.logprob) for a, b in pairs) < 1e-4, name


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_quantised_base_gives_the_same_on_a_gpu_as_on_a_cpu(method: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    made = zoo_models.make(tmp_path, intermediate_size=192)
    names = ["base", *made.variants]
    sampling = Sampling(max_tokens=12, logprobs=0, ignore_eos=True)
    seen = []
    for device in ("cpu", "cuda"):
        with EmbeddedEngine.open(
            made.base, zoo=made.zoo, device=device, dtype="float32", base_quantization=method
        ) as engine:
            seen.append(list(engine.generate([Request(n, "the fox", sampling) for n in names])))
    for name, here, there in zip(names, *seen, strict=True):
        assert here.token_ids == there.token_ids, name
        pairs = zip(here.logprobs, there.logprobs, strict=True)
        assert max(abs(a.logprob - b.logprob) for a, b in pairs) < 1e-3, name
