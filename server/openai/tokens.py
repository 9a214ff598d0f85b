"""`POST /tokenize` and `/detokenize`: with a model, because variants bring their own tokenizers."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltafold.server.desk import desk_of
from deltafold.server.errors import json_response
from deltafold.server.openai.answer import ERRORS
from deltafold.server.openai.replies import Text, Tokens
from deltafold.server.openai.schemas import DetokenizeRequest, TokenizeRequest
from deltafold.server.openai.selector import find

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", response_model=Tokens, responses=ERRORS)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of a text, or of messages under the variant's chat template."""
    desk = desk_of(request)
    engine = desk.engine

    def work() -> list[int]:
        _, info = find(engine, body.model, desk.served_model_name)
        return engine.encode(info.name, body.source())

    tokens = await desk.call(work)
    limit = engine.max_model_len
    return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": limit})


@router.post("/detokenize", response_model=Text, responses=ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Text of token ids."""
    desk = desk_of(request)
    engine = desk.engine

    def work() -> str:
        _, info = find(engine, body.model, desk.served_model_name)
        return engine.decode(info.name, body.tokens)

    return json_response({"prompt": await desk.call(work)})
