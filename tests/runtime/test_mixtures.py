"""Weighted mixtures of variants: their names, and that they answer as a dense mixture does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_models
from safetensors.torch import load_file, save_file

from deltafold.compress import (
    Checkpoint,
    DeltafoldError,
    DeltaRepo,
    compress_checkpoint,
    twin_deltas,
)
from deltafold.compress.merges import Twin
from deltafold.runtime import EmbeddedEngine, Request, Sampling
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.host import Row
from deltafold.runtime.mixtures import parse_mixture, variant_name

CODECS = {"sign": "bitdelta", "rank8": "svd:rank=8", "exact": "lossless"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> zoo_models.Models:
    """Tied tables, biases, norms."""
    return zoo_models.make(tmp_path_factory.mktemp("mixtures"), "Qwen2", codecs=CODECS)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 128, (4, 9), generator=torch.Generator().manual_seed(3))


def host(made: zoo_models.Models, model: Any = None, **options: Any) -> Deltas:
    return Deltas(model or made.plain(), Checkpoint.open(made.base), made.zoo, **options)


def dense(made: zoo_models.Models, weights: dict[str, float]) -> Any:
    """The base plus the weighted differences of the restored models."""
    mixed, base = made.plain(), dict(made.plain().named_parameters())
    others = {name: dict(made.plain(name).named_parameters()) for name in weights}
    with torch.no_grad():
        for name, parameter in mixed.named_parameters():
            for variant, weight in weights.items():
                parameter += weight * (others[variant][name] - base[name])
    return mixed


def logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("text", "components"),
    [
        ("sql*0.7+law*0.3", (("sql", 0.7), ("law", 0.3))),
        (" sql * 0.7 + law ", (("sql", 0.7), ("law", 1.0))),
        ("org/my-model_v1.5*-.25", (("org/my-model_v1.5", -0.25),)),
        ("a+b+c", (("a", 1.0), ("b", 1.0), ("c", 1.0))),
    ],
)
def test_names_of_mixtures(text: str, components: tuple[tuple[str, float], ...]) -> None:
    mixture = parse_mixture(text)
    assert mixture.components == components
    assert parse_mixture(mixture.name) == mixture


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ({"sql": 0.7, "law": 0.3}, "sql*0.7+law*0.3"),
        ({"sql": 1.0}, "sql"),
        ({"sql": 1.0, "law": 2}, "sql+law*2"),
        ({"sql": 1e-7, "law": -1e20}, "sql*0.0000001+law*-100000000000000000000"),
    ],
)
def test_mappings_are_names(weights: dict[str, float], name: str) -> None:
    assert variant_name(weights) == name
    assert dict(parse_mixture(name).components) == weights
    assert variant_name(name) == name


@pytest.mark.parametrize("text", ["a*much", "a+", "*0.5", "a*1e3", "a*0.5*0.5", "a*nan", "a*+1"])
def test_what_is_no_mixture_is_not_found(text: str) -> None:
    with pytest.raises(DeltafoldError) as caught:
        parse_mixture(text)
    assert caught.value.code == "variant-not-found"


@pytest.mark.parametrize(
    "weights", [{}, {"a": float("nan")}, {"a+b": 1.0}, {f"v{i}": 1.0 for i in range(17)}]
)
def test_mappings_that_make_no_sense(weights: dict[str, float]) -> None:
    with pytest.raises(DeltafoldError) as caught:
        variant_name(weights)
    assert caught.value.code == "bad-argument"


def test_a_mixture_answers_as_the_dense_mixture_does(
    made: zoo_models.Models, ids: torch.Tensor
) -> None:
    model = made.plain()
    deltas = host(made, model)
    three = {"sign": 0.6, "rank8": -0.4, "exact": 0.5}
    names = [variant_name(three), "sign*0.5+exact", "rank8", "base"]
    held = [deltas.acquire(name) for name in names]
    scales = [1.0, 0.5, 1.0, 1.0]
    with (
        torch.inference_mode(),
        deltas.batch([Row(*row) for row in zip(held, scales, strict=True)]),
    ):
        mixed = model(ids).logits
    expected = [three, {"sign": 0.25, "exact": 0.5}, {"rank8": 1.0}]
    plain = logprobs(made.plain(), ids)
    for row, weights in enumerate(expected):
        answer = logprobs(dense(made, weights), ids)[row]
        assert (mixed[row].log_softmax(-1) - answer).abs().max() < 1e-4, names[row]
        assert (answer - plain[row]).abs().max() > 1e-2
    with torch.inference_mode():
        assert torch.equal(mixed[3], made.plain()(ids).logits[3])


def test_a_mixture_holds_its_components_and_takes_no_second_copy(made: zoo_models.Models) -> None:
    deltas = host(made, max_deltas=1)
    alone = {}
    for name in ("sign", "exact"):
        deltas.release(deltas.acquire(name))
        alone[name] = deltas.resident()[name]
    first, again = (deltas.acquire("sign*0.5+exact*0.5") for _ in range(2))
    assert first is not None
    assert again is not None
    assert first.loaded is again.loaded  # type: ignore[attr-defined]
    held = deltas.resident()
    assert {n: held[n] for n in alone} == alone
    assert 0 < held["sign*0.5+exact*0.5"] < 0.2 * sum(alone.values())
    deltas.release(first)
    assert "sign" in deltas.resident()
    deltas.release(again)
    assert len(deltas.resident()) == 1


def test_the_identity_of_a_mixture(made: zoo_models.Models) -> None:
    deltas = host(made)
    names = ("sign*0.5+exact", "sign*0.5+exact*1.0", "exact+sign*0.5", "sign*0.4+exact", "sign")
    digests = [deltas.resolve(name).digest for name in names]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    info = deltas.resolve("sign*0.5+exact")
    assert (info.name, info.parent, info.codec) == ("sign*0.5+exact", "base", "mixture")
    assert info.tier == "disk"
    variant = deltas.acquire("sign*0.5+exact")
    assert variant is not None
    assert variant.digest == digests[0]
    assert variant.folder == made.zoo / "sign"
    assert deltas.resolve("sign*0.5+exact").tier == "host"
    assert {v.name for v in deltas.variants()} == {"base", *CODECS}
    deltas.release(variant)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("sign*0.5+sing*0.5", "variant-not-found"),
        ("sign*0.5+base*0.5", "bad-argument"),
        ("sign+sign", "bad-argument"),
        ("sign*half", "variant-not-found"),
    ],
)
def test_mixtures_that_cannot_be(made: zoo_models.Models, name: str, code: str) -> None:
    deltas = host(made)
    for ask in (deltas.resolve, deltas.acquire):
        with pytest.raises(DeltafoldError) as caught:
            ask(name)
        assert caught.value.code == code
    assert deltas.resident() == {}


def test_a_folder_of_that_name_wins(made: zoo_models.Models, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    shutil.copytree(made.zoo, zoo)
    deltas = Deltas(made.plain(), Checkpoint.open(made.base), zoo)
    assert deltas.resolve("sign+exact").codec == "mixture"
    shutil.copytree(zoo / "rank8", zoo / "sign+exact")
    assert deltas.resolve("sign+exact").digest == DeltaRepo.open(zoo / "rank8").digest


def test_other_tokens_are_refused_and_a_failed_mixture_holds_nothing(tmp_path: Path) -> None:
    made = zoo_models.make(tmp_path, codecs={"sign": "bitdelta"})
    full = zoo_models.fine_tune(tmp_path, "more")
    weights = load_file(full / "model.safetensors")
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[table] = torch.cat([weights[table], weights[table][:2]])
    save_file(weights, full / "model.safetensors", metadata={"format": "pt"})
    compress_checkpoint(made.base, full, made.zoo / "more", accept=["resized"])
    deltas = host(made)
    with pytest.raises(DeltafoldError, match="tokens differ") as caught:
        deltas.acquire("sign*0.5+more*0.5")
    assert caught.value.code == "engine-unsupported"
    assert "[130, 64]" in str(caught.value)
    assert deltas.resolve("more*0.5").codec == "mixture"


def test_a_tied_and_an_untied_variant(tmp_path: Path, ids: torch.Tensor) -> None:
    made = zoo_models.make(tmp_path, "Qwen2", codecs={"exact": "lossless"})
    full = zoo_models.fine_tune(tmp_path, "untied")
    weights = load_file(full / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = table * 1.5
    save_file(weights, full / "model.safetensors", metadata={"format": "pt"})
    compress_checkpoint(made.base, full, made.zoo / "untied", accept=["new-tensors"])
    model = made.plain()
    deltas = host(made, model)
    variant = deltas.acquire("exact*0.5+untied*0.5")
    with torch.inference_mode(), deltas.batch([Row(variant)] * 4):
        hidden = model.model(ids).last_hidden_state
        found = model(ids).logits
    own = load_file(made.dense / "exact" / "model.safetensors")["model.embed_tokens.weight"]
    head = 0.5 * own.float() + 0.5 * weights["lm_head.weight"].float()
    assert (found - hidden @ head.T).abs().max() < 1e-3


def test_twin_deltas_are_served_as_mixtures(made: zoo_models.Models, ids: torch.Tensor) -> None:
    """What is shared and what is a task's own, at full rank, are the task's fine-tune."""
    zoo = made.base.parent / "twin"
    deltas = [made.zoo / "sign", made.zoo / "exact"]
    twin_deltas(made.base, deltas, zoo, method=Twin(keep=1.0))
    model = made.plain()
    served = Deltas(model, Checkpoint.open(made.base), zoo)
    rows = [Row(served.acquire(f"shared+{name}")) for name in ("sign", "exact")]
    with torch.inference_mode(), served.batch(rows):
        found = model(ids[:2]).logits.log_softmax(-1)
    for row, name in enumerate(("sign", "exact")):
        answer = logprobs(made.plain(name), ids)[row]
        # Norms and biases of both parts are kept in bfloat16.
        assert (found[row] - answer).abs().max() < 0.05
    assert (logprobs(made.plain("sign"), ids) - logprobs(made.plain(), ids)).abs().max() > 0.5


def test_requests_name_mixtures_in_both_ways(made: zoo_models.Models) -> None:
    with EmbeddedEngine.open(made.base, zoo=made.zoo, device="cpu") as engine:
        sampling = Sampling(max_tokens=8, logprobs=0, ignore_eos=True)
        text, mapping, alone = engine.generate(
            [
                Request("sign*0.7+exact*0.3", "abc", sampling),
                Request({"sign": 0.7, "exact": 0.3}, "abc", sampling),
                Request("sign", "abc", sampling),
            ]
        )
        assert text.token_ids == mapping.token_ids
        assert text.variant == mapping.variant == "sign*0.7+exact*0.3"
        assert text.digest == mapping.digest != alone.digest
        assert engine.encode("sign*0.7+exact*0.3", "abc") == engine.encode("sign", "abc")
        assert "sign*0.7+exact*0.3" not in engine.stats().resident
