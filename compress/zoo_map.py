"""How alike the deltas of a zoo are: cosines between them, on a sample of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from deltafold.compress.repo import DeltaRepo

_TENSORS: Final = 8
#: Largest tensor that is decoded, and how many of its entries are compared.
_ELEMENTS: Final = 2**26
_ENTRIES: Final = 2**16
_MOST_DELTAS: Final = 24


def cosines(repos: Mapping[str, DeltaRepo]) -> tuple[list[str], list[list[float]], list[str]]:
    """Cosines between deltas as they are decoded.

    Compared are up to eight tensors that all of the deltas hold in one shape, spread evenly over
    their names, and of each some 65,536 entries at equal distances. Deltas of which nothing can be
    decoded without the base, since all is stored exactly, are left out; so are those beyond the
    first 24.

    Args:
        repos: by name.

    Returns:
        Names of the deltas, a row of cosines for each (1 on the diagonal), and the tensors' names; all
        empty where fewer than two deltas have a tensor in common.
    """
    eligible = {name: _tensors(repo) for name, repo in sorted(repos.items())}
    names = [name for name, found in eligible.items() if found][:_MOST_DELTAS]
    if len(names) < 2:
        return [], [], []
    common = set.intersection(*(set(eligible[name].items()) for name in names))
    tensors = _spread(sorted(name for name, _ in common))
    if not tensors:
        return [], [], []
    products = torch.zeros(len(names), len(names), dtype=torch.float64)
    for tensor in tensors:
        rows = torch.stack([_sample(repos[n].delta(tensor, None)) for n in names]).double()
        products += rows @ rows.T
    lengths = products.diagonal().clamp_min(1e-300).sqrt()
    return names, (products / (lengths[:, None] * lengths[None, :])).tolist(), tensors


def _tensors(repo: DeltaRepo) -> dict[str, tuple[int, ...]]:
    """Name and shape of what can be decoded without the base."""
    return {
        name: tuple(entry.shape)
        for name, entry in repo.manifest.tensors.items()
        if entry.rel_error > 0
        and entry.base_shape == entry.shape
        and len(entry.shape) > 1
        and torch.Size(entry.shape).numel() <= _ELEMENTS
    }


def _sample(delta: torch.Tensor) -> torch.Tensor:
    return delta.reshape(-1)[:: max(delta.numel() // _ENTRIES, 1)].clone()


def _spread(names: Sequence[str]) -> list[str]:
    step = max(len(names) / _TENSORS, 1.0)
    return [names[int(i * step)] for i in range(min(_TENSORS, len(names)))]
