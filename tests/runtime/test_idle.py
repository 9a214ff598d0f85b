"""A tensor that has no say in any answer may be left out; no other one may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import arch_encoders
import numpy as np
import pooling_zoo
import pytest
import torch
from torch import nn

from deltafold.compress import Recipe, compress_checkpoint, parse_spec
from deltafold.runtime import PoolingEngine, PoolRequest
from deltafold.runtime.embedded.trunk import Encoder, answers_in
from deltafold.runtime.slots import SlotMap

IDLE = ["Dinov2", "ResNet", "CLIP", "Siglip", "Levit", "XLNet"]
FAMILIES = {family.name: family for family in arch_encoders.ENCODERS}


def answers(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    encoder = Encoder.of(model)
    with torch.inference_mode():
        found = [encoder.run(way, inputs[way]) for way in encoder.ways]
    return [value for output in found for value in answers_in(output).values()]


def requests(encoder: Encoder) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(3)
    made: dict[str, Any] = {}
    for way in encoder.ways:
        if way == "text":
            rows = torch.randint(6, arch_encoders.VOCABULARY, (3, 7), generator=noise)
            made[way] = encoder.batch(way, [{"input_ids": row} for row in rows])
        else:
            size = encoder.inputs["pixel_values"].shape[1:]
            pixels = torch.randn(3, *size, generator=noise)
            made[way] = encoder.batch(way, [{"pixel_values": picture} for picture in pixels])
    return made


def moved(model: Any, chosen: Callable[[str], bool], size: float) -> None:
    """Move some saved tensors of a model that has not run yet."""
    noise = torch.Generator().manual_seed(4)
    for name, value in model.state_dict().items():
        if chosen(name) and value.is_floating_point():
            value += torch.randn(value.shape, generator=noise) * size
        elif chosen(name):
            value += 1


@pytest.mark.parametrize("name", IDLE)
def test_idle_tensors_change_no_bit_of_a_model_that_starts_with_others(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    encoder, slots = Encoder.of(model), SlotMap(model)
    slots.observe(model, encoder.inputs, find_idle=True)
    idle = [n for n in model.state_dict() if n in slots.slots and slots.is_idle([n])]
    assert idle
    asked = requests(encoder)
    expected = answers(model, asked)
    for one in idle:
        fresh = family.build()
        moved(fresh, lambda n, one=one: n == one, 1.0)  # type: ignore[misc]
        for found, plain in zip(answers(fresh, asked), expected, strict=True):
            assert torch.equal(found, plain), one


def test_every_idle_tensor_of_the_page_is_tried_here() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text("utf-8")
    rows = page.split("## Models that do not generate")[1].splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row.count("|") == 8]
    assert {c[0] for c in cells[2:] if c[5]} == set(IDLE)


def test_what_no_request_asks_for_is_not_idle_either() -> None:
    family = FAMILIES["Esm"]
    model = family.build()
    slots = SlotMap(model)
    slots.observe(model, Encoder.of(model).inputs, find_idle=True)
    still = {n for n in model.state_dict() if family.is_still(n)}
    assert len(still) == 2
    assert not any(slots.is_idle([n]) or slots.homes(n) for n in still)


def test_what_the_first_pass_kept_of_a_tensor_is_served(tmp_path: Path) -> None:
    """A table of biases that a model picks once: moving the parameter later changes nothing."""
    family, picture = FAMILIES["Levit"], np.arange(32 * 32 * 3).reshape(32, 32, 3) % 251
    tuned = family.build()
    tuned.save_pretrained(tmp_path / "base")
    moved(tuned, lambda name: name.endswith("attention_biases"), 3.0)
    tuned.save_pretrained(tmp_path / "full")
    pooling_zoo.processor(tmp_path / "base")
    exact = Recipe(default=parse_spec("lossless"))
    compress_checkpoint(tmp_path / "base", tmp_path / "full", tmp_path / "zoo" / "v", recipe=exact)
    with PoolingEngine.open(tmp_path / "base", tmp_path / "zoo", device="cpu") as engine:
        asked = [PoolRequest(name, picture.astype(np.uint8)) for name in ("v", "base", "v")]
        found = [answer.vector for answer in engine.embed(asked, normalize=False)]
        info = next(info for info in engine.variants() if info.name == "v")
    pixels = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    with torch.inference_mode():
        expected = tuned(pixel_values=pixels).pooler_output[0]
    assert (found[0] - expected).abs().max() < 1e-5
    assert torch.equal(found[0], found[2])
    assert (found[1] - expected).abs().max() > 1e-4, "the biases have a say"
    assert info.applied == "rebuilt"
    assert info.obstacle.endswith("attention_biases")


class _Keeping(nn.Module):
    """Adds a vector of its own that it has scaled once, and kept in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.shift = way, nn.Parameter(torch.arange(8.0))
        self.kept: Any = {"dict": {}, "tensor": None, "list": [], "object": _Box()}[way]
        self.angles = torch.ones(8)  # made here, and missed where it is taken away

    def _scaled(self) -> torch.Tensor:
        if self.way == "dict":
            return self.kept["it"] if "it" in self.kept else self._put()
        if self.way == "list":
            return self.kept[0] if self.kept else self._put()
        if self.way == "object":
            return self._put() if self.kept.value is None else self.kept.value
        return self._put() if self.kept is None else self.kept

    def _put(self) -> torch.Tensor:
        value = self.shift * 2
        if self.way == "dict":
            self.kept["it"] = value
        elif self.way == "list":
            self.kept.append(value)
        elif self.way == "object":
            self.kept.value = value
        else:
            self.kept = value
        return value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.angles + self._scaled()


class _Box:
    value: torch.Tensor | None = None


class _Outer(nn.Module):
    def __init__(self, inner: nn.Module, spare: nn.Module | None = None) -> None:
        super().__init__()
        self.table, self.inner, self.spare = nn.Embedding(16, 8), inner, spare

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(self.table(input_ids))


@pytest.mark.parametrize("way", ["dict", "list", "object", "tensor"])
def test_values_are_found_wherever_a_module_keeps_them(way: str) -> None:
    model = _Outer(_Keeping(way)).eval()
    inputs = {"input_ids": torch.arange(15).reshape(5, 3)}
    model(**inputs)
    slots = SlotMap(model)
    slots.observe(model, inputs, find_idle=True)
    assert not slots.homes("inner.shift")
    assert not slots.is_idle(["inner.shift"])
    assert slots.reading("inner.shift") == ["inner"]
    assert slots.homes("table.weight")


def test_a_module_that_did_not_run_is_not_idle() -> None:
    """It may be there for other tokens than those of the warm-up."""
    model = _Outer(nn.Identity(), nn.Linear(8, 8)).eval()
    slots = SlotMap(model)
    slots.observe(model, {"input_ids": torch.arange(15).reshape(5, 3)}, find_idle=True)
    assert not slots.is_idle(["spare.weight"])
