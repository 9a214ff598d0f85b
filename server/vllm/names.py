"""Names of variants in vLLM's OpenAI server: a second entry point of `vllm.general_plugins`.

vLLM's own table of served models stays. Its methods are led through a `Front` where the engine was
started with deltas: listing models also lists the zoo, an unknown name is looked up there, what is
loaded is read beside the running streams and known by its content, and what is unloaded leaves memory.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import sys
from functools import cache, wraps
from typing import Any, Final

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.vllm.settings import settings_of
from deltafold.runtime.vllm.versions import is_known
from deltafold.server.vllm import handlers
from deltafold.server.vllm.front import Front, RefusedError

_log = logging.getLogger(__name__)
_SERVING = "vllm.entrypoints.openai.models.serving"
_DONE = "_deltafold_names"
_SERVER_ERROR: Final = 500


def install() -> None:
    """Hook into vLLM's table of served models; a second call does nothing."""
    if multiprocessing.parent_process() is not None and _SERVING not in sys.modules:
        return  # an engine or a worker: nobody asks for names there
    if not is_known():
        return
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    if not getattr(OpenAIServingModels, _DONE, False):
        setattr(OpenAIServingModels, _DONE, True)
        _patch_listing(OpenAIServingModels)
        _patch_loading(OpenAIServingModels)
        _patch_unloading(OpenAIServingModels)
        _patch_resolving(OpenAIServingModels)
        _patch_starting(OpenAIServingModels)
        handlers.install(_front)


def _front(models: Any) -> Front | None:
    """The front of a table of models; None where its engine serves no deltas."""
    if "_deltafold_front" not in models.__dict__:
        config = models.engine_client.vllm_config
        settings = settings_of(config.additional_config)
        names = [path.name for path in models.base_model_paths]
        models._deltafold_front = (
            None
            if settings is None
            else Front(models.engine_client, settings, config.model_config.model, names)
        )
    front: Front | None = models._deltafold_front
    return front


def _patch_listing(models: Any) -> None:
    stock = models.show_available_models

    @wraps(stock)
    async def show_available_models(self: Any) -> Any:
        from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

        listed, front = await stock(self), _front(self)
        entries = [] if front is None or not _finds() else await front.entries()
        for entry in entries:
            if entry.name not in self.lora_requests:
                listed.data.append(
                    ModelCard(
                        id=entry.name,
                        root=str(entry.folder),
                        parent=self.base_model_paths[0].name,
                        permission=[ModelPermission()],
                    )
                )
        return listed

    models.show_available_models = show_available_models


@cache
def _finds() -> bool:
    """Whether vLLM looks unknown names up at all."""
    from vllm import envs

    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        return True
    _log.warning("names of the zoo are served with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 alone")
    return False


def _patch_loading(models: Any) -> None:
    stock = models.load_lora_adapter

    @wraps(stock)
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        front = _front(self)
        if front is None:
            return await stock(self, request, base_model_name)
        refused = await self._check_load_lora_adapter_request(request)
        if refused is not None:
            return refused
        try:
            path = await front.prepare(request.lora_path)
        except (DeltafoldError, RefusedError) as error:
            return handlers.error_of(error)
        kept = self.lora_requests.get(request.lora_name)
        if kept is not None and kept.lora_path == path:
            return f"Success: variant '{request.lora_name}' is loaded already."
        # Under the old number, running requests would change their model in the middle of an answer.
        self.lora_requests.pop(request.lora_name, None)
        own = request.model_copy(update={"lora_path": path, "load_inplace": False})
        answer = await stock(self, own, base_model_name)
        if getattr(getattr(answer, "error", None), "code", None) == _SERVER_ERROR:
            answer = handlers.error_of(answer.error.message)  # what a worker said of the variant
        if kept is not None and isinstance(answer, str):
            _release(self, front, kept)
        elif kept is not None:
            self.lora_requests.setdefault(request.lora_name, kept)
        return answer

    models.load_lora_adapter = load_lora_adapter


def _patch_unloading(models: Any) -> None:
    stock = models.unload_lora_adapter

    @wraps(stock)
    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        front, kept = _front(self), self.lora_requests.get(request.lora_name)
        answer = await stock(self, request)
        if front is not None and kept is not None and isinstance(answer, str):
            _release(self, front, kept)
        return answer

    models.unload_lora_adapter = unload_lora_adapter


def _release(models: Any, front: Front, kept: Any) -> None:
    """Begin to release a variant that lost its name; requests that run it go on."""
    others = models.lora_requests.values()
    task = asyncio.get_running_loop().create_task(front.release(kept, others))
    _RELEASING.add(task)
    task.add_done_callback(_RELEASING.discard)


#: The event loop itself keeps tasks weakly.
_RELEASING: Final[set[asyncio.Task[None]]] = set()


def _patch_starting(models: Any) -> None:
    stock = models.init_static_loras

    @wraps(stock)
    async def init_static_loras(self: Any) -> None:
        front = _front(self)
        if front is not None:
            await front.ready()
        await stock(self)
        for name in () if front is None else front.settings.pin:
            found = await self.resolve_lora(name)
            if not hasattr(found, "lora_int_id"):
                raise ValueError(f"pin: {found.error.message}")
            await self.engine_client.pin_lora(found.lora_int_id)

    models.init_static_loras = init_static_loras


def _patch_resolving(models: Any) -> None:
    stock = models.resolve_lora

    @wraps(stock)
    async def resolve_lora(self: Any, lora_name: str) -> Any:
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        front = _front(self)
        if front is None or lora_name in self.lora_requests:
            return await stock(self, lora_name)
        try:
            path = await front.find(lora_name)
        except DeltafoldError as error:
            if error.code == "variant-not-found":
                return await stock(self, lora_name)
            return handlers.error_of(error)
        answer = await self.load_lora_adapter(
            LoadLoRAAdapterRequest(lora_name=lora_name, lora_path=path)
        )
        # Another request may have brought it in meanwhile.
        return self.lora_requests.get(lora_name) or answer

    models.resolve_lora = resolve_lora
