"""Edits: their specs, and what a chain of them does before a codec."""

from __future__ import annotations

from dataclasses import replace

import pytest
import term_checks as checks
import torch

from deltafold.compress import DeltafoldError, Recipe, parse_spec
from deltafold.compress.edits import EDITS, Edit, Scale, SurveyedEdit, parse_edit
from deltafold.compress.evidence import NEEDS, Evidence
from deltafold.compress.methods import Chain, Integer
from deltafold.compress.recipe import parse_edit_for
from deltafold.compress.spec import spec_of
from deltafold.compress.terms import Context, rows_and_columns

SPECS = [
    "dare",
    "dare:drop=0.5,seed=3,divisor=0.8",
    "dare-k",
    "dare-k-gradient",
    "dare-k-gradient:k=0.5,p=0.5,other=1.5",
    "dare-k:k=0.5,mask=sign",
    "dare-k:k=-1.0,p=0.3,seed=2",
    "darex-q",
    "darex-q:drop=0.5,eta=0.1",
    "della",
    "della:drop=0.5,window=0.2,over=tensor,by=magnitude,rescale=false",
    "irr",
    "irr:spare=0.5,block=5,more=true",
    "safe-delta",
    "safe-delta:budget=1e-06",
    "sampled-magnitudes",
    "sampled-magnitudes:draw=uniform,spread=0.2,seed=5",
    "scale",
    "scale:by=-1.0",
    "scale:by=0.5",
    "stratified",
    "stratified:group=4,seed=1",
    "trim",
    "trim:keep=0.5,scope=tensor",
    "trim:threshold=0.01",
]
every_spec = pytest.mark.parametrize("spec", SPECS)


def evidence_of(context: Context) -> Evidence:
    """All that an edit may ask for, made up for one tensor."""
    assert context.base is not None
    shape = tuple(context.base.shape)
    draw = torch.Generator().manual_seed(5)
    columns = rows_and_columns(shape)[1]
    inputs = torch.randn(9, columns, generator=draw)
    return Evidence(
        second_moment=inputs.T @ inputs / 9,
        gradient=torch.randn(shape, generator=draw),
        fisher=torch.rand(shape, generator=draw),
        references={"unaligned": context.base + torch.randn(shape, generator=draw) * 0.01},
        inputs=inputs,
        safe=Evidence(
            second_moment=inputs.T @ inputs / 9, fisher=torch.rand(shape, generator=draw)
        ),
    )


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
    context = replace(context, evidence=evidence_of(context))
    if isinstance(chosen, SurveyedEdit):
        chosen = chosen.survey([("some.weight", delta)])
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
    [
        ("dare-k-gradient:k=inf", "bad-recipe"),
        ("dare-k:p=1", "bad-recipe"),
        ("dare:divisor=0.05", "bad-recipe"),
        ("dare:drop=1", "bad-recipe"),
        ("darex-q:drop=0", "bad-recipe"),
        ("della:drop=0.05,window=0.2", "bad-recipe"),
        ("irr:spare=2", "bad-recipe"),
        ("safe-delta:budget=-1", "bad-recipe"),
        ("sampled-magnitudes:draw=cauchy", "bad-recipe"),
        ("sampled-magnitudes:spread=-1", "bad-recipe"),
        ("scale:by=inf", "bad-recipe"),
        ("scale:by=much", "bad-recipe"),
        ("shrink", "unknown-codec"),
        ("stratified:group=0", "bad-recipe"),
        ("stratified:seed=-1", "bad-recipe"),
        ("trim:keep=0", "bad-recipe"),
        ("trim:threshold=nan", "bad-recipe"),
    ],
)
def test_wrong_edits_end_in_the_fix(spec, code):
    with pytest.raises(DeltafoldError) as caught:
        parse_edit(spec)
    assert caught.value.code == code
    assert caught.value.fix.startswith((f"--edit {spec.partition(':')[0]}:", "deltafold codecs"))
