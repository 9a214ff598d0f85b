"""What a delta's tensor adds to the base as it is, whatever base the delta was taken against."""

from __future__ import annotations

import torch

from deltafold.compress.checkpoint import Checkpoint
from deltafold.compress.repo import DeltaRepo, pad_rows


def difference(repo: DeltaRepo, base: Checkpoint, name: str) -> torch.Tensor:
    """A coded tensor's difference to the base's own values, float32 in the fine-tune's shape.

    A delta that was taken against the dequantised base is moved: by what quantising took from the base.
    Rows beyond the base's, and tensors that it lacks, are their values.

    Raises:
        DeltafoldError: as `DeltaRepo.delta`.
    """
    taken = repo.base_tensor(base, name)
    found = repo.delta(name, taken)
    if name not in repo.quantised:
        return found
    own = repo.named(base).tensor(name)
    assert taken is not None
    lost = pad_rows(taken - own.to(torch.float32), tuple(found.shape))
    assert lost is not None
    return found + lost
