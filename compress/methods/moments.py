"""What calibrated methods share: a delta beside the second moments of its layer's inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from deltafold.compress.terms import Context, rows_and_columns


class Weighted(NamedTuple):
    """A delta turned so that its columns meet the layer's inputs.

    Attributes:
        matrix: float32 `[out, in]`.
        moment: float32 `[in, in]`, the mean of `x x^T`.
        turned: whether that is the transpose of the tensor.
    """

    matrix: torch.Tensor
    moment: torch.Tensor
    turned: bool

    def error(self, decoded: torch.Tensor) -> float:
        """Mean over tokens of the squared error of the layer's outputs, `tr(E H E^T)`."""
        off = (self.matrix - decoded).to(torch.float64)
        return float(((off @ self.moment.to(torch.float64)) * off).sum())


def weighted(delta: torch.Tensor, context: Context) -> Weighted | None:
    """The delta with its second moments; None where nothing is known of its layer's inputs.

    That is so of embeddings, vectors, convolutions and whatever the model fuses or never called, and
    where no calibration was run at all.
    """
    evidence = context.evidence
    if evidence is None:
        return None
    matrix = delta.reshape(rows_and_columns(tuple(delta.shape)))
    if evidence.second_moment is not None:
        assert evidence.second_moment.shape[0] == matrix.shape[1]
        return Weighted(matrix, evidence.second_moment, False)
    if evidence.row_moment is not None:
        assert evidence.row_moment.shape[0] == matrix.shape[0]
        return Weighted(matrix.T.contiguous(), evidence.row_moment, True)
    return None
