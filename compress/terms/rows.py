"""Rows that changed, and rows beyond the base.

An embedding table is often bigger than the rest of a delta, and a fine-tune may have touched few of
its rows. The changed rows are coded by an inner term as one smaller matrix; rows that the base lacks
(added tokens) are stored as values, since there is nothing to subtract.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from deltafold.compress import dtypes
from deltafold.compress.terms.base import (
    Checked,
    Context,
    Encoded,
    ExactTerm,
    Parts,
    PartSpec,
    Term,
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
        """Code the rows below `added` that are not all zero; take added rows from the variant."""
        return self.encode_with(self.inner.encode, delta, context)

    def encode_with(
        self,
        encode_inner: Callable[[torch.Tensor, Context], Encoded],
        delta: torch.Tensor,
        context: Context,
    ) -> Encoded:
        """The same with another encoder of the changed rows (a method that edits them first)."""
        shared = delta.shape[0] - self.added
        changed = (delta[:shared].reshape(shared, -1) != 0).any(dim=1)
        index = changed.nonzero().reshape(-1)
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
        index = parts["index"].long()
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
        index = parts["index"].long()
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

    def _inner_context(self, context: Context, index: torch.Tensor) -> Context:
        return Context(
            name=context.name,
            base=None if context.base is None else context.base[index],
            variant=None if context.variant is None else context.variant[index],
        )
