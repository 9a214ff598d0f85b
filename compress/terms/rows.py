"""Rows that changed, and rows beyond the base.

An embedding table is often bigger than the rest of a delta, and a fine-tune may have touched few of
its rows. The changed rows are coded by an inner term as one smaller matrix; rows that the base lacks
(added tokens) are stored as values, since there is nothing to subtract.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from deltafold.compress import dtypes
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.terms.base import (
    Checked,
    Context,
    Encoded,
    ExactTerm,
    Parts,
    PartSpec,
    Term,
    is_exact,
    register,
)
from deltafold.compress.terms.codes import Codes


@register
@dataclass(frozen=True)
class Rows(Checked):
    """Rows of a tensor along its first dimension.

    Parts: `index` int32 `[count]`, ascending; `inner.*`, the inner term's parts for a tensor
    `[count, ...]`; `added` `[added, ...]` in the fine-tune's dtype.

    Attributes:
        inner: how the changed rows are coded.
        count: changed rows; -1 until encoded.
        added: rows beyond the base's.
        dtype: dtype of the added rows, filled in by encode.
    """

    id: ClassVar[str] = "rows"
    version: ClassVar[int] = 1

    inner: Term = field(default_factory=Codes)
    count: int = -1
    added: int = 0
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        self._require(isinstance(self.inner, Term), "inner must be a term")
        self._require(self.count >= -1 and self.added >= 0, "counts must not be negative")
        self._require(self.dtype in dtypes.TORCH, f"unknown dtype {self.dtype!r}")

    def encode(self, delta: torch.Tensor, context: Context) -> Encoded:
        """Code the rows below `added` that changed; take added rows from the variant."""
        return self.encode_with(self.inner.encode, delta, context)

    def encode_with(
        self,
        encode_inner: Callable[[torch.Tensor, Context], Encoded],
        delta: torch.Tensor,
        context: Context,
    ) -> Encoded:
        """The same with another encoder of the changed rows (a method that edits them first)."""
        shared = delta.shape[0] - self.added
        index = self._changed(delta, context, shared).nonzero().reshape(-1)
        inner = encode_inner(delta[index], self._inner_context(context, index))
        parts = {"index": index.to(torch.int32)}
        parts |= {f"inner.{key}": value for key, value in inner.parts.items()}
        term = replace(self, inner=inner.term, count=index.numel())
        if self.added:
            assert context.variant is not None
            value = context.variant[shared:].contiguous().clone()
            parts["added"] = value
            term = replace(term, dtype=dtypes.NAMES[value.dtype])
        return Encoded(term, parts)

    def decode(self, parts: Parts, shape: tuple[int, ...], context: Context) -> torch.Tensor:
        """Zero but for the changed and added rows, float32 of `shape`."""
        out = torch.zeros(shape)
        index = self.checked_index(parts, shape[0] - self.added, context.name)
        inner_parts = self.inner_parts(parts)
        inner_shape = (self.count, *shape[1:])
        out[index] = self.inner.decode(
            inner_parts, inner_shape, self._inner_context(context, index)
        )
        if self.added:
            out[shape[0] - self.added :] = parts["added"].to(torch.float32)
        return out

    def restore(
        self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, context: Context
    ) -> torch.Tensor:
        """The fine-tune's tensor, where the inner term is exact (see `is_exact`)."""
        assert context.base is not None
        assert isinstance(self.inner, ExactTerm)
        out = context.base.to(dtype, copy=True)
        index = self.checked_index(parts, shape[0] - self.added, context.name)
        out[index] = self.inner.restore(
            self.inner_parts(parts),
            (self.count, *shape[1:]),
            dtype,
            self._inner_context(context, index),
        )
        if self.added:
            out[shape[0] - self.added :] = parts["added"]
        return out

    def inner_parts(self, parts: Parts) -> dict[str, torch.Tensor]:
        """The inner term's own parts."""
        return {k.removeprefix("inner."): v for k, v in parts.items() if k.startswith("inner.")}

    def parts(self, shape: tuple[int, ...]) -> dict[str, PartSpec]:
        """Dtype and shape of each part; before encoding every row is taken as changed."""
        count = shape[0] - self.added if self.count < 0 else self.count
        specs = {"index": PartSpec(torch.int32, (count,))}
        inner = self.inner.parts((count, *shape[1:]))
        specs |= {f"inner.{key}": spec for key, spec in inner.items()}
        if self.added:
            specs["added"] = PartSpec(dtypes.TORCH[self.dtype], (self.added, *shape[1:]))
        return specs

    def _changed(self, delta: torch.Tensor, context: Context, shared: int) -> torch.Tensor:
        changed = (_as_matrix(delta[:shared]) != 0).any(dim=1)
        base, variant = context.base, context.variant
        if base is None or variant is None or not is_exact(self.inner):
            return changed
        # What must come back bit for bit is told apart by its bits: a float32 difference does not
        # see the sign of a zero, nor the last digits of a large integer.
        kept = base[:shared].to(variant.dtype)
        return changed | (_row_bytes(kept) != _row_bytes(variant[:shared])).any(dim=1)

    def checked_index(self, parts: Parts, rows: int, name: str) -> torch.Tensor:
        """int64 `[count]`: which rows changed. Raises `bad-manifest` unless it ascends below `rows`."""
        index = parts["index"].long()
        ascending = bool((index[1:] > index[:-1]).all())
        if index.numel() and not (ascending and index[0] >= 0 and index[-1] < rows):
            raise DeltafoldError(
                "bad-manifest", f"{name}: the index of rows does not ascend within {rows} rows."
            )
        return index

    def _inner_context(self, context: Context, index: torch.Tensor) -> Context:
        return Context(
            name=context.name,
            base=None if context.base is None else context.base[index],
            variant=None if context.variant is None else context.variant[index],
            evidence=None if context.evidence is None else context.evidence.rows(index),
        )


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    # Not reshape(rows, -1): that is ambiguous where a dimension is zero.
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))


def _row_bytes(tensor: torch.Tensor) -> torch.Tensor:
    width = math.prod(tensor.shape[1:]) * tensor.element_size()
    return dtypes.raw_bytes(tensor).reshape(tensor.shape[0], width)
