"""Routes for operators: probes, version and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from deltafold.server.desk import desk_of
from deltafold.server.errors import json_response
from deltafold.server.metrics import package_version

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health() -> Response:
    """200 while the process answers, also while the base loads."""
    return json_response({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 once requests can be answered, 503 before."""
    state = desk_of(request).state
    return json_response({"status": state}, status=200 if state == "ready" else 503)


@router.get("/version")
async def get_version() -> Response:
    """The package's version."""
    return json_response({"version": package_version()})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    desk = desk_of(request)
    text = await desk.call(desk.metrics.render)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})
