"""The deltas' host: coverage, refusals, residency, and rows that stay apart."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_models
from safetensors.torch import load_file, save_file

from deltafold.compress import Checkpoint, DeltafoldError, Recipe, compress_checkpoint, parse_spec
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.host import Row


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> zoo_models.Models:
    folder = tmp_path_factory.mktemp("deltas")
    return zoo_models.make(folder, codecs={"sign": "bitdelta", "exact": "lossless", "int": "int"})


def host(made: zoo_models.Models, model: Any = None, **options: Any) -> Deltas:
    return Deltas(model or made.plain(), Checkpoint.open(made.base), made.zoo, **options)


def logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits.log_softmax(-1)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 128, (4, 9), generator=torch.Generator().manual_seed(3))


def test_rows_run_their_own_variant_and_base_rows_are_bit_identical(
    made: zoo_models.Models, ids: torch.Tensor
) -> None:
    model = made.plain()
    deltas = host(made, model)
    held = [deltas.acquire(name) for name in ("sign", "exact", "int", "base")]
    assert held[-1] is None
    with torch.inference_mode(), deltas.batch([Row(v) for v in held]):
        mixed = model(ids).logits
    plain = made.plain()
    with torch.inference_mode():
        expected = plain(ids).logits
    assert torch.equal(mixed[3], expected[3])
    for row, name in enumerate(("sign", "exact", "int")):
        dense = logprobs(made.plain(name), ids)[row]
        assert (mixed[row].log_softmax(-1) - dense).abs().max() < 1e-4
        assert (dense - expected[row].log_softmax(-1)).abs().max() > 1e-2


def test_outside_a_batch_the_wrapped_model_is_the_base(
    made: zoo_models.Models, ids: torch.Tensor
) -> None:
    model = made.plain()
    deltas = host(made, model)
    deltas.acquire("sign")
    assert torch.equal(logprobs(model, ids), logprobs(made.plain(), ids))
    deltas.close()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_scale_interpolates(made: zoo_models.Models, ids: torch.Tensor) -> None:
    model = made.plain()
    deltas = host(made, model)
    variant = deltas.acquire("exact")
    half = made.plain()
    full = dict(made.plain("exact").named_parameters())
    with torch.no_grad():
        for name, parameter in half.named_parameters():
            parameter += 0.5 * (full[name] - parameter)
    rows = [Row(variant, 0.5), Row(variant, 0.0), Row(variant, 1.0), Row(None)]
    with torch.inference_mode(), deltas.batch(rows):
        got = model(ids).logits.log_softmax(-1)
    assert (got[0] - logprobs(half, ids)[0]).abs().max() < 1e-4
    assert torch.equal(got[1], logprobs(made.plain(), ids)[1])
    assert (got[2] - logprobs(made.plain("exact"), ids)[2]).abs().max() < 1e-4


def test_names(made: zoo_models.Models) -> None:
    deltas = host(made, name="tiny")
    assert [v.name for v in deltas.variants()] == ["tiny", "exact", "int", "sign"]
    assert deltas.resolve("base").name == "tiny"
    assert deltas.resolve("sign").tier == "disk"
    variant = deltas.acquire("sign")
    assert deltas.resolve("sign").tier == "host"
    assert deltas.resident()["sign"] > 0
    deltas.release(variant)
    with pytest.raises(DeltafoldError) as caught:
        deltas.acquire("sing")
    assert caught.value.code == "variant-not-found"
    assert "sign" in str(caught.value)


def test_least_recently_used_is_dropped_but_never_one_in_use(made: zoo_models.Models) -> None:
    deltas = host(made, max_deltas=1)
    first = deltas.acquire("sign")
    second = deltas.acquire("int")
    assert set(deltas.resident()) == {"sign", "int"}
    deltas.release(first)
    assert set(deltas.resident()) == {"int"}
    deltas.release(second)
    assert set(deltas.resident()) == {"int"}


def test_two_requests_load_a_variant_once(made: zoo_models.Models) -> None:
    deltas = host(made)
    held: list[Any] = []
    threads = [
        threading.Thread(target=lambda: held.append(deltas.acquire("exact"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(h.loaded) for h in held}) == 1


def test_new_and_replaced_variants_are_seen(made: zoo_models.Models, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    deltas = Deltas(made.plain(), Checkpoint.open(made.base), zoo)
    with pytest.raises(DeltafoldError):
        deltas.resolve("late")
    shutil.copytree(made.zoo / "sign", zoo / "late")
    before = deltas.resolve("late").digest
    shutil.rmtree(zoo / "late")
    shutil.copytree(made.zoo / "int", zoo / "late")
    after = deltas.resolve("late").digest
    assert before != after


def refused(made: zoo_models.Models, zoo: Path, name: str = "bad") -> str:
    """The code with which a strict start refuses, or else the first use."""
    with pytest.raises(DeltafoldError) as caught:
        Deltas(made.plain(), Checkpoint.open(made.base), zoo).acquire(name)
    return caught.value.code


def test_a_delta_for_another_base_is_refused(made: zoo_models.Models, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made.base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DeltafoldError) as caught:
        Deltas(made.plain(), Checkpoint.open(other), made.zoo)
    assert caught.value.code == "base-mismatch"
    assert "model.norm.weight" in str(caught.value)


def test_a_broken_delta_stops_a_strict_start_and_only_itself_otherwise(
    made: zoo_models.Models, tmp_path: Path
) -> None:
    zoo = tmp_path / "zoo"
    shutil.copytree(made.zoo, zoo)
    payload = zoo / "int" / "delta.safetensors"
    payload.write_bytes(payload.read_bytes()[:-10])
    assert refused(made, zoo, "int") == "truncated"
    deltas = Deltas(made.plain(), Checkpoint.open(made.base), zoo, strict=False)
    assert [e.name for e in deltas.broken()] == ["int"]
    assert "int" not in [v.name for v in deltas.variants()]
    assert deltas.acquire("sign") is not None
    with pytest.raises(DeltafoldError) as caught:
        deltas.acquire("int")
    assert caught.value.code == "truncated"


def test_a_flipped_bit_in_the_payload_is_refused_before_it_is_used(
    made: zoo_models.Models, tmp_path: Path
) -> None:
    zoo = tmp_path / "zoo"
    shutil.copytree(made.zoo / "sign", zoo / "bad")
    payload = zoo / "bad" / "delta.safetensors"
    raw = bytearray(payload.read_bytes())
    raw[-1] ^= 1
    payload.write_bytes(raw)
    assert refused(made, zoo) == "checksum"


def test_a_tensor_without_a_place_is_refused(made: zoo_models.Models, tmp_path: Path) -> None:
    full = tmp_path / "full"
    shutil.copytree(made.base.parent / "full" / "sign", full)
    weights = load_file(full / "model.safetensors")
    weights["score.weight"] = torch.ones(3, 64)
    save_file(weights, full / "model.safetensors", metadata={"format": "pt"})
    compress_checkpoint(
        made.base,
        full,
        tmp_path / "zoo" / "bad",
        recipe=Recipe(default=parse_spec("bitdelta")),
        accept=["new-tensors"],
    )
    assert refused(made, tmp_path / "zoo") == "coverage"


def read_around(model: Any, *, captured: bool) -> None:
    """Let a layer read a weight itself, around the weight's own module."""
    mlp = model.model.layers[0].mlp
    down, weight = mlp.down_proj, mlp.down_proj.weight

    def around(x: torch.Tensor) -> torch.Tensor:
        gated = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return torch.nn.functional.linear(gated, weight if captured else down.weight)

    mlp.forward = around


def test_a_weight_that_is_read_around_its_module_is_served(
    made: zoo_models.Models, ids: torch.Tensor
) -> None:
    """The layer that reads it runs again with the variant's weight."""
    model = made.plain()
    read_around(model, captured=False)
    deltas = host(made, model)
    rows = [Row(deltas.acquire(name), scale) for name, scale in (("sign", 1), ("base", 1))]
    rows += [Row(deltas.acquire("int")), Row(rows[0].variant, 0.5)]
    with torch.inference_mode(), deltas.batch(rows):
        got = model(ids).logits.log_softmax(-1)
    assert torch.equal(got[1], logprobs(made.plain(), ids)[1])
    assert (got[0] - logprobs(made.plain("sign"), ids)[0]).abs().max() < 1e-4
    assert (got[2] - logprobs(made.plain("int"), ids)[2]).abs().max() < 1e-4
    assert (got[3] - got[0]).abs().max() > 1e-3
    deltas.close()
    assert model.model.layers[0].mlp.forward.__name__ == "around"


def test_a_weight_that_is_kept_elsewhere_is_refused(made: zoo_models.Models) -> None:
    """No other value gets in where a model has its own hold of a weight: a delta would be ignored."""
    model = made.plain()
    read_around(model, captured=True)
    deltas = host(made, model)
    with pytest.raises(DeltafoldError) as caught:
        deltas.acquire("sign")
    assert caught.value.code == "engine-unsupported"
    assert "model.layers.0.mlp.down_proj.weight" in str(caught.value)


def test_the_base_name_cannot_be_taken(made: zoo_models.Models, tmp_path: Path) -> None:
    shutil.copytree(made.zoo / "sign", tmp_path / "zoo" / "tiny")
    with pytest.raises(DeltafoldError, match="name of the base"):
        Deltas(made.plain(), Checkpoint.open(made.base), tmp_path / "zoo", name="tiny")


def test_an_untied_head_of_a_tied_base(tmp_path: Path) -> None:
    folder = tmp_path
    made = zoo_models.make(folder, "Qwen2", codecs={"sign": "bitdelta"})
    full = zoo_models.fine_tune(folder, "untied")
    weights = load_file(full / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 1.5
    save_file(weights, full / "model.safetensors", metadata={"format": "pt"})
    compress_checkpoint(
        made.base, full, made.zoo / "untied", recipe=Recipe(), accept=["new-tensors"]
    )
    model = made.plain()
    deltas = host(made, model)
    variant = deltas.acquire("untied")
    ids = torch.arange(5).reshape(1, 5)
    with torch.inference_mode(), deltas.batch([Row(variant)]):
        hidden = model.model(ids).last_hidden_state
        got = model(ids).logits
    expected = hidden @ weights["lm_head.weight"].float().T
    assert (got - expected).abs().max() < 1e-4


def test_a_delta_given_as_the_zoo_is_refused(made: zoo_models.Models) -> None:
    with pytest.raises(DeltafoldError, match="itself a delta") as caught:
        Deltas(made.plain(), Checkpoint.open(made.base), made.zoo / "sign")
    assert str(made.zoo) in caught.value.fix


class Sly(torch.nn.Linear):
    """Calls everybody who watches modules, but not its instance's `forward`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for before in self._forward_pre_hooks.values():
            before(self, (x,))
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        for after in self._forward_hooks.values():
            changed = after(self, (x,), {}, y) if _takes_kwargs(after) else after(self, (x,), y)
            y = y if changed is None else changed
        return y


def _takes_kwargs(hook: Any) -> bool:
    return hook.__code__.co_argcount == 4


def test_a_hook_that_is_passed_by_is_found(made: zoo_models.Models, ids: torch.Tensor) -> None:
    """What can be served by a module around it is served so, and what cannot is refused by name."""
    model = made.plain()
    model.model.layers[0].mlp.up_proj.__class__ = Sly
    deltas = host(made, model)
    home = deltas._slots.homes("model.layers.0.mlp.up_proj.weight")
    assert [h.name for h in home] == ["model.layers.0.mlp"]
    rows = [Row(deltas.acquire(name)) for name in ("sign", "base", "int", "exact")]
    with torch.inference_mode(), deltas.batch(rows):
        mixed = model(ids).logits.log_softmax(-1)
    assert torch.equal(mixed[1], logprobs(made.plain(), ids)[1])
    for row, name in ((0, "sign"), (2, "int"), (3, "exact")):
        assert (mixed[row] - logprobs(made.plain(name), ids)[row]).abs().max() < 1e-4
    model = made.plain()
    model.lm_head.__class__ = Sly
    with pytest.raises(DeltafoldError) as caught:
        host(made, model).acquire("sign")
    assert caught.value.code == "engine-unsupported"
    assert "lm_head.weight" in str(caught.value)
