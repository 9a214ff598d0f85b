"""Any fine-tune of any encoder: every tensor moved, applied or rebuilt, as its dense model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import arch_encoders
import pytest
import torch

from deltafold.compress import (
    Checkpoint,
    Recipe,
    compress_checkpoint,
    parse_spec,
    restore_checkpoint,
)
from deltafold.compress.fingerprint import digest_source
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.embedded import PoolingEngine
from deltafold.runtime.embedded.trunk import Encoder, answers_in, row_of
from deltafold.runtime.host import Row
from deltafold.runtime.misfit import NotAppliableError
from deltafold.runtime.pooled import PoolRequest

LOSSY = Recipe(
    default=parse_spec("bitdelta:bits=2,group=16"),
    overrides=(
        ("*mbedding*", parse_spec("int:bits=8")),
        ("*output*", parse_spec("dare:drop=0.5")),
        ("*.0.*", parse_spec("svd:rank=4")),
    ),
)
EXACT = Recipe(default=parse_spec("lossless"))
#: Rows of a batch, and how many tokens each has where they are texts.
NAMES = ("base", "lossy", "exact", "base", "exact")
LENGTHS = (5, 9, 3, 9, 8)


def fine_tune(family: arch_encoders.Encoder, folder: Path) -> None:
    """Save a base and a fine-tune of it, in which every tensor that training moves differs."""
    model = family.build()
    model.save_pretrained(folder / "base")
    noise = torch.Generator().manual_seed(1)
    saved = set(model.state_dict())
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if family.is_still(name):
                continue
            if name in saved and value.is_floating_point():
                step = torch.randn(value.shape, generator=noise) * 0.05
                value += step.abs() if name.endswith("running_var") else step
            elif name in saved:
                value += 1
    model.save_pretrained(folder / "full")


def pack(family: arch_encoders.Encoder, folder: Path) -> None:
    """Pack the fine-tune with and without loss; restore both as float32 checkpoints."""
    known = Checkpoint.open(folder / "full").names()
    for name, recipe in (("lossy", LOSSY), ("exact", EXACT)):
        used = [o for o in recipe.overrides if o[0] not in recipe.unused(list(known))]
        chosen = Recipe(default=recipe.default, overrides=tuple(used))
        delta = folder / "zoo" / name
        report = compress_checkpoint(folder / "base", folder / "full", delta, recipe=chosen)
        assert report.coverage == 1
        left = [n for n in report.manifest.unchanged if not family.is_still(n)]
        assert not left, "every tensor was moved"
        restore_checkpoint(delta, folder / "base", folder / name, dtype=torch.float32)


def plain(family: arch_encoders.Encoder, folder: Path) -> Any:
    return family.cls.from_pretrained(folder, dtype=torch.float32).eval()


def requests(encoder: Encoder, way: Any) -> list[dict[str, torch.Tensor]]:
    noise = torch.Generator().manual_seed(2)
    if way == "image":
        shape = tuple(encoder.inputs["pixel_values"].shape[1:])
        return [{"pixel_values": torch.randn(shape, generator=noise)} for _ in NAMES]
    # Without a mask texts of other lengths do not meet, nor where padding shows in the answer.
    lengths = LENGTHS if encoder.together == "padded" else (7,) * len(LENGTHS)
    words = arch_encoders.VOCABULARY
    return [{"input_ids": torch.randint(6, words, (n,), generator=noise)} for n in lengths]


@pytest.mark.parametrize("family", arch_encoders.ENCODERS, ids=lambda f: f.name)
def test_every_tensor_is_applied_or_the_variant_rebuilt(
    family: arch_encoders.Encoder, tmp_path: Path
) -> None:
    fine_tune(family, tmp_path)
    pack(family, tmp_path)
    exact = digest_source(Checkpoint.open(tmp_path / "exact"))
    full = digest_source(Checkpoint.open(tmp_path / "full"))
    assert {n: d.sha256 for n, d in exact.items()} == {n: d.sha256 for n, d in full.items()}
    encoder = Encoder.of(plain(family, tmp_path / "base"))
    asked = {way: encoder.batch(way, requests(encoder, way)) for way in encoder.ways}
    with torch.inference_mode():
        alone = {way: answers_in(encoder.run(way, inputs)) for way, inputs in asked.items()}
    deltas = Deltas(
        encoder.model, Checkpoint.open(tmp_path / "base"), tmp_path / "zoo", inputs=encoder.inputs
    )
    if family.rebuilt:
        with pytest.raises(NotAppliableError, match=family.rebuilt) as caught:
            deltas.acquire("exact")
        assert caught.value.code in ("engine-unsupported", "coverage")
        assert caught.value.tensor.endswith(family.rebuilt)
        if "text" in alone:  # pictures: test_pooling_rebuilding.py
            check_rebuilt(family, tmp_path, alone["text"])
        return
    rows = [Row(deltas.acquire(name)) for name in NAMES]
    dense = {name: plain(family, tmp_path / name) for name in set(NAMES)}
    for way, inputs in asked.items():
        with torch.inference_mode(), deltas.batch(rows):
            mixed = encoder.run(way, inputs)
        for row, name in enumerate(NAMES):
            check(row, name, mixed, alone[way], dense[name], encoder, way)


def check_rebuilt(family: arch_encoders.Encoder, folder: Path, alone: Any) -> None:
    """All rows at once: the base's share a pass, and each variant's share one of its own."""
    dense = {name: plain(family, folder / name) for name in set(NAMES)}
    with PoolingEngine.open(folder / "base", folder / "zoo", device="cpu") as engine:
        asked = [r["input_ids"] for r in requests(engine._encoder, "text")]
        found = engine.embed(
            [PoolRequest(n, ids.tolist()) for n, ids in zip(NAMES, asked, strict=True)],
            normalize=False,
        )
        infos = {info.name: info for info in engine.variants()}
        held = engine.stats().resident
    for row, (name, ids, vector) in enumerate(zip(NAMES, asked, found, strict=True)):
        with torch.inference_mode():
            expected = dense[name](ids[None]).last_hidden_state[0].mean(0)
        limit = 1e-4 * max(1.0, float(expected.abs().max()))
        assert (vector.vector - expected).abs().max() < limit, name
        if name != "base":
            assert infos[name].applied == "rebuilt"
            assert infos[name].obstacle.endswith(family.rebuilt)
            assert held[name] >= sum(4 * p.numel() for p in dense[name].parameters())
            before = row_of(alone, row, len(ids))["last_hidden_state"][0].mean(0)
            assert (vector.vector - before).abs().max() > 1e-3


def check(
    row: int, name: str, mixed: Any, alone: Any, dense: Any, encoder: Encoder, way: Any
) -> None:
    request = requests(encoder, way)[row]
    tokens = len(request["input_ids"]) if way == "text" else None
    got = answers_in(row_of(mixed, row, tokens))
    before = answers_in(row_of(alone, row, tokens))
    with torch.inference_mode():
        other = dataclasses.replace(encoder, model=dense)
        expected = answers_in(other.run(way, other.batch(way, [request])))
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if name == "base":
            assert torch.equal(got[key], before[key]), key
        limit = 1e-4 * max(1.0, float(value.abs().max()))
        assert (got[key] - value).abs().max() < limit, (name, key)
    if name != "base":
        assert any((before[k] - v).abs().max() > 1e-3 for k, v in expected.items()), name
