"""Where a variant's values are brought in: tried for prompts and for later tokens, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo_models
from torch import nn

from deltafold.compress import Checkpoint, DeltafoldError
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.host import Row
from deltafold.runtime.slots import SlotMap

DOWN = "model.layers.0.mlp.down_proj.weight"


class _Shifted(nn.Module):
    """Hands each request's rows on in the place of the next one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.roll(1, 0))  # type: ignore[no-any-return]


class _Model(nn.Module):
    """Puts requests back into their places outside of what it has shifted them in."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.table, self.own, self.depth = nn.Embedding(16, 8), nn.Linear(8, 8), depth
        self.nest: nn.Module = nn.Linear(8, 8)
        for _ in range(depth):
            self.nest = _Shifted(self.nest)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(input_ids)
        return self.own(x), self.nest(x).roll(-self.depth, 0)


@pytest.mark.parametrize("depth", [1, 4, 8, 12])
def test_no_home_is_used_that_was_not_tried(depth: int) -> None:
    model = _Model(depth).eval()
    slots = SlotMap(model)
    slots.observe(model, {"input_ids": torch.arange(15).reshape(5, 3)})
    assert not slots.homes("nest" + ".inner" * depth + ".weight")
    assert [h.name for h in slots.homes("own.weight")] == ["own"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> zoo_models.Models:
    folder = tmp_path_factory.mktemp("homes")
    return zoo_models.make(folder, codecs={"sign": "bitdelta", "exact": "lossless"})


def read_around_later(model: Any, *, captured: bool) -> None:
    """Let a layer read a weight itself while it goes on by one token, and only then."""
    mlp = model.model.layers[0].mlp
    down, weight = mlp.down_proj, mlp.down_proj.weight

    def around(x: torch.Tensor) -> torch.Tensor:
        gated = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        if x.shape[1] > 1:
            return down(gated)  # type: ignore[no-any-return]
        return nn.functional.linear(gated, weight if captured else down.weight)

    mlp.forward = around


def two_steps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of a prompt, and after one more token with its cache."""
    first = model(ids[:, :-1], use_cache=True)
    later = model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, later.logits], dim=1).log_softmax(-1)


def host(made: zoo_models.Models, model: Any) -> Deltas:
    return Deltas(model, Checkpoint.open(made.base), made.zoo)


def check(made: zoo_models.Models, model: Any) -> None:
    ids = torch.randint(0, 128, (3, 6), generator=torch.Generator().manual_seed(3))
    deltas = host(made, model)
    assert [h.name for h in deltas._slots.homes(DOWN)] == ["model.layers.0.mlp"]
    rows = [Row(deltas.acquire(name)) for name in ("sign", "base", "exact")]
    with torch.inference_mode(), deltas.batch(rows):
        mixed = two_steps(model, ids)
    with torch.inference_mode():
        assert torch.equal(mixed[1], two_steps(made.plain(), ids)[1])
        for row, name in ((0, "sign"), (2, "exact")):
            assert (mixed[row] - two_steps(made.plain(name), ids)[row]).abs().max() < 1e-4, name


def test_a_weight_that_only_later_tokens_read_around_its_module_is_served(
    made: zoo_models.Models,
) -> None:
    model = made.plain()
    read_around_later(model, captured=False)
    check(made, model)


def test_a_weight_that_only_later_tokens_read_elsewhere_is_refused(
    made: zoo_models.Models,
) -> None:
    model = made.plain()
    read_around_later(model, captured=True)
    with pytest.raises(DeltafoldError, match=DOWN) as caught:
        host(made, model).acquire("sign")
    assert caught.value.code == "engine-unsupported"


class _Sly(nn.Linear):
    """Goes round its instance's `forward` where one token is read, and tells watchers all the same."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 1:
            return nn.Module.__call__(self, x)  # type: ignore[no-any-return]
        for before in self._forward_pre_hooks.values():
            before(self, (x,))
        y = nn.Linear.forward(self, x)
        for key, after in self._forward_hooks.items():
            named = key in self._forward_hooks_with_kwargs
            changed = after(self, (x,), {}, y) if named else after(self, (x,), y)
            y = y if changed is None else changed
        return y


def test_a_hook_that_only_later_tokens_pass_by_is_found(
    made: zoo_models.Models,
) -> None:
    model = made.plain()
    model.model.layers[0].mlp.down_proj.__class__ = _Sly
    check(made, model)
