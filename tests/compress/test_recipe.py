"""Recipes: which method for which tensor, and files that describe them."""

from __future__ import annotations

import pytest

from deltafold.compress import DeltafoldError, Recipe, parse_spec
from deltafold.compress.fitting import CalibrationInputs, LogitFit
from deltafold.compress.methods import BitDelta, ExactMethod, Integer, LosslessMethod


def test_defaults():
    recipe = Recipe()
    assert recipe.method_for("w", (4, 4), floating=True) == BitDelta(bits=4, group=128)
    assert recipe.method_for("w", (2, 4, 4), floating=True) == BitDelta(bits=4, group=128)
    assert recipe.method_for("b", (4,), floating=True) == ExactMethod()
    assert recipe.method_for("ids", (4, 4), floating=False) == LosslessMethod()


def test_lossless_means_everything():
    recipe = Recipe(default=parse_spec("lossless:level=7"))
    assert recipe.method_for("b", (4,), floating=True) == LosslessMethod(level=7)


def test_integers_are_never_coded_with_loss():
    recipe = Recipe(overrides=(("*", parse_spec("int")),))
    assert recipe.method_for("ids", (4, 4), floating=False) == LosslessMethod()
    recipe = Recipe(overrides=(("*", parse_spec("exact")),))
    assert recipe.method_for("ids", (4, 4), floating=False) == ExactMethod()


def test_patterns_that_match_nothing():
    recipe = Recipe(overrides=(("*.mlp.*", Integer()), ("layer.?", Integer()), ("W", Integer())))
    assert recipe.unused(["a.mlp.up", "w"]) == ["layer.?", "W"]


def test_a_pattern_given_again_moves_to_the_end():
    recipe = Recipe(
        overrides=(
            ("a*", parse_spec("int")),
            ("*b", parse_spec("svd")),
            ("a*", parse_spec("exact")),
        )
    )
    again = Recipe.from_mapping(recipe.to_json())
    for candidate in (recipe, again):
        assert candidate.method_for("ab", (4, 4), floating=True) == ExactMethod()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "bad-recipe"),
        ("- a", "bad-recipe"),
        ("default: [", "bad-recipe"),
        ("default: 3", "bad-recipe"),
        ("default: magic", "unknown-codec"),
        ("default: {bits: 3}", "bad-recipe"),
        ("default: {codec: int, bits: 2.5}", "bad-recipe"),
        ("default: {codec: int, bits: true}", "bad-recipe"),
        ("default: {codec: int, bits: null}", "bad-recipe"),
        ("default: {codec: int, bits: [4]}", "bad-recipe"),
        ("default: {codec: bitdelta, scale: [row]}", "bad-recipe"),
        ("default: {codec: shift-scale, rest: {codec: int}}", "bad-recipe"),
        ("colour: red", "bad-recipe"),
        ("1: red", "bad-recipe"),
        ("tensors: [a]", "bad-recipe"),
        ("tensors: {a: magic}", "unknown-codec"),
        ("fit: true", "bad-recipe"),
        ("fit: {speed: 3}", "bad-recipe"),
        ("fit: {steps: many}", "bad-recipe"),
        ("fit: {steps: true}", "bad-recipe"),
        ("fit: {steps: 0}", "bad-argument"),
        ("fit: {what: signs}", "bad-argument"),
        ("calibration: words.jsonl", "bad-recipe"),
        ("calibration: {rows: 1.5}", "bad-recipe"),
        ("calibration: {references: aligned=x}", "bad-recipe"),
        ("calibration: {references: [3]}", "bad-recipe"),
        ("merge: {method: task}", "bad-recipe"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, code):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(DeltafoldError) as caught:
        Recipe.from_file(path)
    assert caught.value.code == code


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"\xff\xfe\x00default")
    with pytest.raises(DeltafoldError) as caught:
        Recipe.from_file(path)
    assert caught.value.code == "bad-recipe"


def test_no_file(tmp_path):
    with pytest.raises(DeltafoldError) as caught:
        Recipe.from_file(tmp_path / "plan.yaml")
    assert caught.value.code == "not-found"


def test_how_scales_are_fitted_comes_back():
    recipe = Recipe.from_mapping({"fit": {"steps": 20, "lr": 1}})
    assert recipe.fit == LogitFit(steps=20, lr=1)
    again = Recipe.from_mapping(recipe.to_json())
    assert again.fit.record() == recipe.fit.record()


def test_inputs_are_read_and_not_recorded():
    """Paths of one machine are no part of what a delta says of itself."""
    said = {"file": "a.jsonl", "rows": 3, "references": ["aligned=b"]}
    recipe = Recipe.from_mapping({"calibration": said})
    assert recipe.calibration == CalibrationInputs("a.jsonl", rows=3, references=("aligned=b",))
    assert "calibration" not in recipe.to_json()
