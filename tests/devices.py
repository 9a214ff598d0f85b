"""Where tests run: on the CPU always, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

#: For `pytest.mark.parametrize("device", DEVICES)`.
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
