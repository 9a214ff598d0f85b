"""A coded tensor whose scales can be trained: everything else in its terms stays as it is.

Decoding is plain torch, so gradients flow through `decode` itself once the scales are float32 tensors,
whatever terms they lie in: rows, columns and blocks name their inner terms' parts by a prefix. What is
written back has the term's own format. Instead of all scales, one factor for each term can be trained
that all tensors of a model have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltafold.compress.terms import Context, Encoded, Parts, Rows, is_exact, scaled

_KEY, _UNIT = "scales", "_unit"


@dataclass
class TrainableTensor:
    """The terms of one tensor.

    Attributes:
        encoded: as stored.
        shape: the fine-tune's.
        context: as decoding needs it.
        values: float32 leaves in place of stored scales, by the term's number and the part's key.
    """

    encoded: Sequence[Encoded]
    shape: tuple[int, ...]
    context: Context
    values: dict[tuple[int, str], torch.Tensor]

    @classmethod
    def open(
        cls, encoded: Sequence[Encoded], shape: tuple[int, ...], context: Context
    ) -> TrainableTensor | None:
        """None where no term has scales; tables, values and factors are not scales."""
        values = {
            (i, key): _loaded(parts, key).requires_grad_(True)
            for i, (_, parts) in enumerate(encoded)
            for key in _scale_keys(parts)
        }
        return cls(encoded, shape, context, values) if values else None

    def decode(self) -> torch.Tensor:
        """The difference that the scales now give, float32 of `shape`; gradients flow to `values`."""
        total = torch.zeros(self.shape)
        for i, (term, parts) in enumerate(self.encoded):
            own = {key: value for (j, key), value in self.values.items() if j == i}
            # The units are in the values.
            units = {
                key: torch.ones_like(part)
                for key, part in parts.items()
                if key.endswith(_UNIT) and key.removesuffix(_UNIT) in own
            }
            total = total + term.decode(parts | units | own, self.shape, self.context)
        return total

    def stored(self) -> list[Encoded]:
        """The terms with the scales as they now are, rounded to their format."""
        found = []
        for i, (term, parts) in enumerate(self.encoded):
            changed = dict(parts)
            for (j, key), value in self.values.items():
                if j == i:
                    changed |= _written(parts, key, value.detach())
            found.append(Encoded(term, changed))
        return found


@dataclass
class FactoredTensor:
    """The terms of one tensor, each times a factor that other tensors share.

    Attributes:
        encoded: as stored.
        shape: the fine-tune's.
        context: as decoding needs it.
        factors: float32 leaves without dimensions, one a term; tensors of fewer terms take the first.
        decoded: float32 of `shape`, one a term.
    """

    encoded: Sequence[Encoded]
    shape: tuple[int, ...]
    context: Context
    factors: list[torch.Tensor]
    decoded: list[torch.Tensor]

    @classmethod
    def open(
        cls,
        encoded: Sequence[Encoded],
        shape: tuple[int, ...],
        context: Context,
        factors: list[torch.Tensor],
    ) -> FactoredTensor | None:
        """None where a term is exact or has rows that are values; adds factors that are missing."""
        if any(is_exact(t) or (isinstance(t, Rows) and t.added) for t, _ in encoded):
            return None
        while len(factors) < len(encoded):
            factors.append(torch.ones((), requires_grad=True))
        decoded = [term.decode(parts, shape, context) for term, parts in encoded]
        return cls(encoded, shape, context, factors, decoded)

    @property
    def values(self) -> dict[tuple[int, str], torch.Tensor]:
        """The leaves that this tensor depends on."""
        return {(i, "factor"): f for i, f in enumerate(self.factors[: len(self.encoded)])}

    def decode(self) -> torch.Tensor:
        """The difference that the factors now give, float32 of `shape`."""
        pairs = zip(self.decoded, self.factors, strict=False)
        return sum((part * factor for part, factor in pairs), torch.zeros(self.shape))

    def stored(self) -> list[Encoded]:
        """The terms, the factors multiplied on."""
        pairs = zip(self.encoded, self.factors, strict=False)
        return [scaled(encoded, factor.item()) for encoded, factor in pairs]


def _scale_keys(parts: Parts) -> list[str]:
    return [k for k in parts if k.rpartition(".")[2] == _KEY and parts[k].numel()]


def _loaded(parts: Parts, key: str) -> torch.Tensor:
    values = parts[key].to(torch.float32, copy=True)
    units = parts.get(f"{key}{_UNIT}")
    return values if units is None else values * _by_first(units, values)


def _written(parts: Parts, key: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scales in the format that they had: float32, or float16 beside as many units as before."""
    units = parts.get(f"{key}{_UNIT}")
    if units is None:
        return {key: values.contiguous()}
    largest = values.abs().reshape(len(units), -1).amax(dim=1)
    units = torch.where(largest > 0, largest, torch.ones_like(largest))
    half = (values / _by_first(units, values)).to(torch.float16).contiguous()
    return {key: half, f"{key}{_UNIT}": units}


def _by_first(units: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One unit, or one for each entry of the first dimension."""
    return units.reshape(-1, *[1] * (values.dim() - 1))
