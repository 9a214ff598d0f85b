"""Methods: their specs, what they plan, and what they then do."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import term_checks as checks
import torch
from test_edits import evidence_of

from deltafold.compress import METHODS, DeltafoldError, Method, Recipe, parse_spec
from deltafold.compress.encode import encode_tensor
from deltafold.compress.evidence import NEEDS
from deltafold.compress.methods import BitDelta, Dare, ExactMethod, Integer, LosslessMethod, Svd
from deltafold.compress.methods.base import method, spec_of
from deltafold.compress.terms import (
    Banded,
    ColumnPlanes,
    Lossless,
    LosslessStreams,
    Rows,
    Sparse,
    SparseCodes,
)

SPECS = [
    "axis-signs",
    "axis-signs:damp=0.1",
    "bitdelta",
    "bitdelta:scale=tensor",
    "bitdelta:bits=4,group=128",
    "bitdelta:bits=8,scale=row",
    "bitdelta:bits=2,scale=column",
    "bitdelta:factor=1.5,group=8",
    "codebook",
    "codebook:bits=2,scale=row",
    "d-qrelo",
    "d-qrelo:rho=0.25,first=svd",
    "dare",
    "dare:drop=0.5,seed=3,rescale=false",
    "dct",
    "dct:size=5,bits=4,share=1.0,match=false",
    "delta-come",
    "delta-come:bits=2,group=16,ordered=false",
    "deltazip",
    "deltazip:bits=2",
    "exact",
    "impart",
    "impart:ratio=4.0,beta=0.6,power=0.5,seed=9",
    "int",
    "int:bits=8",
    "int:bits=2,group=16",
    "int:bits=3",
    "int-hessian",
    "int-hessian:bits=2,group=16",
    "lloyd",
    "lloyd:bits=4,scale=row",
    "lossless",
    "lossless:level=9",
    "nm",
    "nm:keep=1,of=8,bits=2,group=4",
    "quantize-and-drop",
    "quantize-and-drop:bits=2,drop=0.5,gamma=0.7,seed=4",
    "shift-scale",
    "shift-scale:vector=(bitdelta:bits=2,group=16),rest=(int:bits=2,group=8),shift=0.5,scale=0.9",
    "sparse",
    "sparse:bits=4,mask=bitmap",
    "stratified",
    "stratified:of=5,bits=16,seed=2",
    "svd",
    "svd:rank=4",
    "svd:bits=1",
    "svd-act",
    "svd-act:rank=4,damp=0.1",
    "svd-widths",
    "svd-widths:bits=2,group=16",
    "topk",
    "topk:keep=0.01,bits=8",
    "ultradelta",
    "ultradelta:bits=3,drop=0.5,step=0.02,gamma=0.8,seed=4",
]
every_spec = pytest.mark.parametrize("spec", SPECS)
#: With and without evidence, where a codec looks at some.
SEEN = [
    (spec, seen) for spec in SPECS for seen in (False, True)[: 1 + bool(parse_spec(spec).needs)]
]
every_spec_and_evidence = pytest.mark.parametrize(("spec", "seen"), SEEN)


def known(context: checks.Context, seen: bool) -> checks.Context:
    """The context with all evidence that there is, or without any."""
    return replace(context, evidence=evidence_of(context)) if seen else context


def test_every_method_has_a_spec():
    assert {spec.partition(":")[0] for spec in SPECS} == set(METHODS)


def test_every_method_has_its_row_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "codecs.md").read_text("utf-8")
    assert set(METHODS) <= set(re.findall(r"^\| `([a-z0-9-]+)` \|", page, re.MULTILINE))


@every_spec
def test_specs_come_back(spec):
    chosen = parse_spec(spec)
    assert isinstance(chosen, Method)
    assert parse_spec(spec_of(chosen)) == chosen


@every_spec_and_evidence
@pytest.mark.parametrize("shape", checks.SHAPES, ids=str)
def test_the_plan_is_what_is_done(spec, seen, shape):
    chosen = parse_spec(spec)
    delta, context = checks.make_context(shape)
    planned = chosen.plan(shape, "BF16")
    encoded = chosen.encode(delta, known(context, seen))
    if seen and chosen.id == "axis-signs" and isinstance(encoded[0].term, ColumnPlanes):
        planned = [ColumnPlanes()]  # which of the two is open until inputs are seen
    assert [type(t) for t in planned] == [type(e.term) for e in encoded]
    for term, (_, parts) in zip(planned, encoded, strict=True):
        if isinstance(term, Banded | Sparse | SparseCodes | Lossless | LosslessStreams):
            continue  # how many bytes these take depends on the data
        written = {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()}
        assert written == {k: tuple(s) for k, s in term.parts(shape).items()}


@every_spec_and_evidence
@pytest.mark.parametrize("shape", [(37,), (33, 130), (3, 5, 33), (0, 9)], ids=str)
def test_no_difference_stays_none_and_every_run_is_the_same(spec, seen, shape):
    chosen = parse_spec(spec)
    delta, context = checks.make_context(shape)
    context = known(context, seen)
    zero = known(checks.Context(context.name, context.base, context.base), seen)
    for term, parts in chosen.encode(torch.zeros(shape), zero):
        assert bool((term.decode(parts, shape, zero) == 0).all())
    first, second = (chosen.encode(delta.clone(), context) for _ in range(2))
    assert [term for term, _ in first] == [term for term, _ in second]
    for (_, left), (_, right) in zip(first, second, strict=True):
        assert {k: checks.bits(p) for k, p in left.items()} == {
            k: checks.bits(p) for k, p in right.items()
        }


@pytest.mark.parametrize("added", [0, 2])
def test_methods_of_several_terms_keep_them_all_by_rows(added):
    base = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    variant = torch.cat([base, torch.full((added, 32), 0.5)])
    variant[3:23] += 0.01 * torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    recipe = Recipe(default=parse_spec("d-qrelo:rho=0.5"))
    encoded, delta = encode_tensor("some.weight", variant, base, recipe)
    assert [type(e.term) for e in encoded] == [Rows, Rows]
    context = checks.Context("some.weight", torch.cat([base, torch.zeros(added, 32)]))
    found = sum(e.term.decode(e.parts, tuple(variant.shape), context) for e in encoded)
    assert torch.equal(found[40:], delta[40:])
    rest = delta[3:23]
    alone = [t.decode(p, (20, 32), context) for t, p in recipe.default.encode(rest, context)]
    torch.testing.assert_close(found[3:23], alone[0] + alone[1], rtol=0, atol=1e-6)
    assert (found[3:23] - rest).norm() < 0.5 * rest.norm()


@every_spec
def test_methods_describe_themselves(spec):
    chosen = parse_spec(spec)
    assert set(chosen.needs) <= set(NEEDS)
    for text in (chosen.id, chosen.summary, chosen.paper, chosen.applied):
        assert text
        assert "\n" not in text


@pytest.mark.parametrize(
    ("spec", "code", "fix"),
    [
        ("magic", "unknown-codec", "deltafold codecs"),
        ("", "unknown-codec", "deltafold codecs"),
        ("bitdelta:bits", "bad-recipe", "--codec bitdelta:bits=1,scale=row,group=0,"),
        ("bitdelta:size=3", "bad-recipe", "--codec bitdelta:"),
        ("bitdelta:bits=9", "bad-recipe", "--codec bitdelta:"),
        ("bitdelta:bits=four", "bad-recipe", "--codec bitdelta:"),
        ("bitdelta:bits=2.5", "bad-recipe", "--codec bitdelta:"),
        ("bitdelta:scale=diagonal", "bad-recipe", "--codec bitdelta:"),
        ("bitdelta:factor=0", "bad-recipe", "--codec bitdelta:"),
        ("codebook:bits=0", "bad-recipe", "--codec codebook:"),
        ("shift-scale:scale=0", "bad-recipe", "--codec shift-scale:"),
        ("shift-scale:rest=lossless", "bad-recipe", "--codec shift-scale:"),
        ("shift-scale:rest=(trim:keep=0.2+sparse)", "bad-recipe", "--codec shift-scale:"),
        ("shift-scale:vector=ultradelta", "bad-recipe", "--codec shift-scale:"),
        ("shift-scale:vector=magic", "unknown-codec", "--codec shift-scale:"),
        ("ultradelta:drop=0.99,step=0.01", "bad-recipe", "--codec ultradelta:"),
        ("ultradelta:gamma=-1", "bad-recipe", "--codec ultradelta:"),
        ("d-qrelo:rho=0", "bad-recipe", "--codec d-qrelo:"),
        ("dct:share=0", "bad-recipe", "--codec dct:"),
        ("dct:bits=1", "bad-recipe", "--codec dct:"),
        ("impart:ratio=0.5", "bad-recipe", "--codec impart:"),
        ("impart:beta=1", "bad-recipe", "--codec impart:"),
        ("lloyd:bits=9", "bad-recipe", "--codec lloyd:"),
        ("nm:keep=4", "bad-recipe", "--codec nm:"),
        ("quantize-and-drop:gamma=0", "bad-recipe", "--codec quantize-and-drop:"),
        ("quantize-and-drop:drop=1", "bad-recipe", "--codec quantize-and-drop:"),
        ("sparse:mask=seed", "bad-recipe", "--codec sparse:"),
        ("stratified:seed=-1", "bad-recipe", "--codec stratified:"),
        ("topk:keep=0", "bad-recipe", "--codec topk:"),
        ("bitdelta:scale=group", "bad-recipe", "--codec bitdelta:"),
        ("int:bits=9", "bad-recipe", "--codec int:"),
        ("int:group=-4", "bad-recipe", "--codec int:"),
        ("dare:drop=1", "bad-recipe", "--codec dare:"),
        ("dare:drop=nan", "bad-recipe", "--codec dare:"),
        ("dare:seed=-1", "bad-recipe", "--codec dare:"),
        ("dare:rescale=perhaps", "bad-recipe", "--codec dare:"),
        ("svd:rank=0", "bad-recipe", "--codec svd:"),
        ("svd:bits=inf", "bad-recipe", "--codec svd:"),
        ("svd:bits=nan", "bad-recipe", "--codec svd:"),
        ("lossless:level=23", "bad-recipe", "--codec lossless:"),
        ("exact:bits=1", "bad-recipe", "--codec exact"),
    ],
)
def test_wrong_specs_end_in_the_fix(spec, code, fix):
    with pytest.raises(DeltafoldError) as caught:
        parse_spec(spec)
    assert caught.value.code == code
    assert caught.value.fix.startswith(fix)


def test_two_methods_cannot_share_a_name():
    with pytest.raises(AssertionError, match="share the id"):
        method(BitDelta)


def test_defaults():
    assert parse_spec("bitdelta") == BitDelta(bits=1, scale="row", group=0)
    assert parse_spec("int") == Integer(bits=4, group=0)
    assert parse_spec(" svd : rank = 4 ".replace(" :", ":")) == Svd(rank=4)
    assert parse_spec("exact") == ExactMethod()
    assert parse_spec("lossless:level=4") == LosslessMethod(level=4)


def test_svd_by_bits_takes_no_more_than_it_was_given():
    shape = (64, 96)
    (term,) = Svd(bits=2.0).plan(shape, "BF16")
    stored = sum(s.nbytes for key, s in term.parts(shape).items() if not key.endswith("_unit"))
    assert stored * 8 <= 2.0 * 64 * 96
    assert stored * 8 > 2.0 * 64 * 96 - 16 * (64 + 96)


def test_dare_without_rescaling_only_drops():
    delta, context = checks.make_context((32, 64))
    ((term, parts),) = Dare(drop=0.5, rescale=False).encode(delta, context)
    found = term.decode(parts, (32, 64), context)
    kept = found != 0
    torch.testing.assert_close(found[kept], delta[kept], rtol=2e-3, atol=1e-6)
