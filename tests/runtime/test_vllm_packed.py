"""Slots of packed deltas, without vLLM: the GPU kernels at a layer, natively or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from deltafold.compress.methods import parse_spec
from deltafold.compress.terms import Blocks, Codes, Context, Encoded, Planes, Sparse, Term
from deltafold.runtime.kernels.base import Sum, leaves
from deltafold.runtime.kernels.reference import dense_delta
from deltafold.runtime.vllm.hooks import Content, LayerHook
from deltafold.runtime.vllm.needs import Needs
from deltafold.runtime.vllm.packed import PackedSlots
from deltafold.runtime.vllm.places import packed_form, places_of_forms, places_of_terms
from deltafold.runtime.vllm.routes import Window
from deltafold.runtime.vllm.rows import StepRows
from deltafold.runtime.vllm.tiles import Tiles
from deltafold.runtime.vllm.variant import each_tensor
from deltafold.runtime.vllm.windows import Piece

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, M = 96, 64
WHOLE = Window(0, N, 0, M)
#: As large tensors are coded: in blocks of 40 rows, the last one shorter.
BLOCKS: dict[str, Term] = {
    "blocks of planes": Planes(bits=2),
    "blocks of groups": Codes(bits=3, group=32),
    "blocks of dare": Sparse(mask="bitmap"),
}
#: Slices of one, two and four bits and of sums of them, lists, strata, and factors.
SPECS = [
    "bitdelta",
    "bitdelta:bits=2,group=32",
    "int:bits=2",
    "int:bits=3",
    "int:bits=4,group=32",
    "dare:drop=0.9",
    "svd:rank=4",
    *BLOCKS,
]
WINDOWS = [WHOLE, Window(16, 48, 0, M), Window(0, N, 32, 32), Window(5, 40, 0, M)]


def encoded(spec: str, seed: int = 1) -> list[Encoded]:
    noise = torch.Generator().manual_seed(seed)
    base = torch.randn(N, M, generator=noise)
    variant = base + torch.randn(N, M, generator=noise) * 0.1
    context, delta = Context("w", base, variant), variant - base
    if spec not in BLOCKS:
        return parse_spec(spec).encode(delta, context)
    if "dare" in spec:
        delta *= torch.rand(N, M, generator=noise) < 0.1
    # Blocks have units of their own, as their largest levels differ.
    delta[40:80] *= 3
    return [Blocks(40, (BLOCKS[spec],)).encode(delta, context)]


def context() -> Context:
    return Context("w", torch.zeros(N, M))


def forms_of(terms: list[Encoded], window: Window = WHOLE, *, looks_up: bool = False):
    return packed_form(terms, (N, M), context(), torch.float32, window, looks_up=looks_up)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def dense_of(terms: list[Encoded]) -> torch.Tensor:
    return dense_delta(terms, (N, M), context())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_room_is_known_before_and_holds_what_comes(spec, window):
    terms = encoded(spec)
    found = forms_of(terms, window)
    assert found is not None
    if "dare" not in spec:  # only the payload tells how long lists are
        told = places_of_terms(tuple(e.term for e in terms), (N, M), window, looks_up=False)
        assert told is not None
        assert dict(told) == dict(places_of_forms(found))
    slots = slots_for([(0, window.rows, terms, window)])
    slots.put(0, [Piece(0, window.rows, Sum(found))])
    x = torch.randn(5, window.columns)
    total = sum(piece.form.matmul(x.to(DEVICE)) for piece in slots.forms(0))
    expected = x @ window.of(dense_of(terms)).T
    near = 5e-3 if "dare" in spec else 2e-4  # lists hold float16
    torch.testing.assert_close(total.cpu(), expected, atol=near, rtol=near)


def slots_for(wanted: list[tuple[int, int, list[Encoded], Window]], slots: int = 1) -> PackedSlots:
    needs = Needs()
    for row, rows, terms, window in wanted:
        needs.add((row, rows), places_of_forms(forms_of(terms, window)))
    return PackedSlots(needs.places, slots, DEVICE, torch.float32)


def merged_hook(specs: list[str], slots: int) -> tuple[StepRows, LayerHook, PackedSlots]:
    """A layer of two tensors, one below the other, with room for all specs."""
    rows = StepRows.make(64, 64, DEVICE)
    hook = LayerHook("gate_up", rows, slots, is_head=False)
    wanted = [(row, N, encoded(spec), WHOLE) for spec in specs for row in (0, N)]
    packed = slots_for(wanted, slots)
    hook.allocate(
        (2 * N, M),
        torch.float32,
        DEVICE,
        biased=True,
        dense=False,
        packed=packed,
        tiles=Tiles(slots),
    )
    return rows, hook, packed


def content(spec: str, seed: int) -> tuple[Content, torch.Tensor]:
    """Both tensors of one variant, and its whole delta."""
    pieces, dense = [], []
    for part in range(2):
        terms = encoded(spec, seed + part)
        found = forms_of(terms)
        assert found is not None
        pieces.append(Piece(part * N, N, Sum(found)))
        dense.append(dense_of(terms))
    bias = torch.full((2 * N,), float(seed))
    return Content(pieces=pieces, vectors={"bias": bias}), torch.cat(dense)


def test_a_merged_layer_adds_each_row_its_own_delta_whatever_is_swapped_in():
    rows, hook, packed = merged_hook(SPECS, 3)
    mapping = [1, -1, 0, 2, 1, -1, 1]
    x = torch.randn(len(mapping), M, device=DEVICE)
    kept = packed.nbytes
    for seeds, specs in (
        ((10, 20, 30), ("bitdelta", "int:bits=4,group=32", "dare:drop=0.9")),
        ((40, 50, 60), ("svd:rank=4", "int:bits=3", "bitdelta:bits=2,group=32")),
    ):
        deltas = []
        for slot, (seed, spec) in enumerate(zip(seeds, specs, strict=True)):
            mine, dense = content(spec, seed)
            hook.put(slot, mine)
            deltas.append(dense.to(DEVICE))
        rows.set(mapping, [])
        y = torch.randn(len(mapping), 2 * N, device=DEVICE)
        before = y.clone()
        hook.add_products(y, x, biased=True)
        for row, slot in enumerate(mapping):
            if slot < 0:
                assert torch.equal(y[row], before[row]), "rows of the base are never visited"
            else:
                own = before[row] + deltas[slot] @ x[row] + seeds[slot]
                near = 5e-3 if specs[slot].startswith("dare") else 5e-4
                torch.testing.assert_close(y[row], own, atol=near, rtol=near)
    assert packed.nbytes == kept, "nothing is allocated after the start"
    hook.put(1, None)
    y = torch.zeros(len(mapping), 2 * N, device=DEVICE)
    hook.add_products(y, x, biased=True)
    assert not y[[0, 4, 6]].any()
    assert y[2].any()


def test_a_long_prompt_goes_through_what_lies_in_the_slot(monkeypatch):
    from deltafold.runtime.vllm import hooks

    rows, hook, _ = merged_hook(["int:bits=3"], 2)
    mine, dense = content("int:bits=3", 7)
    hook.put(1, mine)
    rows.set([-1] + [1] * 40, [])
    x = torch.randn(41, M, device=DEVICE)
    short, long = torch.zeros(41, 2 * N, device=DEVICE), torch.zeros(41, 2 * N, device=DEVICE)
    hook.add_products(short, x, biased=False)
    monkeypatch.setattr(hooks, "LONG", 39)
    hook.add_products(long, x, biased=False)
    torch.testing.assert_close(short, long, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(long[1:], x[1:] @ dense.to(DEVICE).T, atol=5e-4, rtol=5e-4)
    assert not long[0].any()


def test_a_table_looks_up_each_tokens_own_rows():
    terms = encoded("int:bits=3")
    assert forms_of(encoded("svd:rank=4"), looks_up=True) is None, "factors have no rows to look up"
    rows = StepRows.make(16, 16, DEVICE)
    hook = LayerHook("embed", rows, 2, is_head=True)
    packed = slots_for([(0, N, terms, WHOLE)], 2)
    hook.allocate(
        (N, M), torch.float32, DEVICE, biased=False, dense=False, packed=packed, tiles=Tiles(2)
    )
    hook.put(1, Content(pieces=[Piece(0, N, Sum(forms_of(terms, looks_up=True)))]))
    rows.set([0, 1, -1, 1], [1, -1])
    ids = torch.tensor([3, 90, 7, 0], device=DEVICE)
    y = torch.zeros(4, M, device=DEVICE)
    hook.add_rows(y, ids)
    expected = dense_of(terms)[ids.cpu()] * torch.tensor([0.0, 1, 0, 1]).unsqueeze(1)
    torch.testing.assert_close(y.cpu(), expected, atol=1e-5, rtol=1e-5)
    # The same memory is multiplied by where the table is tied to the head.
    x, logits = torch.randn(2, M, device=DEVICE), torch.zeros(2, N, device=DEVICE)
    hook.add_products(logits, x, biased=False)
    torch.testing.assert_close(logits[0].cpu(), dense_of(terms) @ x[0].cpu(), atol=2e-4, rtol=2e-4)
    assert not logits[1].any()


def test_what_has_no_room_is_seen():
    needs, large = Needs(), Needs()
    needs.add((0, N), places_of_forms(forms_of(encoded("bitdelta"))))
    for spec in ("bitdelta", "bitdelta:bits=2", "svd:rank=4"):
        large.add((0, N), places_of_forms(forms_of(encoded(spec))))
    assert needs.lacking(large)
    assert not large.lacking(needs)
    assert needs.lacking(Needs(dense=True))
    elsewhere = Needs()
    elsewhere.add((N, N), places_of_forms(forms_of(encoded("bitdelta"))))
    assert large.lacking(elsewhere)


def test_sizes_are_the_same_without_memory():
    needs = Needs()
    for spec in SPECS:
        needs.add((0, N), places_of_forms(forms_of(encoded(spec))))
    real = PackedSlots(needs.places, 3, DEVICE, torch.float32)
    assert PackedSlots(needs.places, 3, torch.device("meta"), torch.float32).nbytes == real.nbytes
    packed = sum(
        leaf.nbytes for spec in SPECS for f in forms_of(encoded(spec)) for leaf, _ in leaves(f)
    )
    assert real.nbytes < 3 * packed * 1.1 + 3 * 4096


def test_every_tensor_of_a_variant_moves_to_other_memory():
    mine, _ = content("int:bits=3", 3)
    moved, seen = each_tensor(mine, lambda t: t.clone()), []
    each_tensor(mine, lambda t: seen.append(t) or t)
    assert len(seen) == 2 * 2 * 2 + 1, "words and levels of two slices of two tensors, and a bias"
    x = torch.randn(2, M)
    for before, after in zip(mine.pieces, moved.pieces, strict=True):
        assert torch.equal(before.form.matmul(x), after.form.matmul(x))
    assert not {t.data_ptr() for t in seen} & tensors_of(moved)


def tensors_of(thing: Content) -> set[int]:
    found: set[int] = set()
    each_tensor(thing, lambda t: found.add(t.data_ptr()) or t)
    return found


def test_a_step_is_sorted_once_at_an_address_that_stays():
    slots = torch.full((32,), -1, device=DEVICE)
    tiles = Tiles(2)
    slots[:3] = torch.tensor([1, 0, 1], device=DEVICE)
    first = tiles.of(slots[:8], 1)
    address = first.order.data_ptr()
    assert int(first.length.sum()) == 3
    slots[:3] = -1
    assert int(tiles.of(slots[:8], 1).length.sum()) == 3, "one sorting a step"
    again = tiles.of(slots[:8], 2)
    assert again.order.data_ptr() == address
    assert int(again.length.sum()) == 0
