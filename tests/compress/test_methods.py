"""Methods: their specs, what they plan, and what they then do."""

from __future__ import annotations

import pytest
import term_checks as checks
import torch

from deltafold.compress import METHODS, DeltafoldError, Method, parse_spec
from deltafold.compress.evidence import NEEDS
from deltafold.compress.methods import BitDelta, Dare, ExactMethod, Integer, LosslessMethod, Svd
from deltafold.compress.methods.base import method, spec_of
from deltafold.compress.terms import Lossless, LosslessStreams, Sparse

SPECS = [
    "bitdelta",
    "bitdelta:scale=tensor",
    "bitdelta:bits=4,group=128",
    "bitdelta:bits=8,scale=row",
    "dare",
    "dare:drop=0.5,seed=3,rescale=false",
    "exact",
    "int",
    "int:bits=8",
    "int:bits=2,group=16",
    "lossless",
    "lossless:level=9",
    "svd",
    "svd:rank=4",
    "svd:bits=1",
]
every_spec = pytest.mark.parametrize("spec", SPECS)


def test_every_method_has_a_spec():
    assert {spec.partition(":")[0] for spec in SPECS} == set(METHODS)


@every_spec
def test_specs_come_back(spec):
    chosen = parse_spec(spec)
    assert isinstance(chosen, Method)
    assert parse_spec(spec_of(chosen)) == chosen


@every_spec
@pytest.mark.parametrize("shape", checks.SHAPES, ids=str)
def test_the_plan_is_what_is_done(spec, shape):
    chosen = parse_spec(spec)
    delta, context = checks.make_context(shape)
    planned = chosen.plan(shape, "BF16")
    encoded = chosen.encode(delta, context)
    assert [type(t) for t in planned] == [type(e.term) for e in encoded]
    for term, (_, parts) in zip(planned, encoded, strict=True):
        if isinstance(term, Sparse | Lossless | LosslessStreams):
            continue  # how many bytes these take depends on the data
        written = {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()}
        assert written == {k: tuple(s) for k, s in term.parts(shape).items()}


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
        ("bitdelta:bits", "bad-recipe", "--codec bitdelta:bits=1,scale=row,group=0"),
        ("bitdelta:size=3", "bad-recipe", "--codec bitdelta:"),
        ("bitdelta:bits=9", "bad-recipe", "--codec bitdelta:"),
        ("bitdelta:bits=four", "bad-recipe", "--codec bitdelta:"),
        ("bitdelta:bits=2.5", "bad-recipe", "--codec bitdelta:"),
        ("bitdelta:scale=column", "bad-recipe", "--codec bitdelta:"),
        ("bitdelta:scale=group", "bad-recipe", "--codec bitdelta:"),
        ("int:bits=3", "bad-recipe", "--codec int:"),
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
