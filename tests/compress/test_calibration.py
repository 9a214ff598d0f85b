"""Calibration: rows of tokens, models, and what they tell of every tensor."""

from __future__ import annotations

import json

import pytest
import torch
import zoo_models

from deltafold.compress import (
    Checkpoint,
    DeltafoldError,
    DeltaRepo,
    Recipe,
    compress_checkpoint,
    parse_spec,
    verify_delta,
)
from deltafold.compress.calibration import (
    CalibratedEvidence,
    CalibrationSet,
    LogitFit,
    ParameterMap,
    calibrate,
    compare,
    compress_and_fit,
    decoded_tensors,
    load_delta,
    load_model,
    mean_loss,
    read_calibration,
)
from deltafold.compress.calibration.batches import IGNORED
from deltafold.compress.calibration.evidence import SafeExamples, grouped
from deltafold.compress.naming import NamedBase
from deltafold.compress.references import Reference, open_references

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def words(seed: int = 0, lengths: tuple[int, ...] = (9, 5, 9, 7)) -> CalibrationSet:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, 128, (n,), generator=draw).tolist() for n in lengths]
    return CalibrationSet.from_ids("builtin:test", rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    return zoo_models.make(
        folder, codecs={"sign1": "bitdelta", "exact": "lossless"}, step=0.1, **SMALL
    )


@pytest.fixture(scope="module")
def variant(made):
    return made.base.parent / "full" / "sign1"


def write(path, *lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_rows_are_cut_and_only_completions_are_labelled(tmp_path, variant):
    file = write(
        tmp_path / "a.jsonl",
        {"text": "hello"},
        {"prompt": "ab", "completion": "cd"},
        {"messages": [{"role": "user", "content": "xy"}, {"role": "assistant", "content": "z"}]},
        {"input_ids": [5, 6, 7]},
        {"text": "never read"},
    )
    data = read_calibration(file, variant, rows=4, length=4)
    text, pair, chat, ids = data.rows
    assert (data.name, data.answers, data.tokens) == ("a.jsonl", True, 4 + 4 + 4 + 3)
    assert text.ids.tolist() == [ord(c) - 30 for c in "hell"]
    assert text.labels.tolist() == [IGNORED, *text.ids[1:].tolist()]
    # The end mark of "abcd" is cut off, and two tokens are the prompt's.
    assert pair.labels.tolist() == [IGNORED, IGNORED, *pair.ids[2:].tolist()]
    # The template writes no roles, and a colon at the end.
    assert chat.ids.tolist() == [ord(c) - 30 for c in "xyz:"]
    assert ids.ids.tolist() == [5, 6, 7]
    assert read_calibration(file, variant, rows=3, length=4).sha256 != data.sha256
    assert read_calibration(file, variant, rows=4, length=4).sha256 == data.sha256


def test_plain_text_is_cut_into_rows(tmp_path, variant):
    (tmp_path / "a.txt").write_text("abcdefgh")
    data = read_calibration(tmp_path / "a.txt", variant, rows=2, length=3)
    assert [len(r) for r in data.rows] == [3, 3]
    assert data.rows[1].ids.tolist() == [ord(c) - 30 for c in "def"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("{", "line 1 is not JSON"),
        ("\n[1]\n", "line 2 is not a JSON object"),
        ('{"question": "x"}', "none of the known fields"),
        ('{"input_ids": [1, true]}', "whole numbers"),
        ('{"input_ids": [1, 128]}', "token ids that the model does not know"),
        ('{"input_ids": [1, -2]}', "token ids that the model does not know"),
        ('{"input_ids": [1]}', "no row of which anything could be predicted"),
    ],
)
def test_unusable_files_say_why(tmp_path, variant, text, complaint):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DeltafoldError, match=complaint) as caught:
        read_calibration(tmp_path / "a.jsonl", variant)
    assert caught.value.code == "bad-argument"


def test_text_needs_a_tokenizer_and_ids_do_not(tmp_path, variant):
    (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    ids = write(tmp_path / "ids.jsonl", {"input_ids": [1, 2]})
    assert read_calibration(ids, tmp_path).tokens == 2
    with pytest.raises(DeltafoldError, match="has no tokenizer"):
        read_calibration(write(tmp_path / "t.jsonl", {"text": "a"}), tmp_path)
    with pytest.raises(DeltafoldError) as caught:
        read_calibration(tmp_path / "nowhere.jsonl", variant)
    assert caught.value.code == "not-found"


def test_a_decoded_delta_is_the_restored_checkpoint(made):
    base, repo = Checkpoint.open(made.base), DeltaRepo.open(made.zoo / "sign1")
    ours, theirs = load_delta(base, repo), made.plain("sign1")
    ids = words().rows[0].ids[None]
    with torch.inference_mode():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    half = decoded_tensors(base, repo, scale=0.5)[Q]
    assert torch.allclose(half, (base.tensor(Q).float() + ours.get_parameter(Q)) / 2, atol=1e-6)


def test_figures_are_those_of_the_formulas(made, variant):
    first, second, data = load_model(made.base), load_model(variant), words()
    found = compare(first, second, data, batch=3)
    sums = torch.zeros(4, dtype=torch.float64)
    with torch.inference_mode():
        for row in data.rows:
            p, q = (
                m(input_ids=row.ids[None]).logits[0, :-1].double().log_softmax(-1)
                for m in (first, second)
            )
            targets = row.ids[1:, None]
            sums += torch.stack(
                [
                    -p.gather(1, targets).sum(),
                    -q.gather(1, targets).sum(),
                    (p.exp() * (p - q)).sum(),
                    (p.argmax(1) == q.argmax(1)).sum(),
                ]
            )
    got = [found.reference_loss, found.loss, found.kl, found.agreement]
    assert got == pytest.approx((sums / data.predicted).tolist(), abs=1e-5)
    assert mean_loss(second, data) == pytest.approx(found.loss, abs=1e-6)
    same = compare(first, first, data)
    assert (same.kl, same.agreement) == (0.0, 1.0)


def test_moments_are_those_of_the_real_inputs(made, variant):
    data, seen = words(), {}
    source = Checkpoint.open(variant)
    model = load_model(variant)

    def look(name):
        return lambda module, args, output: seen.setdefault(name, []).append(args[0][0])

    for name in (Q, DOWN, "lm_head.weight"):
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(look(name))
    with torch.inference_mode():
        for row in data.rows:
            model(input_ids=row.ids[None])
    evidence = CalibratedEvidence(source, data, wanted=("activations",))
    for name, parts in seen.items():
        x, got = torch.cat(parts), evidence.of(name)
        assert torch.allclose(got.second_moment, x.T @ x / len(x), atol=1e-4), name
        # A sample of this size holds every token once.
        assert torch.allclose(
            got.inputs.double().square().sum(), x.double().square().sum(), rtol=1e-4
        )
        assert got.gradient is None
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert evidence.of(name).second_moment is None


def test_a_tied_table_has_the_moments_of_the_output_layer(tmp_path):
    made = zoo_models.make(tmp_path, "Qwen2", codecs={}, **SMALL)
    evidence = CalibratedEvidence(Checkpoint.open(made.base), words())
    assert evidence.of("model.embed_tokens.weight").second_moment.shape == (32, 32)


def test_layers_that_multiply_from_the_other_side_say_so(tmp_path):
    made = zoo_models.make(tmp_path, "GPT2", codecs={}, **SMALL, n_layer=1)
    evidence = CalibratedEvidence(Checkpoint.open(made.base), words())
    name = "transformer.h.0.mlp.c_proj.weight"
    found = evidence.of(name)
    assert found.second_moment is None
    assert found.row_moment.shape == (128, 128) == 2 * (evidence.source.spec(name).shape[0],)
    assert found.inputs is None
    assert found.rows(torch.tensor([0])).row_moment is None


def test_fused_experts_are_loaded_and_have_no_moments(tmp_path):
    made = zoo_models.make(
        tmp_path, "Mixtral", codecs={"a": "bitdelta"}, **SMALL, num_local_experts=2
    )
    base, repo = Checkpoint.open(made.base), DeltaRepo.open(made.zoo / "a")
    ours, theirs, ids = load_delta(base, repo), made.plain("a"), words().rows[0].ids[None]
    with torch.inference_mode():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    evidence = CalibratedEvidence(base, words(), wanted=("activations", "gradients"))
    experts = [n for n in base.names() if "experts" in n]
    assert len(experts) >= 2
    for name in experts:
        found = evidence.of(name)
        assert found.second_moment is None
        assert found.gradient is None
    assert evidence.of(Q).second_moment is not None


def test_gradients_by_group_are_those_of_all_at_once(variant):
    source, data = Checkpoint.open(variant), words()
    # One tensor a group; the last one asked for is the only one kept.
    evidence = CalibratedEvidence(source, data, wanted=("gradients",), group_bytes=1)
    model = load_model(variant)
    fisher = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    loss = torch.zeros(())
    for row in data.rows:
        logits = model(input_ids=row.ids[None]).logits[0, :-1]
        own = torch.nn.functional.cross_entropy(logits, row.ids[1:])
        for name, g in zip(
            fisher, torch.autograd.grad(own, model.parameters(), retain_graph=True), strict=True
        ):
            fisher[name] += g.square() / len(data.rows)
        loss = loss + own * row.predicted / data.predicted
    loss.backward()
    for name in (Q, DOWN, "model.norm.weight", "model.embed_tokens.weight"):
        got = evidence.of(name)
        assert torch.allclose(got.gradient, model.get_parameter(name).grad, atol=1e-6), name
        assert torch.allclose(got.fisher, fisher[name], atol=1e-6), name
        assert got.second_moment is None
    assert not any(p.grad is not None for p in evidence.model.parameters())


def test_groups_are_filled_up_to_their_size():
    sizes = {"a": 3, "b": 3, "c": 7, "d": 1, "e": 9}
    groups = grouped(sizes, sizes.__getitem__, 7)
    assert groups["a"] == groups["b"] == ("a", "b")
    assert (groups["c"], groups["d"], groups["e"]) == (("c",), ("d",), ("e",))


def test_other_checkpoints_come_by_role(made, variant):
    other, source = Checkpoint.open(made.base), Checkpoint.open(variant)
    references = open_references({"aligned": made.base}, other, source)
    evidence = CalibratedEvidence(source, words(), wanted=("reference",), references=references)
    assert evidence.provides == ("reference",)
    assert torch.equal(evidence.of(Q).references["aligned"], other.tensor(Q).float())
    assert evidence.record()["references"] == {"aligned": "base"}


def test_safe_answers_are_the_aligned_models(made, variant):
    """Moments and gradients on them are those of the model that is given as aligned."""
    base, source = Checkpoint.open(made.base), Checkpoint.open(variant)
    safe = CalibrationSet("safe", words().rows[:2])
    wanted = ("safe-activations", "safe-gradients")
    for aligned in (base, source):
        evidence = CalibratedEvidence(
            source,
            words(),
            wanted=wanted,
            safe=SafeExamples(safe, Reference.of(NamedBase(aligned))),
        )
        assert evidence.provides == wanted
        found, expected = evidence.of(DOWN), CalibratedEvidence(aligned, safe).of(DOWN)
        assert found.second_moment is None
        assert torch.equal(found.safe.second_moment, expected.second_moment)
        assert torch.equal(found.safe.fisher, expected.fisher)
    others = CalibratedEvidence(base, safe).of(DOWN)
    assert not torch.allclose(found.safe.second_moment, others.second_moment, rtol=1e-3)


def test_layers_come_in_the_order_of_their_calls(variant):
    source = Checkpoint.open(variant)
    evidence = CalibratedEvidence(source, words(), wanted=("activations", "sequential"))
    order = evidence.order(source.names())
    assert sorted(order) == source.names()
    short = [n.removesuffix(".weight").rpartition(".")[2] for n in order if "layers.1." in n]
    assert short[-7:] == [
        "k_proj",
        "q_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert order.index(DOWN.replace("1", "0")) < order.index(DOWN.replace("down", "up"))
    assert order[-1] == "lm_head.weight"


def test_later_layers_see_the_compressed_ones_before_them(variant):
    source, data = Checkpoint.open(variant), words()
    wanted = ("activations", "gradients", "sequential")
    evidence = CalibratedEvidence(source, data, wanted=wanted)
    plain = CalibratedEvidence(source, data).of(DOWN).second_moment
    gradient = evidence.of(Q).gradient
    settled = torch.zeros(source.spec(Q).shape)
    evidence.settle(Q, settled)
    other = load_model(variant)
    with torch.no_grad():
        other.get_parameter(Q).copy_(settled)
    expected = CalibratedEvidence(source, data, model=other).of(DOWN).second_moment
    assert not torch.allclose(expected, plain, rtol=1e-3)
    assert torch.equal(evidence.of(DOWN).second_moment, expected)
    assert torch.equal(evidence.of(Q).gradient, gradient)


@pytest.mark.parametrize("codec", ["deltazip", "delta-come:bits=4", "int-hessian", "svd-act"])
def test_a_calibrated_delta_is_packed_and_verified(tmp_path, made, variant, codec):
    recipe = Recipe(default=parse_spec(codec), overrides=(("*embed*", parse_spec("int:bits=8")),))
    with pytest.raises(DeltafoldError) as refused:
        compress_checkpoint(made.base, variant, tmp_path / "out", recipe=recipe)
    assert refused.value.code == "needs-calibration"
    evidence = CalibratedEvidence(Checkpoint.open(variant), words(), wanted=recipe.needs())
    report = compress_checkpoint(
        made.base,
        variant,
        tmp_path / "out",
        recipe=recipe,
        evidence=evidence,
        quality={"calibration": evidence.record()},
    )
    assert verify_delta(tmp_path / "out", base=made.base, full=True).coded
    assert report.manifest.quality["calibration"]["data"]["sha256"] == words().sha256
    packed = load_delta(Checkpoint.open(made.base), DeltaRepo.open(tmp_path / "out"))
    fine_tune, base = load_model(variant), load_model(made.base)
    assert compare(fine_tune, packed, words()).kl < compare(fine_tune, base, words()).kl


def test_a_bare_base_is_followed_by_evidence_and_scales(tmp_path, made, variant):
    """The base's tensors lack the prefix that the fine-tune's have; so do those of a reference."""
    base = tmp_path / "base"
    load_model(made.base, dtype=torch.bfloat16).model.save_pretrained(base)
    (base / "tokenizer.json").write_bytes((made.base / "tokenizer.json").read_bytes())
    file = write(tmp_path / "a.jsonl", *({"text": "abc def"}, {"text": "hello world"}))
    recipe = Recipe(default=parse_spec("int-hessian"))
    evidence = calibrate(base, variant, file, wanted=recipe.needs(), references={"aligned": base})
    reference = calibrate(base, variant, file, wanted=("reference",), references={"aligned": base})
    assert torch.equal(
        reference.of(Q).references["aligned"].bfloat16(), Checkpoint.open(made.base).tensor(Q)
    )
    report = compress_and_fit(
        base,
        variant,
        tmp_path / "out",
        evidence.data,
        fit=LogitFit(steps=2),
        recipe=recipe,
        accept=["new-tensors"],
        evidence=evidence,
    )
    assert report.manifest.base_names.prefix == "model."
    assert report.manifest.quality["fit"]["tensors"] > 10
    assert verify_delta(tmp_path / "out", base=base, full=True).coded
    packed = load_delta(Checkpoint.open(base), DeltaRepo.open(tmp_path / "out"))
    # As near to the fine-tune as it comes over the base with the same names.
    plain = tmp_path / "plain"
    compress_checkpoint(made.base, variant, plain, recipe=recipe, evidence=evidence)
    other = load_delta(Checkpoint.open(made.base), DeltaRepo.open(plain))
    kls = [compare(load_model(variant), model, words()).kl for model in (packed, other)]
    assert kls[0] < 1.2 * kls[1]


def test_tensors_that_the_model_calls_otherwise_are_known_by_their_values(variant):
    source = Checkpoint.open(variant)
    model = load_model(variant)
    inner = model.model.layers[0].self_attn

    class Renamed:
        reference = source.reference

        def names(self):
            return sorted(n.replace(Q, "blocks.0.q") for n in source.names())

        def spec(self, name):
            return source.spec(name.replace("blocks.0.q", Q))

        def tensor(self, name):
            return source.tensor(name.replace("blocks.0.q", Q))

    found = ParameterMap(model, Renamed())
    assert found.parameter("blocks.0.q") is inner.q_proj.weight
    assert found.find(DOWN) == DOWN
