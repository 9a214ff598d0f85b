"""Columns that changed: what a step on chosen input features alone leaves, say of some neurons."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.terms.base import (
    Checked,
    Context,
    Encoded,
    Parts,
    PartSpec,
    Term,
    register,
    rows_and_columns,
)
from deltafold.compress.terms.codes import Codes


@register
@dataclass(frozen=True)
class Columns(Checked):
    """Columns of a tensor read as a matrix `[N, M]`.

    Parts: `index` int32 `[count]`, ascending; `inner.*`, the inner term's parts for a tensor
    `[N, count]`. Never an exact term: the inner one has no base to go by.

    Attributes:
        inner: how the changed columns are coded.
        count: changed columns; -1 until encoded.
    """

    id: ClassVar[str] = "columns"
    version: ClassVar[int] = 1

    inner: Term = field(default_factory=Codes)
    count: int = -1

    def __post_init__(self) -> None:
        self._require(isinstance(self.inner, Term), "inner must be a term")
        self._require(self.count >= -1, "count must not be negative")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """Code the columns that are not zero throughout."""
        matrix = delta.reshape(rows_and_columns(tuple(delta.shape)))
        index = (matrix != 0).any(dim=0).nonzero().reshape(-1)
        chosen = matrix[:, index].contiguous()
        inner = self.inner.encode(chosen, Context(context.name, variant=chosen))
        parts = {"index": index.to(torch.int32)}
        parts |= {f"inner.{key}": value for key, value in inner.parts.items()}
        return Encoded(replace(self, inner=inner.term, count=index.numel()), parts)

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """Zero but for the changed columns, float32 of `shape`."""
        rows, columns = rows_and_columns(shape)
        out = torch.zeros(rows, columns)
        index = self.index(parts, columns, context.name)
        out[:, index] = self.chosen(parts, rows, context.name)
        return out.reshape(shape)

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part; before encoding every column is taken as changed."""
        rows, columns = rows_and_columns(shape)
        count = columns if self.count < 0 else self.count
        inner = self.inner.parts((rows, count))
        specs = {f"inner.{key}": spec for key, spec in inner.items()}
        return {"index": PartSpec(torch.int32, (count,)), **specs}

    def index(self, parts: Parts, columns: int, name: str) -> torch.Tensor:
        """int64 `[count]`, checked."""
        index = parts["index"].long()
        ascending = bool((index[1:] > index[:-1]).all())
        if index.numel() and not (ascending and index[0] >= 0 and index[-1] < columns):
            raise DeltafoldError(
                "bad-manifest",
                f"{name}: the index of columns does not ascend within {columns} columns.",
            )
        return index

    def chosen(self, parts: Parts, rows: int, name: str) -> torch.Tensor:
        """The changed columns, float32 `[N, count]`."""
        own = {k.removeprefix("inner."): v for k, v in parts.items() if k.startswith("inner.")}
        return self.inner.decode(own, (rows, self.count), Context(name))
