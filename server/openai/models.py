"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltafold.runtime.engine import VariantInfo
from deltafold.server.desk import Desk, desk_of
from deltafold.server.errors import json_response
from deltafold.server.openai.answer import ERRORS
from deltafold.server.openai.replies import ModelCard, ModelList
from deltafold.server.openai.selector import find

router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models", response_model=ModelList, responses=ERRORS)
async def list_models(request: Request) -> Response:
    """The base and every variant."""
    desk = desk_of(request)
    infos = await desk.call(desk.engine.variants)
    return json_response({"object": "list", "data": [_card(desk, info) for info in infos]})


@router.get("/models/{model_id:path}", response_model=ModelCard, responses=ERRORS)
async def get_model(model_id: str, request: Request) -> Response:
    """One model, by any name that the `model` field of a request may have."""
    desk = desk_of(request)
    _, info = await desk.call(find, desk.engine, model_id, desk.served_model_name)
    return json_response(_card(desk, info))


def _card(desk: Desk, info: VariantInfo) -> ModelCard:
    base = desk.served_model_name or desk.engine.base_name
    return {
        "id": desk.shown_name(info),
        "object": "model",
        "created": info.created,
        "owned_by": "deltafold",
        "root": desk.engine.base_name if info.parent is None else info.root or info.name,
        "parent": None if info.parent is None else base,
        "max_model_len": desk.engine.max_model_len,
        "deltafold": {
            "digest": info.digest,
            "codec": info.codec,
            "delta_bytes": info.delta_bytes,
            "ratio": info.delta_bytes / info.variant_bytes if info.variant_bytes else None,
            "tier": info.tier,
            "coverage": info.coverage,
            "quality": dict(info.quality),
            "applied": info.applied,
            "obstacle": info.obstacle or None,
        },
    }
