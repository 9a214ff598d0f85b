"""`POST /classify`, in vLLM's words: labels and probabilities by each variant's own head."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field
from typing_extensions import TypedDict

from deltafold.runtime.pooled import Pooler, PoolRequest, Scores
from deltafold.server.errors import json_response
from deltafold.server.openai.answer import ERRORS
from deltafold.server.openai.pooled import PoolBody, ask
from deltafold.server.openai.replies import Usage

router = APIRouter(tags=["pooling"])


class ClassifyRequest(PoolBody):
    """Body of `POST /classify`."""

    use_activation: bool | None = Field(
        None, description="false gives the head's own numbers (rewards, say) as `probs`"
    )


class Label(TypedDict):
    """The likeliest label of one text or picture, and the probability of each."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Labels(TypedDict):
    """Reply of `/classify`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Label]
    usage: Usage


@router.post("/classify", response_model=Labels, responses=ERRORS)
async def classify(body: ClassifyRequest, request: Request) -> Response:
    """Labels of texts or pictures by the variant that `model` names."""
    reply = await ask(request, body, _classify)
    raw = body.use_activation is False
    found: Labels = {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": reply.name,
        "data": [_label(i, a, raw) for i, a in enumerate(reply.answers)],
        "usage": reply.usage,
    }
    return json_response(found, headers=reply.headers)


def _classify(engine: Pooler, requests: Sequence[PoolRequest]) -> list[Scores]:
    return engine.classify(requests)


def _label(index: int, scores: Scores, raw: bool) -> Label:
    return {
        "index": index,
        "label": scores.label,
        "probs": list(scores.logits if raw else scores.probabilities),
        "num_classes": len(scores.labels),
    }
