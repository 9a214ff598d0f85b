"""Forms for layers that keep their weight as `[in, out]` and compute `x W`: deltas are turned over."""

from __future__ import annotations

import torch

from deltafold.compress import bits as packing
from deltafold.compress.terms import ColumnPlanes, Context, Encoded, LowRank, Planes
from deltafold.compress.terms.base import rows_and_columns
from deltafold.runtime.kernels.base import DeltaMatrix, Sum
from deltafold.runtime.kernels.forms import Target, form_of_delta, product_form, share_kept
from deltafold.runtime.kernels.simple import Factors


def turned_form(
    encoded: list[Encoded], shape: tuple[int, ...], context: Context, target: Target
) -> DeltaMatrix:
    """The form for `x @ D` of a stored D `[in, out]`: its `matmul` takes `[k, in]` to `[k, out]`."""
    forms = [_turned(each, shape, context, target) for each in encoded]
    return forms[0] if len(forms) == 1 else Sum(forms)


def _turned(
    encoded: Encoded, shape: tuple[int, ...], context: Context, target: Target
) -> DeltaMatrix:
    term, parts = encoded
    if isinstance(term, LowRank):
        a, b = term.factors(parts)
        # D = b a, so D^T = a^T b^T.
        turned = (b.T.contiguous(), a.T.contiguous())
        return Factors(*(t.to(target.device, target.dtype) for t in turned))
    if isinstance(term, Planes) and term.scale != "group":
        rows, columns = rows_and_columns(shape)
        return product_form(
            [_planes(term, encoded, rows, columns)], (columns, rows), context, target
        )
    delta = term.decode(parts, shape, context).reshape(rows_and_columns(shape))
    return form_of_delta(delta.T.contiguous(), share_kept(term, delta), target)


def _planes(term: Planes, encoded: Encoded, rows: int, columns: int) -> Encoded:
    """Planes whose scales lie on rows are, turned over, planes whose scales lie on columns."""
    signs = torch.stack(
        [
            packing.pack(packing.unpack(plane, 1, columns).T.contiguous(), 1)
            for plane in encoded.parts["signs"]
        ]
    )
    scales = encoded.parts["scales"].reshape(term.bits, -1).expand(term.bits, rows).contiguous()
    parts = {**encoded.parts, "signs": signs, "scales": scales}
    return Encoded(ColumnPlanes(term.bits, term.scale_format), parts)
