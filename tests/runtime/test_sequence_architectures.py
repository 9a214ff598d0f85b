"""Any fine-tune of models that write from texts, images or sounds: served as its dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import arch_sequences
import pytest
import torch
from arch_sequences import Sequence, greedy_with_logprobs

from deltafold.compress import (
    Checkpoint,
    Recipe,
    compress_checkpoint,
    parse_spec,
    restore_checkpoint,
)
from deltafold.compress.fingerprint import digest_source
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.embedded import EmbeddedEngine
from deltafold.runtime.engine import Request, Sampling
from deltafold.runtime.host import Row

LOSSY = Recipe(
    default=parse_spec("bitdelta:bits=2,group=16"),
    overrides=(
        ("*embed*", parse_spec("int:bits=8")),
        ("*fc2*", parse_spec("dare:drop=0.5")),
        ("*o_proj*", parse_spec("svd:rank=4")),
        ("*.o.*", parse_spec("svd:rank=4")),
    ),
)
EXACT = Recipe(default=parse_spec("lossless"))
NAMES = ("base", "lossy", "exact", "lossy")


def fine_tune(family: Sequence, folder: Path) -> None:
    """Save a base and a fine-tune of it, in which every tensor that training moves differs."""
    model = family.build()
    model.save_pretrained(folder / "base")
    noise = torch.Generator().manual_seed(1)
    saved = set(model.state_dict())
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            still = name.endswith(family.still or ("\0",))
            if value.is_floating_point() and name in saved and not still:
                value += torch.randn(value.shape, generator=noise) * 0.05
    model.save_pretrained(folder / "full")


def pack(family: Sequence, folder: Path) -> None:
    """Pack the fine-tune with and without loss; restore both as float32 checkpoints."""
    known = list(Checkpoint.open(folder / "full").names())
    for name, recipe in (("lossy", LOSSY), ("exact", EXACT)):
        used = tuple(o for o in recipe.overrides if o[0] not in recipe.unused(known))
        chosen = Recipe(default=recipe.default, overrides=used)
        delta = folder / "zoo" / name
        report = compress_checkpoint(folder / "base", folder / "full", delta, recipe=chosen)
        assert report.coverage == 1
        left = [n for n in report.manifest.unchanged if not n.endswith(family.still or ("\0",))]
        assert not left, "every tensor was moved"
        restore_checkpoint(delta, folder / "base", folder / name, dtype=torch.float32)


def plain(family: Sequence, folder: Path) -> Any:
    return family.kind.from_pretrained(folder, dtype=torch.float32).eval()


def together(requests: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of requests of the same shape; patches of images follow one another."""
    joined = torch.cat if "image_grid_thw" in requests[0] else torch.stack
    return {
        name: (joined if name == "pixel_values" else torch.stack)([r[name] for r in requests])
        for name in requests[0]
    }


def logits(model: Any, family: Sequence, inputs: dict[str, torch.Tensor], rows: int) -> Any:
    """Teacher-forced: a decoder is given words that nobody has predicted."""
    if model.config.is_encoder_decoder:
        noise = torch.Generator().manual_seed(7)
        words = torch.randint(4, arch_sequences.VOCABULARY, (4, 6), generator=noise)
        inputs = {**inputs, "decoder_input_ids": words[:rows]}
    return model(**inputs).logits


@pytest.mark.parametrize("family", arch_sequences.SEQUENCES, ids=lambda f: f.name)
def test_every_tensor_is_applied(family: Sequence, tmp_path: Path) -> None:
    fine_tune(family, tmp_path)
    pack(family, tmp_path)
    exact = digest_source(Checkpoint.open(tmp_path / "exact"))
    full = digest_source(Checkpoint.open(tmp_path / "full"))
    assert {n: d.sha256 for n, d in exact.items()} == {n: d.sha256 for n, d in full.items()}
    noise = torch.Generator().manual_seed(2)
    inputs = together([family.request(7, noise) for _ in NAMES])
    rows = len(NAMES)
    model = plain(family, tmp_path / "base")
    with torch.inference_mode():
        alone = logits(model, family, inputs, rows)
    deltas = Deltas(model, Checkpoint.open(tmp_path / "base"), tmp_path / "zoo")
    held = [Row(deltas.acquire(name)) for name in NAMES]
    with torch.inference_mode(), deltas.batch(held):
        got = logits(model, family, inputs, rows)
    assert torch.equal(got[0], alone[0])
    for name in ("lossy", "exact"):
        with torch.inference_mode():
            dense = logits(plain(family, tmp_path / name), family, inputs, rows).log_softmax(-1)
        for row in (i for i, n in enumerate(NAMES) if n == name):
            assert (got[row].log_softmax(-1) - dense[row]).abs().max() < 1e-4, name
            assert (alone[row].log_softmax(-1) - dense[row]).abs().max() > 1e-3, name


def alone(request: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A request as its model takes it: a batch of one. Patches of an image are a list already."""
    listed = "image_grid_thw" in request
    return {n: v if listed and n == "pixel_values" else v.unsqueeze(0) for n, v in request.items()}


@pytest.mark.parametrize("family", arch_sequences.SEQUENCES, ids=lambda f: f.name)
def test_the_engine_writes_as_dense_models_do(family: Sequence, tmp_path: Path) -> None:
    """Texts of several lengths, all in one batch."""
    fine_tune(family, tmp_path)
    pack(family, tmp_path)
    noise = torch.Generator().manual_seed(5)
    model = plain(family, tmp_path / "base")
    deltas = Deltas(model, Checkpoint.open(tmp_path / "base"), tmp_path / "zoo")
    inputs = [alone(family.request(length, noise)) for length in (5, 9, 3, 7)]
    sampling = Sampling(max_tokens=6, ignore_eos=True, logprobs=0)
    requests = [Request(n, i, sampling) for n, i in zip(NAMES, inputs, strict=True)]
    with EmbeddedEngine(model, deltas) as engine:
        outputs = list(engine.generate(requests))
        assert engine.stats().steps == 6, "one batch for all"
    answers = set()
    for name, given, output in zip(NAMES, inputs, outputs, strict=True):
        expected, certain = greedy_with_logprobs(plain(family, tmp_path / name), given, 6)
        assert list(output.token_ids) == expected, name
        told = torch.tensor([t.logprob for t in output.logprobs])
        assert (told - certain).abs().max() < 1e-4, name
        answers.add(output.token_ids)
    assert len(answers) > 1
