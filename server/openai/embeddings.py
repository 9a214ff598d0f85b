"""`POST /v1/embeddings`: one vector for each text or picture."""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from typing import Literal

import torch
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field
from typing_extensions import TypedDict

from deltafold.runtime.pooled import Pooler, PoolRequest, Vector
from deltafold.server.errors import json_response
from deltafold.server.openai.answer import ERRORS
from deltafold.server.openai.pooled import PoolBody, ask
from deltafold.server.openai.replies import Usage

router = APIRouter(prefix="/v1", tags=["pooling"])


class EmbeddingRequest(PoolBody):
    """Body of `POST /v1/embeddings`."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(
        None, ge=1, description="only for models trained to be cut (is_matryoshka in config.json)"
    )
    pooling: Literal["auto", "cls", "mean", "last", "pooler"] | None = Field(
        None, description="what the vector is made of; `auto` if left out"
    )
    normalize: bool | None = Field(None, description="length 1; true if left out")


class Embedding(TypedDict):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(TypedDict):
    """Reply of `/v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


@router.post("/embeddings", response_model=Embeddings, responses=ERRORS)
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Vectors of texts or pictures by the variant that `model` names."""
    reply = await ask(request, body, functools.partial(_embed, body))
    coded = body.encoding_format == "base64"
    vectors = [_coded(a.vector) if coded else a.vector.tolist() for a in reply.answers]
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)]
    found = {"object": "list", "data": data, "model": reply.name, "usage": reply.usage}
    return json_response(found, headers=reply.headers)


def _embed(body: EmbeddingRequest, engine: Pooler, requests: Sequence[PoolRequest]) -> list[Vector]:
    return engine.embed(
        requests,
        pooling=body.pooling or "auto",
        normalize=body.normalize is not False,
        dimensions=body.dimensions,
    )


def _coded(vector: torch.Tensor) -> str:
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode("ascii")
