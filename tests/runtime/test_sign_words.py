"""The CPU's own kernel in both of its layouts: applied to few tokens, rebuilt for many."""

from __future__ import annotations

import pytest
import torch

from deltafold.compress import parse_spec
from deltafold.compress.terms import Context
from deltafold.runtime.kernels import signs
from deltafold.runtime.kernels.forms import Target, product_form
from deltafold.runtime.kernels.native import lookup_columns, signs_library
from deltafold.runtime.kernels.reference import dense_delta
from deltafold.runtime.kernels.signs import SignWords

CPU = Target(torch.device("cpu"), torch.float32)
SPECS = [
    "bitdelta",
    "bitdelta:bits=2,group=24",
    "int:bits=3",
    "int:bits=5,group=64",
    "codebook:bits=2",
]


@pytest.mark.parametrize("each", [3, 4])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(1, 1), (32, 30), (33, 64), (70, 257)], ids=str)
def test_words_are_the_delta(
    each: int, spec: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = signs_library()
    if library is None or lookup_columns(library) < each:
        pytest.skip("this CPU has no such instructions")
    monkeypatch.setattr(signs, "lookup_columns", lambda _: each)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    encoded = parse_spec(spec).encode(delta, Context("w"))
    exact = dense_delta(encoded, shape, Context("w"))
    form = product_form(encoded, shape, Context("w"), CPU)
    assert isinstance(form, SignWords)
    assert form.each == each
    assert torch.allclose(form.dense(), exact, atol=1e-6)
    for tokens in (0, 1, 5):
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1))
        expected = (x.double() @ exact.double().T).float()
        assert torch.allclose(form.applied(x), expected, atol=1e-4)
        assert torch.allclose(form.rebuilt(x), expected, atol=1e-4)


def test_many_tokens_take_the_rebuilt_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    if signs_library() is None:
        pytest.skip("this machine has no kernel")
    taken: list[str] = []
    for way in ("applied", "rebuilt"):
        plain = getattr(SignWords, way)
        monkeypatch.setattr(
            SignWords,
            way,
            lambda self, x, way=way, plain=plain: taken.append(way) or plain(self, x),
        )
    # Pieces of one block, so that several are put together.
    monkeypatch.setattr(signs, "_PIECE", 32 * 20)
    delta = torch.randn(70, 20, generator=torch.Generator().manual_seed(0))
    encoded = parse_spec("int:bits=4").encode(delta, Context("w"))
    form = product_form(encoded, (70, 20), Context("w"), CPU)
    assert isinstance(form, SignWords)
    x = torch.randn(form.rebuilt_above + 1, 20)
    many, few = form.matmul(x), form.matmul(x[:-1])
    assert taken == ["rebuilt", "applied"]
    assert torch.allclose(many[:-1], few, atol=1e-4)
