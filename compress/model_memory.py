"""What running a model on calibration data takes in memory, by names and shapes alone.

Activations are left out: they depend on the model's code, on the length of rows, and on the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from deltafold.compress import dtypes
from deltafold.compress.checkpoint import TensorSource
from deltafold.compress.evidence import Need

#: Bytes that one group's moments, or its gradients, may take.
GROUP_BYTES: Final = 2 * 2**30
#: Inputs that are kept of each layer as they are.
SAMPLE: Final = 256
#: Copies of the weights in float32 that fitting scales takes.
_FITTING: Final = 6
#: The same while a packed delta is measured: the fine-tune, the delta's tensors, and their model.
_MEASURING: Final = 3


def on_cpu(device: str) -> bool:
    """Whether a model that runs there takes this process's memory, and not a device's own."""
    return device.partition(":")[0] == "cpu"


def model_bytes(source: TensorSource) -> int:
    """A model in float32, as calibration runs it."""
    specs = (source.spec(name) for name in source.names())
    return 4 * sum(math.prod(s.shape) for s in specs if s.dtype in dtypes.FLOATS)


def moment_bytes(width: int) -> int:
    """What is known of a layer with so many inputs."""
    return 4 * width * (width + SAMPLE)


def gradient_bytes(entries: int) -> int:
    """The gradients of a tensor of so many entries."""
    return 2 * 4 * entries


def evidence_bytes(
    source: TensorSource, needs: Sequence[Need], group_bytes: int = GROUP_BYTES
) -> int:
    """Models and evidence on the CPU, at the most: while tensors are coded, or the delta is measured.

    Args:
        source: the fine-tune.
        needs: what is wanted of it; nothing is run for other checkpoints.
        group_bytes: as for `CalibratedEvidence`.
    """
    wanted = set(needs) - {"reference"}
    if not wanted:
        return 0
    shapes = [source.spec(n).shape for n in source.names()]
    moments = sum(moment_bytes(s[1]) for s in shapes if len(s) == 2)
    gradients = sum(gradient_bytes(math.prod(s)) for s in shapes)
    safe = {n for n in wanted if n.startswith("safe-")}
    # Gradients stay those of the fine-tune while another model is compressed layer by layer; safe
    # answers are the aligned model's.
    models = 1 + ({"sequential", "gradients"} <= wanted) + bool(safe)
    found = models * model_bytes(source)
    found += min(moments, group_bytes) * (
        bool(wanted & {"activations", "sequential"}) + ("safe-activations" in safe)
    )
    found += min(gradients, group_bytes) * (("gradients" in wanted) + ("safe-gradients" in safe))
    return max(found, _MEASURING * model_bytes(source))


def fitting_bytes(source: TensorSource) -> int:
    """What fitting a delta's scales takes (`fit_scales`)."""
    return _FITTING * model_bytes(source)
