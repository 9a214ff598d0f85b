"""From hidden states to one vector for a request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.embedded.text import read_json

#: `auto` is the model's own features where it has some, the mean for other texts, and the first
#: place for other images (convolutional models: the pooled map, or its mean where nobody pools).
Pooling: TypeAlias = Literal["auto", "cls", "mean", "last", "pooler"]
POOLINGS: Final = ("auto", "cls", "mean", "last", "pooler")


def chosen(pooling: Pooling, output: Any, way: str, *, dual: bool) -> Pooling:
    """What `auto` stands for, given a request's output."""
    if pooling != "auto":
        return pooling
    if dual:
        return "pooler"
    if way == "text":
        return "mean"
    if _states(output).dim() == 3:
        return "cls"
    return "pooler" if isinstance(output.get("pooler_output"), torch.Tensor) else "mean"


def vector_of(output: Any, pooling: Pooling) -> torch.Tensor:
    """float32 `[D]` on the CPU.

    Args:
        output: of a bare model for one request without padding: `last_hidden_state` `[1, T, D]` or
            `[1, D, H, W]`, perhaps `pooler_output` `[1, D]`; or a tensor of features `[1, D]`.
        pooling: not `auto`.

    Raises:
        DeltafoldError: `bad-argument` where the model has nothing of the kind.
    """
    if isinstance(output, torch.Tensor):
        found = output[0]
    elif pooling == "pooler":
        pooled = output.get("pooler_output") if isinstance(output, Mapping) else None
        if not isinstance(pooled, torch.Tensor):
            raise _no_such(pooling)
        found = pooled[0]
    else:
        found = _place(_states(output)[0], pooling)
    # A copy, so that the batch is not kept alive by one of its rows.
    return found.flatten().to("cpu", torch.float32).clone()


def check_dimensions(wanted: int | None, known: int, folder: Path) -> None:
    """Refuse to cut vectors of a model that was not trained for it.

    Raises:
        DeltafoldError: `bad-argument`.
    """
    assert wanted is not None
    config = read_json(folder / "config.json")
    listed = config.get("matryoshka_dimensions")
    meant = wanted in listed if isinstance(listed, list) else config.get("is_matryoshka") is True
    if not meant or not 1 <= wanted < known:
        raise DeltafoldError(
            "bad-argument",
            "the model's vectors cannot be cut to the dimensions asked for.",
            facts=[("asked", wanted), ("dimensions", listed or known)],
            fix="leave dimensions out",
        )


def _place(states: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    if pooling == "mean":
        dimensions = 0 if states.dim() == 2 else (1, 2)
        return states.to(torch.float32).mean(dimensions)
    if states.dim() != 2:
        raise _no_such(pooling)
    return states[0] if pooling == "cls" else states[-1]


def _states(output: Any) -> torch.Tensor:
    states = output.get("last_hidden_state") if isinstance(output, Mapping) else None
    if not isinstance(states, torch.Tensor):
        raise _no_such("last_hidden_state")
    return states


def _no_such(what: str) -> DeltafoldError:
    return DeltafoldError(
        "bad-argument",
        f"the model has no {what} to make a vector of.",
        facts=[("pooling", ", ".join(POOLINGS))],
        fix="leave pooling at auto",
    )
