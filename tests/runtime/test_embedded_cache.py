"""Right-aligned key-value memory: appending, joining, leaving, growing and trimming."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from deltafold.runtime.embedded.cache import BatchCache
from deltafold.runtime.embedded.layer import COLUMN_STEP, KVLayer


def states(rows: int, columns: int, start: int = 1) -> torch.Tensor:
    """`[rows, 2 heads, columns, 3]`, every column its own number, every row its own hundred."""
    column = torch.arange(start, start + columns).float().view(1, 1, columns, 1)
    row = 100.0 * torch.arange(rows).view(rows, 1, 1, 1)
    return (row + column).expand(rows, 2, columns, 3).contiguous()


def layer(rows: int, columns: int) -> KVLayer:
    made = KVLayer()
    made.update(states(rows, columns), -states(rows, columns))
    return made


def seen(made: KVLayer, row: int) -> list[float]:
    assert made.keys is not None
    assert made.values is not None
    assert torch.equal(made.values, -made.keys)
    return made.keys[row, 0, :, 0].tolist()


def test_appending_returns_all_columns_and_grows_geometrically() -> None:
    made = layer(2, 5)
    capacities = set()
    for i in range(6, 1000):
        keys, values = made.update(states(2, 1, i), -states(2, 1, i))
        assert keys.shape == (2, 2, i, 3)
        assert torch.equal(keys, states(2, i))
        assert torch.equal(values, -keys)
        assert made.capacity[1] <= max(2 * i, 2 * COLUMN_STEP)
        capacities.add(made.capacity)
    assert len(capacities) < 12


def test_expected_columns_are_allocated_at_once() -> None:
    made = KVLayer(expected_columns=500)
    made.update(states(1, 10), -states(1, 10))
    first = made.capacity
    for i in range(49):
        made.update(states(1, 10, 11 + 10 * i), -states(1, 10, 11 + 10 * i))
    assert made.capacity == first
    assert made.columns == 500


def test_a_shorter_batch_joins_at_the_right_edge() -> None:
    made = layer(1, 6)
    made.join(layer(2, 4))
    assert seen(made, 0) == [1, 2, 3, 4, 5, 6]
    assert seen(made, 1) == [0, 0, 1, 2, 3, 4]
    assert seen(made, 2) == [0, 0, 101, 102, 103, 104]


def test_a_longer_batch_pushes_the_left_edge_out() -> None:
    made = layer(2, 3)
    made.join(layer(1, 200))
    assert made.columns == 200
    assert seen(made, 1) == [0] * 197 + [101, 102, 103]
    assert seen(made, 2) == list(range(1, 201))


def test_columns_that_become_visible_again_are_clean() -> None:
    made = layer(2, 10)
    assert made.keys is not None
    made.keys.fill_(torch.nan)
    assert made.values is not None
    made.values.fill_(torch.nan)
    made.update(states(2, 3), -states(2, 3))
    made.trim(10)  # the broken columns are left of the window now
    made.keep([], 1)  # and in a row that is free
    made.join(layer(1, 7))
    assert seen(made, 0) == [0, 0, 0, 0, 1, 2, 3]
    assert seen(made, 1) == [1, 2, 3, 4, 5, 6, 7]
    made.join(layer(1, 1))
    assert seen(made, 2) == [0, 0, 0, 0, 0, 0, 1]


def test_the_window_slides_without_growing_while_rows_leave_on_the_left() -> None:
    made = layer(2, 40)
    for i in range(41, 2000):
        made.update(states(2, 1, i), -states(2, 1, i))
        made.trim(1)
        assert seen(made, 0) == list(range(i - 39, i + 1))
    assert made.capacity[1] <= 2 * COLUMN_STEP


def test_a_buffer_that_is_far_too_long_shrinks() -> None:
    made = layer(1, 4000)
    made.trim(3990)
    for i in range(400):
        made.update(states(1, 1, 4001 + i), -states(1, 1, 4001 + i))
        made.trim(1)
    assert made.capacity[1] < 1000
    assert seen(made, 0) == list(range(4391, 4401))


def test_keys_and_values_may_differ_in_size() -> None:
    made = KVLayer()
    keys, values = made.update(torch.ones(1, 2, 3, 5), torch.ones(1, 2, 3, 4))
    assert keys.shape[-1] == 5
    assert values.shape[-1] == 4


def cache(rows: int, columns: int) -> BatchCache:
    made = BatchCache([])
    for index in range(2):
        made.update(states(rows, columns), -states(rows, columns), index)
    return made


def test_dropping_rows_fills_gaps_from_the_end_and_tells_the_order() -> None:
    made = cache(6, 2)
    order = made.drop({0, 3, 5}, 6)
    assert order == [4, 1, 2]
    for one in made.layers:
        assert [seen(one, i)[0] for i in range(3)] == [401, 101, 201]


def test_a_cache_is_a_transformers_cache_and_keeps_layers_in_step() -> None:
    made = cache(2, 3)
    assert isinstance(made, Cache)
    made.join(cache(1, 5))
    made.drop({2}, 3)
    made.trim(2)
    assert made.get_seq_length() == made.columns == 3
    assert [seen(one, 1) for one in made.layers] == [[101, 102, 103]] * 2
