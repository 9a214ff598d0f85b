"""Labels and vectors of variants that the shared trunk cannot serve: each by a model of its own."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pooling_zoo
import pytest
import torch
import transformers
from arch_encoders import ENCODERS

from deltafold.compress import DeltafoldError
from deltafold.runtime import PoolingEngine, PoolRequest
from deltafold.runtime.misfit import NotAppliableError

_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_ENDS = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}


@dataclass(frozen=True)
class Case:
    """A base, a class on it that the shared trunk cannot serve, and what is said to stand in the way.

    Attributes:
        base: class of the base.
        tuned: class of the variant.
        obstacle: end of what is named.
        sizes: of the configuration; None are those of the table of architectures.
        changes: to the variant's configuration.
        side: of pictures; 0 for texts.
        vectors: whether the variant gives vectors too.
    """

    base: str
    tuned: str
    obstacle: str
    sizes: dict[str, Any] | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    side: int = 0
    vectors: bool = True


CASES = [
    # A trunk whose tokens lie in front, one whose loader splits a tensor, and one with another depth.
    Case("XLNetLMHeadModel", "XLNetForSequenceClassification", "ff.layer_1.bias"),
    Case(
        "NomicBertModel", "NomicBertForSequenceClassification", "NomicBertForSequenceClassification"
    ),
    Case(
        "BertForMaskedLM",
        "BertForSequenceClassification",
        "config.json: num_hidden_layers",
        changes={"num_hidden_layers": 1},
    ),
    # Heads that read all layers, another trunk, one tower of two, or a decoder too.
    Case(
        "BeitModel",
        "BeitForSemanticSegmentation",
        "BeitForSemanticSegmentation",
        sizes={"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "image_size": 64},
        side=64,
    ),
    Case("FunnelModel", "FunnelForSequenceClassification", "attention.k_head.bias"),
    Case("CLIPModel", "CLIPForImageClassification", "logit_scale", side=32, vectors=False),
    Case(
        "T5ForConditionalGeneration",
        "T5ForSequenceClassification",
        "T5ForSequenceClassification",
        sizes={**_T5, **_ENDS},
        vectors=False,
    ),
]


def make(case: Case, folder: Path) -> pooling_zoo.Made:
    """A base and two variants, one of them lossy."""
    made = pooling_zoo.Made(folder)
    base, tuned = (getattr(transformers, name) for name in (case.base, case.tuned))
    family = next((e for e in ENCODERS if case.base.startswith(e.name)), None)
    sizes = {**(family.config if family else {}), **(case.sizes or {})}
    pooling_zoo.save(base, base.config_class(**sizes), made.base)
    files = (lambda to: pooling_zoo.processor(to, side=case.side)) if case.side else None
    if files is not None:
        files(made.base)
    for name, codec in (("exact", "lossless"), ("lossy", "int:bits=8")):
        made.tune(tuned, name, codec, files, num_labels=3, **case.changes)
    return made


def inputs(case: Case, end: int | None) -> list[Any]:
    """Texts of several lengths, or pictures of one size."""
    noise = torch.Generator().manual_seed(1)
    if case.side:
        shape = (5, case.side, case.side, 3)
        return list(torch.randint(0, 255, shape, generator=noise).numpy().astype(np.uint8))
    texts = [torch.randint(6, 96, (n,), generator=noise).tolist() for n in (5, 9, 3, 9, 8)]
    return [[*text[:-1], end or text[-1]] for text in texts]


def dense(made: pooling_zoo.Made, name: str, given: Any) -> Any:
    """What transformers says of one request to a restored checkpoint."""
    if isinstance(given, np.ndarray):
        pixels = torch.from_numpy(given).permute(2, 0, 1)[None] / 255
        asked = {"pixel_values": (pixels - 0.5) / 0.5}
    else:
        asked = {"input_ids": torch.tensor([given])}
    with torch.inference_mode():
        return made.dense(name)(**asked)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.tuned)
def test_answers_are_the_dense_models(case: Case, tmp_path: Path) -> None:
    made = make(case, tmp_path)
    names = ["exact", "lossy", "base", "exact", "lossy"]
    with PoolingEngine.open(made.base, made.zoo, device="cpu") as engine:
        before = {info.name: info for info in engine.variants()}
        end = getattr(made.dense("exact").config.get_text_config(), "eos_token_id", None)
        asked = [PoolRequest(n, x) for n, x in zip(names, inputs(case, end), strict=True)]
        mine = [r for r in asked if r.variant != "base"]
        found = engine.run(mine)
        if case.vectors:
            assert len(engine.embed(asked)) == len(asked)
        else:
            with pytest.raises(DeltafoldError) as caught:
                engine.embed(mine)
            assert caught.value.code == "bad-argument"
        after = {info.name: info for info in engine.variants()}
        held = engine.stats().resident
    for request, given in zip(mine, found, strict=True):
        truth = dense(made, request.variant, request.input)
        assert "logits" in given.outputs
        for key, value in given.outputs.items():
            assert (value - truth[key][0]).abs().max() < 1e-5, (request.variant, key)
    for name in ("exact", "lossy"):
        assert before[name].applied == "rebuilt", "it is told before anything is loaded"
        assert after[name].obstacle == before[name].obstacle
        assert before[name].obstacle.endswith(case.obstacle)
        own = sum(4 * p.numel() for p in made.dense(name).parameters())
        assert held[name] >= own, "every tensor was moved, none is shared"


def test_a_rebuilt_variant_is_refused_on_demand(tmp_path: Path) -> None:
    made = make(CASES[2], tmp_path)
    with PoolingEngine.open(made.base, made.zoo, device="cpu", rebuild="never") as engine:
        assert {i.name: i.applied for i in engine.variants()} == {
            "base": None,
            "exact": "refused",
            "lossy": "refused",
        }
        for ask in (engine.classify, engine.embed):
            with pytest.raises(NotAppliableError) as caught:
                ask([PoolRequest("exact", [5])])
            assert caught.value.code == "engine-unsupported"
            assert "--rebuild auto" in caught.value.fix
        assert len(engine.embed([PoolRequest("base", [5])])) == 1


def test_applied_rebuilt_and_base_requests_share_what_they_can(tmp_path: Path) -> None:
    """One pass for the base and applied variants, one for each dense model."""
    made = pooling_zoo.texts(tmp_path)
    short = {"num_hidden_layers": 1, "num_labels": 2}
    made.tune(transformers.BertForSequenceClassification, "short", "lossless", **short)
    names = ["two", "short", "five", "short", "grade"]
    asked = [PoolRequest(n, [2, *range(5, 6 + i), 3]) for i, n in enumerate(names)]
    with PoolingEngine.open(made.base, made.zoo, device="cpu") as engine:
        steps = engine.stats().steps
        found = engine.classify(asked)
        assert engine.stats().steps == steps + 2
        for name in ("two", "five", "grade"):
            assert engine.resolve(name).applied == "delta"
    for request, scores in zip(asked, found, strict=True):
        truth = dense(made, request.variant, request.input).logits[0]
        assert (torch.tensor(scores.logits) - truth).abs().max() < 1e-5, request.variant
        assert scores.tokens == len(request.input)
    assert found[1].labels == ("LABEL_0", "LABEL_1")


def test_what_the_fine_tune_left_alone_is_the_bases_own_memory(tmp_path: Path) -> None:
    made = pooling_zoo.Made(tmp_path)
    config = transformers.BertConfig(**next(e for e in ENCODERS if e.name == "Bert").config)
    pooling_zoo.save(transformers.BertForMaskedLM, config, made.base)
    short = transformers.BertForSequenceClassification
    made.tune(
        short,
        "short",
        "lossless",
        num_hidden_layers=1,
        moved=lambda name: "classifier" in name or "pooler" in name,
    )
    with PoolingEngine.open(made.base, made.zoo, device="cpu") as engine:
        engine.classify([PoolRequest("short", [2, 5, 3])])
        held = engine.stats().resident["short"]
    model = made.dense("short")
    # The base has no pooler; its values are the fine-tune's alone. Buffers are each model's own.
    own = [*model.classifier.parameters(), *model.bert.pooler.parameters()]
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert held == sum(4 * p.numel() for p in own) + buffers


def test_eviction_frees_the_model(tmp_path: Path) -> None:
    made = make(CASES[2], tmp_path)
    with PoolingEngine.open(made.base, made.zoo, device="cpu", max_deltas=1) as engine:
        (first,) = engine.classify([PoolRequest("exact", [2, 5, 3])])
        (seat,) = engine._deltas._residency.resident().values()
        watched = weakref.ref(seat.model.whole.model)  # type: ignore[union-attr]
        del seat
        engine.classify([PoolRequest("lossy", [2, 5, 3])])
        assert set(engine._deltas.resident()) == {"lossy"}
        gc.collect()
        assert watched() is None
        (again,) = engine.classify([PoolRequest("exact", [2, 5, 3])])
        assert again.logits == first.logits
        # Both at once exceed the limit while they run, and are answered.
        both = engine.classify([PoolRequest(n, [2, 5, 3]) for n in ("exact", "lossy")])
        assert both[0].logits == first.logits
        assert len(engine._deltas.resident()) == 1


def test_what_a_class_refuses_is_the_callers_mistake(tmp_path: Path) -> None:
    """A head that looks for the end token, on the shared trunk and by itself."""
    made = pooling_zoo.Made(tmp_path)
    bart = next(e for e in ENCODERS if e.name == "Bart").config
    config = transformers.BartConfig(**bart, eos_token_id=3, pad_token_id=1)
    pooling_zoo.save(transformers.BartModel, config, made.base)
    cls = transformers.BartForSequenceClassification
    made.tune(cls, "applied", "lossless", num_labels=3)
    made.tune(cls, "deeper", "lossless", num_labels=3, encoder_layers=2)
    with PoolingEngine.open(made.base, made.zoo, device="cpu") as engine:
        for name, how in (("applied", "delta"), ("deeper", "rebuilt")):
            assert engine.resolve(name).applied == how
            (scores,) = engine.classify([PoolRequest(name, [5, 6, 3])])
            truth = dense(made, name, [5, 6, 3]).logits[0]
            assert (torch.tensor(scores.logits) - truth).abs().max() < 1e-5
            with pytest.raises(DeltafoldError, match="does not take this input") as caught:
                engine.classify([PoolRequest(name, [5, 6, 7])])
            assert caught.value.code == "bad-argument"


def test_a_bare_variant_may_lack_the_pooler(tmp_path: Path) -> None:
    """Whether it is applied or rebuilt: vectors are made without it, and it is not made up."""
    made = pooling_zoo.Made(tmp_path)
    config = transformers.BertConfig(**next(e for e in ENCODERS if e.name == "Bert").config)
    pooling_zoo.save(transformers.BertModel, config, made.base)
    for name, layers in (("applied", 2), ("short", 1)):
        cls = transformers.BertModel
        made.tune(cls, name, "lossless", num_hidden_layers=layers, add_pooling_layer=False)
    with PoolingEngine.open(made.base, made.zoo, device="cpu") as engine:
        assert engine.resolve("short").applied == "rebuilt"
        for name in ("applied", "short"):
            (vector,) = engine.embed([PoolRequest(name, [2, 5, 3])], normalize=False)
            states = dense(made, name, [2, 5, 3]).last_hidden_state[0]
            assert (vector.vector - states.mean(0)).abs().max() < 1e-5
            with pytest.raises(DeltafoldError, match="no pooler of its own"):
                engine.embed([PoolRequest(name, [2, 5, 3])], pooling="pooler")
