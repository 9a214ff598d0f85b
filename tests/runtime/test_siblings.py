"""Layers that read the same input are found, and served together only while that is so."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_models
from torch import nn

from deltafold.runtime import EmbeddedEngine, Request, Sampling
from deltafold.runtime.batch import BatchState
from deltafold.runtime.kernels.reference import Dense
from deltafold.runtime.layers import LinearHook
from deltafold.runtime.loading import LoadedVariant
from deltafold.runtime.siblings import find_siblings, siblings_of

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

from deltafold.runtime.kernels.triton.grouped import GroupedProducts


class Layers(nn.Module):
    """Three layers; what happens between their calls is up to a test."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.way = way
        self.a, self.b, self.c = (nn.Linear(6, n) for n in (4, 5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ys = [self.a(x)]
        if self.way == "changed in place":
            x.add_(1)
        ys.append(self.b(x))
        if self.way == "called twice":
            ys.append(self.a(x))
        ys.append(self.c(x.clone() if self.way == "a copy" else x))
        return torch.cat(ys, -1)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("", [("a", "b", "c")]),
        ("changed in place", [("b", "c")]),
        ("called twice", [("b", "c")]),
        ("a copy", [("a", "b")]),
    ],
)
def test_siblings_get_the_very_same_input(way: str, expected: list[tuple[str, ...]]) -> None:
    model = Layers(way)
    layers = dict(model.named_children())
    assert find_siblings(model, {"x": torch.randn(5, 6)}, layers) == expected


@pytest.mark.parametrize("way", ["", "called twice", "a copy"])
def test_a_wrong_guess_changes_no_result(way: str) -> None:
    """All three are taken for siblings, whatever the model does with them."""
    model, state = Layers(way), BatchState(torch.device("cpu"))
    state.packed = True
    other = copy.deepcopy(model)
    noise = torch.Generator().manual_seed(1)
    variant = LoadedVariant("v", Path())
    dense = Layers(model.way)
    dense.load_state_dict(model.state_dict())
    groups = siblings_of([("a", "b", "c")], state)
    assert len(set(groups.values())) == 1
    for name, module in model.named_children():
        assert isinstance(module, nn.Linear)
        delta = torch.randn(module.weight.shape, generator=noise)
        if name != "b":
            variant.products[name] = Dense(delta)
            dense.get_submodule(name).weight.data.add_(delta)  # type: ignore[union-attr, operator]
        module.forward = LinearHook(name, module, state, groups[name])  # type: ignore[method-assign]
    x = torch.randn(3, 2, 6, generator=noise)
    with torch.inference_mode():
        for rows in ([None, variant, variant], [variant, None, variant]):
            with state.running([(row, 1.0) for row in rows]):
                found = model(x.clone())
            alone = rows.index(None)
            assert torch.equal(found[alone], other(x)[alone])
            for i, row in enumerate(rows):
                if row is not None:
                    assert torch.allclose(found[i], dense(x)[i], atol=1e-5)


def test_attention_and_mlp_of_a_model_take_a_launch_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    made = zoo_models.make(tmp_path, "Qwen2", codecs={"code": "int:bits=2"}, **small)
    for where in ("batch", "kernels.forms"):
        monkeypatch.setattr(f"deltafold.runtime.{where}.applies_packed", lambda device: True)
    calls: list[int] = []
    add = GroupedProducts.add

    def counted(self: GroupedProducts, ys: Any, *others: Any) -> None:
        calls.append(len(ys))
        add(self, ys, *others)

    monkeypatch.setattr(GroupedProducts, "add", counted)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with EmbeddedEngine.open(made.base, zoo=made.zoo, device=device, dtype="float32") as engine:
        sampling = Sampling(max_tokens=1, ignore_eos=True)
        list(engine.generate([Request("code", "fox", sampling)]))
    # q, k, v; o; gate, up; down: in both layers, and the head.
    assert calls == [3, 1, 2, 1] * 2 + [1]
