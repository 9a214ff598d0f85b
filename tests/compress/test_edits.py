"""Edits: their specs, and what a chain of them does before a codec."""

from __future__ import annotations

import pytest
import term_checks as checks
import torch

from deltafold.compress import DeltafoldError, Recipe, parse_spec
from deltafold.compress.edits import EDITS, Edit, Scale, parse_edit
from deltafold.compress.evidence import NEEDS
from deltafold.compress.methods import Chain, Integer
from deltafold.compress.recipe import parse_edit_for
from deltafold.compress.spec import spec_of

SPECS = ["scale", "scale:by=0.5", "scale:by=-1.0"]
every_spec = pytest.mark.parametrize("spec", SPECS)


def test_every_edit_has_a_spec():
    assert {spec.partition(":")[0] for spec in SPECS} == set(EDITS)


@every_spec
def test_specs_come_back(spec):
    chosen = parse_edit(spec)
    assert isinstance(chosen, Edit)
    assert parse_edit(spec_of(chosen)) == chosen
    assert set(chosen.needs) <= set(NEEDS)
    assert chosen.summary
    assert chosen.paper


@every_spec
@pytest.mark.parametrize("shape", checks.SHAPES, ids=str)
def test_edits_keep_shapes_inputs_and_zeros(spec, shape):
    chosen = parse_edit(spec)
    delta, context = checks.make_context(shape)
    before = checks.bits(delta)
    found = chosen.apply(delta, context)
    assert (found.dtype, tuple(found.shape)) == (torch.float32, shape)
    assert checks.bits(delta) == before
    assert checks.bits(chosen.apply(delta, context)) == checks.bits(found)
    assert bool((chosen.apply(torch.zeros(shape), context) == 0).all())


def test_a_chain_edits_before_its_codec():
    chain = parse_spec("scale:by=2+scale:by=0.25+int:bits=8")
    assert chain == Chain((Scale(2.0), Scale(0.25)), Integer(bits=8))
    assert parse_spec(spec_of(chain)) == chain
    delta, context = checks.make_context((16, 64))
    ((term, parts),) = chain.encode(delta, context)
    found = term.decode(parts, (16, 64), context)
    assert ((found - delta / 2).norm() / delta.norm()) < 0.01


def test_exact_codecs_store_an_edited_delta_as_it_is():
    delta, context = checks.make_context((5, 7))
    ((term, parts),) = parse_spec("scale:by=1.5+lossless").encode(delta, context)
    assert torch.equal(term.decode(parts, (5, 7), context), delta * 1.5)


def test_a_recipe_edits_what_its_patterns_match():
    recipe = Recipe(edits=(parse_edit_for("scale:by=2"), parse_edit_for("*mlp*=scale:by=3")))
    every = recipe.method_for("a.norm", (4,), floating=True)
    some = recipe.method_for("a.mlp.up", (4, 4), floating=True)
    assert isinstance(every, Chain)
    assert isinstance(some, Chain)
    assert every.edits == (Scale(2.0),)
    assert some.edits == (Scale(2.0), Scale(3.0))
    assert not isinstance(recipe.method_for("ids", (4,), floating=False), Chain)
    assert Recipe.from_mapping(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("spec", "code"),
    [("shrink", "unknown-codec"), ("scale:by=much", "bad-recipe"), ("scale:by=inf", "bad-recipe")],
)
def test_wrong_edits_end_in_the_fix(spec, code):
    with pytest.raises(DeltafoldError) as caught:
        parse_edit(spec)
    assert caught.value.code == code
    assert caught.value.fix.startswith(("--edit scale:by=1.5", "deltafold codecs"))
