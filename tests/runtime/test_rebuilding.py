"""Variants whose delta cannot be applied: each has a dense model of its own, in the same engine."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arch_table
import pico
import pytest
import torch
import transformers
from truth import greedy, moved

from deltafold.compress import (
    Checkpoint,
    DeltafoldError,
    Recipe,
    compress_checkpoint,
    parse_spec,
    restore_checkpoint,
)
from deltafold.runtime.configs import differing_keys
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.embedded import EmbeddedEngine
from deltafold.runtime.engine import Request, Sampling
from deltafold.runtime.host import Row
from deltafold.runtime.misfit import NotAppliableError

LOSSY, EXACT = "bitdelta:bits=2,group=16", "lossless"


def pack(folder: Path, name: str, model: Any, codec: str = EXACT, accept: Any = ()) -> None:
    """Pack a fine-tune into the zoo, and restore it as a float32 checkpoint."""
    model.save_pretrained(folder / f"{name}-full")
    delta = folder / "zoo" / name
    recipe = Recipe(default=parse_spec(codec))
    compress_checkpoint(
        folder / "base", folder / f"{name}-full", delta, recipe=recipe, accept=accept
    )
    restore_checkpoint(delta, folder / "base", folder / name, dtype=torch.float32)


def plain(folder: Path, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def family(name: str) -> Any:
    return next(f for f in arch_table.FAMILIES if f.name == name)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recurrent base; variants that move what is remembered, and one that leaves it alone."""
    folder = tmp_path_factory.mktemp("mamba")
    family("Mamba").build().save_pretrained(folder / "base")
    pack(folder, "exact", moved(plain(folder / "base")))
    pack(folder, "lossy", moved(plain(folder / "base"), seed=2), LOSSY)
    kept = moved(plain(folder / "base"), remembered, seed=3)
    pack(folder, "kept", kept, LOSSY)
    return folder


def remembered(name: str) -> bool:
    """Whether a tensor of Mamba's decides what a layer remembers."""
    return "mixer." in name and not name.endswith(("in_proj.weight", "out_proj.weight"))


def opened(folder: Path, **options: Any) -> tuple[Any, Deltas]:
    model = plain(folder / "base")
    return model, Deltas(model, Checkpoint.open(folder / "base"), folder / "zoo", **options)


def test_all_kinds_are_in_flight_together(mamba: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Base rows, applied deltas and rebuilt variants, each with several requests at a time."""
    model, deltas = opened(mamba, rebuild="auto")
    names = ["exact", "base", "kept", "lossy", "exact", "kept", "base", "lossy"]
    prompts = [[t % 90 for t in p] for p in pico.prompts([5, 3, 9, 1, 7, 2, 4, 6])]
    requests = [
        Request(n, p, Sampling(max_tokens=8, ignore_eos=True))
        for n, p in zip(names, prompts, strict=True)
    ]
    seen: list[set[str]] = []
    with (
        caplog.at_level(logging.INFO, "deltafold"),
        EmbeddedEngine(model, deltas, max_batch=4) as engine,
    ):
        watches = [pico.Watch() for _ in requests]

        def spy(watch: pico.Watch) -> Callable[[Any], None]:
            def on_chunk(chunk: Any) -> None:
                seen.append(set(engine.stats().running_by_variant))
                watch(chunk)

            return on_chunk

        engine.submit_together([(r, spy(w)) for r, w in zip(requests, watches, strict=True)])
        for watch in watches:
            watch.wait()
        infos = {i.name: i for i in engine.variants()}
    everyone = {"base", "exact", "lossy", "kept"}
    assert everyone in seen, "no model waits until another is through"
    for request, prompt, watch in zip(requests, prompts, watches, strict=True):
        assert watch.tokens == greedy(plain(mamba / request.variant), prompt, 8), request.variant
    assert (infos["kept"].applied, infos["kept"].obstacle) == ("delta", "")
    for name in ("exact", "lossy"):
        assert infos[name].applied == "rebuilt"
        assert infos[name].obstacle == "backbone.layers.0.mixer.A_log"
        assert f"{name} is served by a model of its own" in caplog.text
    assert infos["base"].applied is None


def test_a_rebuilt_model_is_told_of_before_it_is_loaded_and_refused_on_demand(mamba: Path) -> None:
    _, deltas = opened(mamba, rebuild="never")
    info = deltas.resolve("exact")
    assert (info.applied, info.obstacle) == ("refused", "backbone.layers.0.mixer.A_log")
    with pytest.raises(NotAppliableError) as caught:
        deltas.acquire("exact")
    assert caught.value.code == "engine-unsupported"
    assert "--rebuild auto" in caught.value.fix
    deltas.release(deltas.acquire("kept"))


def test_other_scales_than_one_are_refused(mamba: Path) -> None:
    model, deltas = opened(mamba, rebuild="auto")
    with EmbeddedEngine(model, deltas) as engine:
        with pytest.raises(DeltafoldError) as caught:
            list(engine.generate([Request("exact", [3], Sampling(scale=0.5))]))
        assert caught.value.code == "bad-argument"
        assert "A_log" in str(caught.value)
        list(engine.generate([Request("kept", [3], Sampling(max_tokens=1, scale=0.5))]))


def test_eviction_frees_the_model_but_not_under_a_running_request(mamba: Path) -> None:
    model, deltas = opened(mamba, rebuild="auto", max_deltas=1)
    held = deltas.acquire("exact")
    assert held is not None
    watched = weakref.ref(held.model)
    everything = sum(p.numel() * p.element_size() for p in plain(mamba / "exact").parameters())
    assert deltas.resident()["exact"] == everything, "every tensor was moved, none is shared"
    request = Request("exact", [3, 4], Sampling(max_tokens=30, ignore_eos=True))
    other = Request("lossy", [5], Sampling(max_tokens=1))
    with EmbeddedEngine(model, deltas) as engine:
        watch = pico.Watch()
        with pico.hold(engine):
            engine.submit(request, watch)
            deltas.release(held)
            del held
            rest = engine.generate([other])
        list(rest)
        assert watch.wait().finish_reason == "length"
        assert watch.tokens == greedy(plain(mamba / "exact"), [3, 4], 30)
        list(engine.generate([other]))
        assert set(deltas.resident()) == {"lossy"}
        gc.collect()
        assert watched() is None
        # And once more from the disk.
        (again,) = engine.generate([request])
        assert list(again.token_ids) == watch.tokens


def test_a_model_that_reads_a_weight_itself(tmp_path: Path) -> None:
    """What is untouched is the base's own memory."""

    class Direct(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, past_key_values: Any = None, **more: Any) -> Any:
            out = super().forward(input_ids, past_key_values=past_key_values, **more)
            out.logits = out.logits * self.model.norm.weight.std()
            return out

    family("Llama").build().save_pretrained(tmp_path / "base")
    tune = moved(
        plain(tmp_path / "base"), lambda n: n not in ("model.norm.weight", "lm_head.weight")
    )
    pack(tmp_path, "tune", tune)
    model = plain(tmp_path / "base", Direct)
    deltas = Deltas(model, Checkpoint.open(tmp_path / "base"), tmp_path / "zoo", rebuild="auto")
    assert deltas.resolve("tune").obstacle == "model.norm.weight"
    with EmbeddedEngine(model, deltas) as engine:
        requests = [Request(n, [3, 1, 4], Sampling(max_tokens=8)) for n in ("tune", "base")]
        outputs = list(engine.generate(requests))
        resident = deltas.resident()["tune"]
    for name, output in zip(("tune", "base"), outputs, strict=True):
        assert list(output.token_ids) == greedy(plain(tmp_path / name, Direct), [3, 1, 4], 8)
    own = [tune.model.norm.weight, tune.lm_head.weight, *tune.buffers()]
    assert resident == sum(4 * value.numel() for value in own)


def shape_of(**changes: Any) -> Any:
    """A Llama of another structure that begins with the base's weights."""
    made = arch_table.Family("Llama", changes).build()
    base = family("Llama").build().state_dict()
    made.load_state_dict({n: v for n, v in base.items() if n in made.state_dict()}, strict=False)
    return moved(made, lambda n: "layers.0" in n)


OTHERS = {
    "deeper": ({"num_hidden_layers": 3}, ["new-tensors"], "config.json: num_hidden_layers"),
    "shallower": ({"num_hidden_layers": 1}, ["missing-tensors"], "config.json: num_hidden_layers"),
    "rope": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        [],
        "config.json: rope_parameters",
    ),
    "longer": ({"max_position_embeddings": 128}, [], ""),
}


def test_fine_tunes_of_another_structure_or_configuration(tmp_path: Path) -> None:
    family("Llama").build().save_pretrained(tmp_path / "base")
    for name, (changes, accept, _) in OTHERS.items():
        pack(tmp_path, name, shape_of(**changes), accept=accept)
    model, deltas = opened(tmp_path, rebuild="auto")
    prompt = [3, 14, 15, 9, 2, 6]
    with EmbeddedEngine(model, deltas) as engine:
        requests = [Request(n, prompt, Sampling(max_tokens=12)) for n in (*OTHERS, "base")]
        outputs = list(engine.generate(requests))
    answers = set()
    for request, output in zip(requests, outputs, strict=True):
        assert list(output.token_ids) == greedy(plain(tmp_path / request.variant), prompt, 12)
        answers.add(output.token_ids)
    assert len(answers) == len(requests)
    for name, (_, _, obstacle) in OTHERS.items():
        assert deltas.resolve(name).obstacle == obstacle


def test_a_longer_table_of_positions(tmp_path: Path) -> None:
    family("GPT2").build().save_pretrained(tmp_path / "base")
    longer = arch_table.Family("GPT2", {"n_positions": 80}, arch_table._GPT).build()
    pack(tmp_path, "longer", moved(longer), accept=["resized"])
    model, deltas = opened(tmp_path, rebuild="auto")
    with EmbeddedEngine(model, deltas) as engine:
        request = Request("longer", [3, 1, 4], Sampling(max_tokens=8, ignore_eos=True))
        (output,) = engine.generate([request])
    assert list(output.token_ids) == greedy(plain(tmp_path / "longer"), [3, 1, 4], 8)
    assert deltas.resolve("longer").obstacle == "transformer.wpe.weight"


def test_what_does_not_fit_its_own_configuration_is_refused(tmp_path: Path) -> None:
    """A fine-tune with a tensor that no model of its kind has."""
    family("Llama").build().save_pretrained(tmp_path / "base")
    odd = moved(plain(tmp_path / "base"))
    odd.extra = torch.nn.Linear(4, 4)
    pack(tmp_path, "odd", odd, accept=["new-tensors"])
    _, deltas = opened(tmp_path, rebuild="auto")
    with pytest.raises(DeltafoldError) as caught:
        deltas.acquire("odd")
    assert caught.value.code == "coverage"
    assert "extra.weight" in str(caught.value)
    assert deltas.resident() == {}


def test_an_applied_batch_takes_no_rebuilt_variant(mamba: Path) -> None:
    _, deltas = opened(mamba, rebuild="auto")
    variant = deltas.acquire("exact")
    with pytest.raises(AssertionError, match="model of its own"):
        deltas.batch([Row(variant)])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rms_norm_eps": 1e-3}, ["rms_norm_eps"]),
        ({"sliding_window": 8}, ["sliding_window"]),
        ({"bos_token_id": 3, "use_cache": False, "attention_dropout": 0.5}, []),
        ({"max_position_embeddings": 999, "my_trainer": "x"}, []),
    ],
)
def test_only_keys_that_change_the_computation_count(
    changes: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    family("Mistral").build().config.save_pretrained(tmp_path / "base")
    assert differing_keys(tmp_path / "base", tmp_path / "base") == []
    other = arch_table.Family("Mistral", {"sliding_window": 16, **changes}).build().config
    other.save_pretrained(tmp_path / "other")
    assert differing_keys(tmp_path / "base", tmp_path / "other") == expected
