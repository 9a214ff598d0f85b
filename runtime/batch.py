"""Which rows of the running batch belong to which variant.

The layers' hooks read this while a forward pass runs. Rows of the base belong to no group, so no
delta code ever visits them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deltafold.compress import DeltafoldError
from deltafold.runtime.host import Row

if TYPE_CHECKING:
    from deltafold.runtime.loading import LoadedVariant


@dataclass(frozen=True)
class Group:
    """The rows of one variant.

    Attributes:
        variant: whose delta to add.
        rows: int64 `[r]` batch rows, on the model's device.
        scales: float32 `[r]` factors of the delta; None where all are 1.
    """

    variant: LoadedVariant
    rows: torch.Tensor
    scales: torch.Tensor | None


class BatchState:
    """The current batch, shared by all hooks of one model; used by one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.groups: tuple[Group, ...] = ()
        self.size = 0

    @contextmanager
    def running(self, rows: Sequence[tuple[LoadedVariant | None, float]]) -> Iterator[None]:
        """Within it, batch row i runs `rows[i]`."""
        assert not self.groups, "batches do not nest"
        self.size = len(rows)
        self.groups = self._grouped(rows)
        try:
            yield
        finally:
            self.groups, self.size = (), 0

    def rows_of(self, group: Group, leading: int, where: str) -> tuple[torch.Tensor, int]:
        """A group's rows in a tensor whose first dimension is `leading`, and rows per batch row.

        Most modules see `[B, T, ...]`; some see all tokens in one dimension `[B * T, ...]`.
        """
        if leading == self.size:
            return group.rows, 1
        if self.size and leading % self.size == 0 and leading:
            each = leading // self.size
            within = torch.arange(each, device=group.rows.device)
            return (group.rows.unsqueeze(1) * each + within).reshape(-1), each
        raise DeltafoldError(
            "engine-unsupported",
            f"{where} does not keep requests apart: its input has {leading} rows for a batch of "
            f"{self.size}.",
            fix="restore this variant and serve it by itself",
        )

    def _grouped(self, rows: Sequence[tuple[LoadedVariant | None, float]]) -> tuple[Group, ...]:
        members: dict[int, list[int]] = {}
        for i, (variant, scale) in enumerate(rows):
            # Scale 0 is the base itself.
            if variant is not None and scale != 0:
                members.setdefault(id(variant), []).append(i)
        groups = []
        for indices in members.values():
            variant = rows[indices[0]][0]
            assert variant is not None
            factors = [rows[i][1] for i in indices]
            plain = all(f == 1 for f in factors)
            groups.append(
                Group(
                    variant=variant,
                    rows=torch.tensor(indices, device=self._device),
                    scales=None
                    if plain
                    else torch.tensor(factors, dtype=torch.float32, device=self._device),
                )
            )
        return tuple(groups)


def loaded_rows(rows: Sequence[Row]) -> list[tuple[LoadedVariant | None, float]]:
    """Rows as the engine names them, as the loaded variants that they stand for."""
    from deltafold.runtime.loading import Handle

    out: list[tuple[LoadedVariant | None, float]] = []
    for variant, scale in rows:
        assert variant is None or isinstance(variant, Handle)
        out.append((None if variant is None else variant.loaded, scale))
    return out
