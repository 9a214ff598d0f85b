"""Codes whose errors are mended by the columns behind them: rounding after GPTQ (arXiv 2210.17323).

Columns are rounded one by one; what each loses of the layer's outputs is taken up, as well as it can
be, by those that are not rounded yet (`compress/obs.py`).
"""

from __future__ import annotations

import torch

from deltafold.compress.obs import Settle, damped, inverse_cholesky, sweep
from deltafold.compress.terms.grids import Coded, Grid, Scales


def code_with_feedback(
    values: torch.Tensor,
    moment: torch.Tensor,
    grid: Grid,
    *,
    damp: float = 0.01,
    ordered: bool = False,
) -> Coded:
    """Codes of a matrix with the least error at a layer's outputs that a sweep finds.

    A group's scales are fitted when its first column is reached, to what its columns are worth by then.

    Args:
        values: float32 `[N, M]`.
        moment: float `[M, M]`, second moments of the inputs.
        grid: how rows are coded.
        damp: see `obs.damped`.
        ordered: round the columns with the largest second moments first (GPTQ's act-order); all scales
            are then fitted beforehand.
    """
    if not values.numel():
        return grid.code(values)
    return _ordered(values, moment, grid, damp) if ordered else _grouped(values, moment, grid, damp)


def _grouped(values: torch.Tensor, moment: torch.Tensor, grid: Grid, damp: float) -> Coded:
    rows, columns = values.shape
    width = grid.width(columns)
    one = Grid(grid.bits, 0, grid.symmetric, grid.scale_format)
    codes = values.new_zeros(rows, columns, dtype=torch.uint8)
    fitted: list[Scales] = []

    def choose(start: int, now: torch.Tensor, diagonal: torch.Tensor) -> Settle:
        scales = one.fit(now)
        fitted.append(scales)

        def settle(j: int, column: torch.Tensor) -> torch.Tensor:
            coded = one.quantise(column.unsqueeze(1), scales)
            codes[:, start + j] = coded.codes[:, 0]
            return one.values(coded)[:, 0]

        return settle

    sweep(values, inverse_cholesky(damped(moment, damp)), choose, group=width)
    step, zero = (torch.cat(parts, dim=1) for parts in zip(*fitted, strict=True))
    return Coded(codes, Scales(step, zero))


def _ordered(values: torch.Tensor, moment: torch.Tensor, grid: Grid, damp: float) -> Coded:
    rows, columns = values.shape
    order = moment.diagonal().argsort(descending=True, stable=True)
    scales = grid.fit(values)
    step, zero = grid.spread(scales, columns)
    one = Grid(grid.bits, 0, grid.symmetric, grid.scale_format)
    codes = values.new_zeros(rows, columns, dtype=torch.uint8)

    def choose(start: int, now: torch.Tensor, diagonal: torch.Tensor) -> Settle:
        def settle(j: int, column: torch.Tensor) -> torch.Tensor:
            k = order[start + j]
            own = Scales(step[:, k : k + 1], zero[:, k : k + 1].to(torch.uint8))
            coded = one.quantise(column.unsqueeze(1), own)
            codes[:, k] = coded.codes[:, 0]
            return one.values(coded)[:, 0]

        return settle

    hessian = damped(moment, damp)[order][:, order]
    sweep(values[:, order], inverse_cholesky(hessian), choose)
    return Coded(codes, scales)
