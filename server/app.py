"""The application: an engine behind the OpenAI API."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from fastapi import FastAPI
from starlette.middleware import Middleware

from deltafold.runtime.engine import Served
from deltafold.server import ops
from deltafold.server.auth import KeyAuth
from deltafold.server.context import RequestContext
from deltafold.server.desk import Desk
from deltafold.server.errors import install_handlers
from deltafold.server.metrics import package_version
from deltafold.server.openai import chat, classify, completions, embeddings, models, tokens

_ABOUT = """\
One base model and many full fine-tunes as small deltas; `model` chooses the variant.

Fields that a route does not know are refused. Fields of the OpenAI API that are not implemented may
be sent at their defaults (`frequency_penalty: 0`, `tools: []`, ...); any other value is refused.
"""


def create_app(
    engine: Served | Future[Served],
    *,
    api_keys: Sequence[str] = (),
    served_model_name: str | None = None,
    max_variant_labels: int = 100,
) -> FastAPI:
    """Make the application. It does not close the engine: whoever opened it does.

    Args:
        engine: the engine, or a promise of it: then everything but `/health` answers 503 until
            it is kept.
        api_keys: keys of which requests must carry one as `Authorization: Bearer`; none: open.
        served_model_name: one more name for the base, and the one that replies show.
        max_variant_labels: variants with metrics of their own; the rest share `_other`.
    """
    desk = Desk(engine, served_model_name=served_model_name, max_variant_labels=max_variant_labels)
    app = FastAPI(
        title="deltafold",
        version=package_version(),
        description=_ABOUT,
        middleware=[
            Middleware(RequestContext, metrics=desk.metrics),
            Middleware(KeyAuth, keys=tuple(api_keys)),
        ],
    )
    app.state.desk = desk
    install_handlers(app)
    for room in (models, chat, completions, embeddings, classify, tokens, ops):
        app.include_router(room.router)
    return app
