"""Optimal brain surgery on one weight matrix: settle columns one by one, mend the later ones.

A layer `y = x W^T` whose inputs have the second moments `H` loses `tr(E H E^T)` where its weights are
off by `E`. When column j is settled at other values than it had, the columns after it can take up part
of that error. With `H^-1 = U^T U`, U upper triangular, the best they can do is

    w_k -= (w_j - q_j) / U_jj * U_jk        for all k > j

Sources: Hassibi and Stork, "Second order derivatives for network pruning" (NeurIPS 1992); Frantar and
Alistarh, SparseGPT (arXiv 2301.00774), section 3, and GPTQ (arXiv 2210.17323), section 3, for the one
factor that serves all rows and all steps. Nothing here knows whether columns are quantised, pruned or
taken from another model: that is the caller's `choose`.

Shape letters: N rows (output features), M columns (input features).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import torch

from deltafold.compress.errors import DeltafoldError

#: Settles one column of a group: its place in the group and its values `[N]` by now -> its values.
Settle: TypeAlias = Callable[[int, torch.Tensor], torch.Tensor]
#: Looks at a group before its first column is settled: its first column's number, its values
#: `[N, group]` by now and its part `[group]` of U's diagonal.
Choose: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], Settle]

#: Columns whose errors are gathered before they reach the columns behind them, in one product.
BLOCK: Final = 128


def damped(second_moment: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    """Second moments that can be inverted.

    Args:
        second_moment: float `[M, M]`, symmetric, the mean of `x x^T` (any positive multiple will do).
        damp: share of the mean of the diagonal that is added to it.

    Returns:
        float64 `[M, M]`. Inputs that were always zero get a diagonal of 1 before damping: their
        columns neither matter nor take up any error.

    Raises:
        DeltafoldError: `not-finite`.
    """
    assert second_moment.dim() == 2
    assert second_moment.shape[0] == second_moment.shape[1]
    assert damp > 0
    out = second_moment.to(torch.float64, copy=True)
    if not bool(torch.isfinite(out).all()):
        raise DeltafoldError(
            "not-finite",
            "the second moments of a layer's inputs have NaN or infinite entries.",
            fix="check the model that the calibration set was run through",
        )
    diagonal = out.diagonal()
    dead = diagonal <= 0
    # A dead input has no products with others either; rounding may have left some.
    out[dead] = 0
    out[:, dead] = 0
    diagonal[dead] = 1
    diagonal += damp * diagonal.mean()
    return out


def inverse_cholesky(hessian: torch.Tensor) -> torch.Tensor:
    """The upper triangular U of `H^-1 = U^T U`.

    Args:
        hessian: float `[M, M]`, symmetric and positive definite, as `damped` returns it.

    Returns:
        float64 `[M, M]`; `U_jj^2` is the variance of input j that earlier settled columns leave.

    Raises:
        DeltafoldError: `not-finite` where `hessian` is not positive definite.
    """
    # With J the reversal of order: J H J = L L^T gives H^-1 = (J L^-1 J)^T (J L^-1 J), and turning a
    # lower triangular matrix both ways makes it upper. One factorisation, and H is never inverted.
    lower, info = torch.linalg.cholesky_ex(hessian.to(torch.float64).flip(0, 1))
    if int(info) != 0:
        raise DeltafoldError(
            "not-finite",
            "the second moments of a layer's inputs are not positive definite.",
            fix="use more calibration data, or more damping",
        )
    identity = torch.eye(len(lower), dtype=torch.float64, device=lower.device)
    inverse: torch.Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1)


def sweep(
    values: torch.Tensor, upper: torch.Tensor, choose: Choose, *, group: int = 1, block: int = BLOCK
) -> torch.Tensor:
    """Settle all columns from left to right, each one's error pushed to those behind it.

    Args:
        values: float32 `[N, M]`, what the columns are worth before; left alone.
        upper: `[M, M]` from `inverse_cholesky`.
        choose: decides for a group at a time, and then column by column.
        group: columns that are looked at together, any number; the last group may have fewer.
        block: columns whose errors reach those behind the block in one product; it changes the
            speed, not the result.

    Returns:
        float32 `[N, M]`, the settled values.
    """
    # Columns lie in memory as rows: each step goes through whole ones.
    work, upper = values.to(torch.float32).T.contiguous().clone(), upper.to(torch.float32)
    columns, diagonal = len(work), upper.diagonal()
    assert upper.shape == (columns, columns)
    settle: Settle | None = None
    for start, stop in _blocks(columns, group, block):
        errors = torch.zeros_like(work[start:stop])
        for j in range(start, stop):
            if j % group == 0:
                last = min(j + group, columns)
                settle = choose(j, work[j:last].T.clone(), diagonal[j:last])
            assert settle is not None
            settled = settle(j % group, work[j].clone())
            error = errors[j - start] = (work[j] - settled) / diagonal[j]
            work[j] = settled
            work[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return work.T.contiguous()


def _blocks(columns: int, group: int, block: int) -> Iterator[tuple[int, int]]:
    """Where blocks start and stop: whole groups where these are smaller, parts of one otherwise."""
    assert group >= 1
    assert block >= 1
    span = max(group, block // group * group)
    for first in range(0, columns, span):
        last = min(first + span, columns)
        for start in range(first, last, block if group > block else span):
            yield start, min(start + block, last) if group > block else last
