"""Experts and their routers, told by names and shapes in a checkpoint.

Checkpoints store each expert's layers by a number; models of transformers hold all experts of a layer
in one parameter, and the router beside them as a parameter of its own, not as linear layers.
"""

from __future__ import annotations

import re

from deltafold.compress.naming import NamedBase

_NUMBERED = re.compile(r"(?P<layer>.+)\.\w*experts\.(?P<number>\d+)\..+")
_FUSED = re.compile(r"(?P<layer>.+)\.\w*experts\.\w+")


def of_experts(checkpoint: NamedBase) -> set[str]:
    """Names of the tensors of numbered or fused experts, and of the routers that choose among them.

    A router is a matrix right beside the experts with as many rows as there are of them. Experts with
    names of their own (`expert_0`) stay modules, and are none of these.
    """
    names = checkpoint.names()
    found: set[str] = set()
    counts: dict[str, int] = {}
    for name in names:
        numbered, fused = _NUMBERED.fullmatch(name), _FUSED.fullmatch(name)
        if numbered:
            layer, count = numbered["layer"], int(numbered["number"]) + 1
        elif fused and len(checkpoint.spec(name).shape) == 3:
            layer, count = fused["layer"], checkpoint.spec(name).shape[0]
        else:
            continue
        found.add(name)
        counts[layer] = max(counts.get(layer, 0), count)
    for name in names:
        module, _, attribute = name.rpartition(".")
        rows = counts.get(module.rpartition(".")[0])
        if rows and attribute == "weight":
            shape = checkpoint.spec(name).shape
            if len(shape) == 2 and shape[0] == rows:
                found.add(name)
    return found
