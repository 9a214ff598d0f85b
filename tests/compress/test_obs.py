"""The sweep that prunes, quantises or mixes columns and mends the later ones."""

from __future__ import annotations

import pytest
import torch

from deltafold.compress import DeltafoldError
from deltafold.compress.obs import damped, inverse_cholesky, sweep


def moments(columns: int, tokens: int = 200, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=draw)
    x = torch.randn(tokens, columns, generator=draw) @ mixed
    return x.T @ x / tokens


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def rounding(start, columns, diagonal):
    return lambda j, column: column.round()


def loss(error: torch.Tensor, second_moment: torch.Tensor) -> float:
    return torch.trace(error.double() @ second_moment.double() @ error.double().T).item()


def test_the_factor_is_upper_and_gives_the_inverse():
    hessian = damped(moments(30))
    upper = inverse_cholesky(hessian)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(hessian))


def test_damping_adds_a_share_of_the_mean_and_wakes_dead_inputs():
    given = torch.tensor([[3.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
    expected = torch.tensor([[3.2, 0.0, 1.0], [0.0, 1.2, 0.0], [1.0, 0.0, 2.2]])
    torch.testing.assert_close(damped(given, 0.1), expected.double())
    assert given[1, 1] == 0


def test_without_correlations_nothing_is_pushed_on():
    values = matrix(6, 40) * 3
    upper = inverse_cholesky(torch.eye(40))
    assert torch.equal(sweep(values, upper, rounding), values.round())


@pytest.mark.parametrize(("group", "block"), [(1, 1), (4, 8), (4, 128), (3, 7), (10, 4), (26, 5)])
def test_blocks_and_groups_change_the_speed_alone(group, block):
    values, upper = matrix(6, 26) * 20, inverse_cholesky(damped(moments(26)))
    plain = sweep(values, upper, rounding, block=26)
    found = sweep(values, upper, rounding, group=group, block=block)
    assert (found != plain).float().mean().item() < 0.05  # sums in another order may round a tie


def test_the_later_columns_settle_where_least_squares_puts_them():
    # Settle column 0 alone, at zero: the others must take the best values for what is left.
    second_moment = moments(12)
    values, upper = matrix(5, 12), inverse_cholesky(second_moment.double())

    def choose(start, columns, diagonal):
        return lambda j, column: torch.zeros_like(column) if start + j == 0 else column

    found = sweep(values, upper, choose)
    others = second_moment[1:, 1:].double()
    best = torch.linalg.solve(others, second_moment[1:, :1].double() @ values[:, :1].T.double()).T
    torch.testing.assert_close(found[:, 1:].double(), values[:, 1:] + best, rtol=1e-3, atol=1e-4)


def test_the_sweep_beats_settling_alone():
    second_moment, values = moments(64), matrix(16, 64) * 2
    found = sweep(values, inverse_cholesky(damped(second_moment)), rounding)
    assert torch.equal(found, found.round())
    assert loss(values - found, second_moment) < 0.5 * loss(values - values.round(), second_moment)


def test_a_group_is_seen_as_the_columns_before_it_left_it():
    values, upper = matrix(4, 8), inverse_cholesky(damped(moments(8)))
    seen = []

    def choose(start, columns, diagonal):
        seen.append((start, columns, diagonal))
        return lambda j, column: column

    assert torch.equal(sweep(values, upper, choose, group=3), values)
    assert [start for start, _, _ in seen] == [0, 3, 6]
    assert torch.equal(torch.cat([c for _, c, _ in seen], 1), values)
    assert torch.equal(torch.cat([d for _, _, d in seen]), upper.diagonal().float())


@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_moments_that_are_no_numbers_are_refused(entry):
    with pytest.raises(DeltafoldError) as caught:
        damped(torch.full((2, 2), entry))
    assert caught.value.code == "not-finite"
    with pytest.raises(DeltafoldError) as caught:
        inverse_cholesky(-torch.eye(3))
    assert caught.value.code == "not-finite"
