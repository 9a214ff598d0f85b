"""From what a class returns for one request to labels with probabilities, or to plain tensors."""

from __future__ import annotations

from typing import Any

import torch

from deltafold.compress import DeltafoldError
from deltafold.runtime.embedded.batcher import Task
from deltafold.runtime.pooled import Outputs, Scores


def outputs_of(task: Task, output: Any) -> Outputs:
    """All tensors that a class returned, without the batch's dimension."""
    tensors = {n: v[0].cpu().clone() for n, v in output.items() if isinstance(v, torch.Tensor)}
    return Outputs(*task.origin, outputs=tensors)


def scores_of(task: Task, output: Any) -> Scores:
    """Labels by the variant's own configuration.

    Raises:
        DeltafoldError: `bad-argument` where its class does not give one score a label.
    """
    logits = output.get("logits")
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise DeltafoldError(
            "bad-argument",
            f"{task.variant} does not classify: its class gives no scores of a whole request.",
            fix="ask it for embeddings, or use PoolingEngine.run for all that it returns",
        )
    config, scores = task.config, logits[0].to("cpu", torch.float32)
    names = getattr(config, "id2label", None) or {}
    labels = tuple(str(names.get(i, f"LABEL_{i}")) for i in range(len(scores)))
    kind = getattr(config, "problem_type", None)
    if kind == "regression":
        probabilities = scores
    elif kind == "multi_label_classification" or len(scores) == 1:
        probabilities = scores.sigmoid()
    else:
        probabilities = scores.softmax(0)
    return Scores(
        *task.origin,
        label=labels[int(scores.argmax())],
        probabilities=tuple(probabilities.tolist()),
        logits=tuple(scores.tolist()),
        labels=labels,
    )
