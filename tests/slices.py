"""Random packed deltas and batches for the tests of the GPU kernels."""

from __future__ import annotations

import torch

from deltafold.runtime.kernels.base import DeltaMatrix, leaves
from deltafold.runtime.kernels.reference import Dense
from deltafold.runtime.kernels.simple import Factors
from deltafold.runtime.kernels.triton.forms import BitSlices
from deltafold.runtime.kernels.triton.layout import Kind, Slice, make_slice, values
from deltafold.runtime.kernels.triton.sparse import SparseRows, sparse_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Relative to the largest output: the rounding of what is returned (the interpreter cuts digits off),
#: and for half precision that of activations which met column scales.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_kind(bits: int, rows: int, columns: int, group: int = 0, half: bool = False) -> Kind:
    levels = torch.float16 if half else torch.float32
    return Kind(bits, rows, columns, group or columns, False, levels)


def random_slice(kind: Kind, seed: int) -> Slice:
    made = noise(seed)
    fields = torch.randint(0, 2**kind.bits, (kind.rows, kind.columns), generator=made)
    levels = torch.rand(kind.groups, kind.rows, generator=made) - 0.3
    by_column = torch.rand(kind.columns, generator=made).to(DEVICE) if kind.by_column else None
    return make_slice(
        fields.to(torch.uint8).to(DEVICE), kind, levels.to(DEVICE), 0.01, columns=by_column
    )


def assignments(tokens: int, slots: int) -> dict[str, torch.Tensor]:
    """Which slot each token has, in patterns that schedulers make."""
    return {
        "base alone": torch.full((tokens,), -1),
        "one variant": torch.zeros(tokens, dtype=torch.int64),
        "the last variant": torch.full((tokens,), slots - 1),
        "in turn": torch.arange(tokens) % (slots + 1) - 1,
        "random": torch.randint(-1, slots, (tokens,), generator=noise(tokens)),
    }


def random_sparse(seed: int) -> tuple[SparseRows, torch.Tensor]:
    delta = torch.randn(40, 70, generator=noise(seed))
    delta[torch.rand(40, 70, generator=noise(seed + 50)) < 0.9] = 0
    delta[seed] = 0
    form = sparse_rows(delta, DEVICE)
    assert form is not None
    # float16 values beside one unit.
    assert (form.dense(torch.float32).cpu() - delta).abs().max() <= 5e-4 * delta.abs().max()
    return form, form.dense(torch.float32).cpu()


def random_slices(bits: list[int], shape: tuple[int, int], seed: int, group: int = 0) -> BitSlices:
    kinds = [random_kind(b, *shape, group=group) for b in bits]
    return BitSlices(tuple(random_slice(kind, seed + i) for i, kind in enumerate(kinds)))


def random_factors(
    rank: int, shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32
) -> Factors:
    a = torch.randn(rank, shape[1], generator=noise(seed)) / shape[1] ** 0.5
    b = torch.randn(shape[0], rank, generator=noise(seed + 1))
    return Factors(a.to(DEVICE, dtype), b.to(DEVICE, dtype))


def exact(form: DeltaMatrix) -> torch.Tensor:
    """What a form stands for, in float64 on the CPU."""
    total: torch.Tensor | float = 0.0
    for leaf, weight in leaves(form):
        if isinstance(leaf, BitSlices):
            for piece in leaf.slices:
                total = total + weight * values(piece).cpu().double()
        elif isinstance(leaf, Factors):
            total = total + weight * (leaf.b.cpu().double() @ leaf.a.cpu().double())
        elif isinstance(leaf, Dense):
            total = total + weight * leaf.weight.cpu().double()
        else:
            assert isinstance(leaf, SparseRows), type(leaf)
            total = total + weight * leaf.dense(torch.float32).cpu().double()
    assert isinstance(total, torch.Tensor)
    return total
