"""The entry point of `vllm.general_plugins`: it runs in every process of vLLM.

It changes nothing for an engine that was started without `deltafold` in its `--additional-config`.
"""

from __future__ import annotations

import inspect
import logging
import multiprocessing
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any

from deltafold.runtime.vllm.hosted import Hosted, room_of
from deltafold.runtime.vllm.settings import Settings, settings_of
from deltafold.runtime.vllm.versions import is_known

_log = logging.getLogger(__name__)
_DONE = "_deltafold_installed"


def install() -> None:
    """Hook into vLLM's classes; does nothing the second time, or in a vLLM of another version."""
    if not is_known():
        return
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
    from vllm.v1.worker.worker_base import WorkerBase

    if getattr(LoRAModelRunnerMixin, _DONE, False):
        return
    setattr(LoRAModelRunnerMixin, _DONE, True)
    _patch_loading(LoRAModelRunnerMixin)
    _patch_experts()
    _patch_requests(EngineCore)
    if multiprocessing.parent_process() is None:  # engines and workers have no use for it
        from vllm.v1.engine.llm_engine import LLMEngine

        _patch_offline(LLMEngine)
    WorkerBase.deltafold_prefetch, WorkerBase.deltafold_leave = _prefetch, _leave


def _patch_loading(mixin: Any) -> None:
    """Our manager in place of vLLM's, where an engine asks for it."""
    stock = mixin.load_lora_model

    @wraps(stock)
    def load_lora_model(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        settings = settings_of(vllm_config.additional_config)
        if settings is None:
            return stock(self, model, vllm_config, device)
        return load_deltas(self, model, vllm_config, device, settings)

    mixin.load_lora_model = load_lora_model


def load_deltas(runner: Any, model: Any, vllm_config: Any, device: Any, settings: Settings) -> Any:
    """Give a model runner our manager, in the place of vLLM's own."""
    from deltafold.runtime.vllm.manager import DeltaManager

    with _pool(vllm_config):
        runner.lora_manager = DeltaManager(runner, model, vllm_config, settings, device)
    _follow_logits(runner, runner.lora_manager)
    return model


def _pool(vllm_config: Any) -> AbstractContextManager[Any]:
    """Where slots live: from 0.33 on, level-2 sleep discards what lies in the pool of the weights."""
    from vllm import __version_tuple__
    from vllm.platforms import current_platform

    sleeps = vllm_config.model_config.enable_sleep_mode and current_platform.is_cuda_alike()
    if not sleeps or __version_tuple__[:2] < (0, 33):
        return nullcontext()
    from vllm.device_allocator import get_mem_allocator_instance

    pool: AbstractContextManager[Any] = get_mem_allocator_instance().use_memory_pool(tag="runtime")
    return pool


def _patch_experts() -> None:
    """Experts as an engine without LoRA has them: our hook needs none of LoRA's kernels, which run on
    some GPUs alone.
    """
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    made = FusedMoEConfig.__post_init__

    @wraps(made)
    def __post_init__(self: Any) -> None:  # noqa: N807
        config = get_current_vllm_config_or_none()
        if config is not None and settings_of(config.additional_config) is not None:
            self.is_lora_enabled = False
        made(self)

    FusedMoEConfig.__post_init__ = __post_init__


def _follow_logits(runner: Any, manager: Any) -> None:
    """Tell which tokens the head's rows are, where they are not one row a request."""
    rows = manager.rows
    if hasattr(runner, "_get_prompt_logprobs_dict"):  # the V1 runner
        prompts = runner._get_prompt_logprobs_dict

        def with_slices(hidden_states: Any, *args: Any) -> Any:
            with rows.around(hidden_states):
                return prompts(hidden_states, *args)

        runner._get_prompt_logprobs_dict = with_slices
    if hasattr(runner, "prompt_logprobs_worker"):  # the V2 runner
        _follow_logits_v2(runner, rows)


def _follow_logits_v2(runner: Any, rows: Any) -> None:
    sample, wrapped = runner.sample, set[int]()

    def sample_rows(hidden_states: Any, input_batch: Any, grammar_output: Any) -> Any:
        # Made after the model was loaded; asked for prompts only after a step was sampled.
        worker = runner.prompt_logprobs_worker
        if worker is not None and id(worker) not in wrapped:
            wrapped.add(id(worker))
            for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
                if hasattr(worker, name):
                    setattr(worker, name, _sliced(getattr(worker, name), rows))
        with rows.reading_logits(input_batch.logits_indices):
            return sample(hidden_states, input_batch, grammar_output)

    runner.sample = sample_rows


def _sliced(plain: Any, rows: Any) -> Any:
    def run(logits_fn: Any, hidden_states: Any, *args: Any) -> Any:
        with rows.around(hidden_states):
            return plain(logits_fn, hidden_states, *args)

    return run


def _patch_requests(core: Any) -> None:
    """Load a variant before its request is scheduled, so that what is wrong with it is that request's
    error. On vLLM's own path it would be read in the middle of a step, where an error ends the engine.
    """
    stock, add, remove, pin = core.add_request, core.add_lora, core.remove_lora, core.pin_lora

    @wraps(stock)
    def add_request(self: Any, request: Any, request_wave: int = 0) -> None:
        hosted = _hosted(self)
        try:
            if hosted is not None and request.lora_request is not None:
                hosted.ready(request.lora_request, partial(_live, self.scheduler))
        except Exception as error:
            reject = getattr(self, "_send_error_outputs_to_client", None)
            if reject is None:  # the engine runs in the caller's own process
                raise
            _log.error("request %s: %s", request.request_id, error)
            reject([request.request_id], request.client_index)
            return
        stock(self, request, request_wave)

    @wraps(add)
    def add_lora(self: Any, lora_request: Any) -> Any:
        hosted = _hosted(self)
        if hosted is None:
            return add(self, lora_request)
        again = bool(lora_request.load_inplace)
        hosted.ready(lora_request, partial(_live, self.scheduler), again=again)
        return True

    @wraps(remove)
    def remove_lora(self: Any, lora_id: int) -> Any:
        hosted = _hosted(self)
        if hosted is None:
            return remove(self, lora_id)
        if lora_id in _live(self.scheduler):  # a step must never miss its variant
            return False
        hosted.forget(lora_id)
        return remove(self, lora_id)

    @wraps(pin)
    def pin_lora(self: Any, lora_id: int) -> Any:
        hosted = _hosted(self)
        if hosted is not None:
            hosted.pin(lora_id, partial(_live, self.scheduler))
        return pin(self, lora_id)

    core.add_request, core.add_lora = add_request, add_lora
    core.remove_lora, core.pin_lora = remove_lora, pin_lora


def _hosted(core: Any) -> Hosted | None:
    """An engine's book of variants in host memory; None where it serves no deltas."""
    if "_deltafold_hosted" not in core.__dict__:
        ours = settings_of(core.vllm_config.additional_config) is not None
        lora_config, executor = core.vllm_config.lora_config, core.model_executor
        core._deltafold_hosted = None
        if ours and lora_config is not None:
            core._deltafold_hosted = Hosted(
                room_of(lora_config),
                executor.add_lora,
                lambda numbers: executor.collective_rpc("deltafold_leave", args=(numbers,)),
            )
    hosted: Hosted | None = core._deltafold_hosted
    return hosted


def _live(scheduler: Any) -> set[int]:
    """Numbers of the variants that requests wait for or run."""
    loras = (request.lora_request for request in scheduler.requests.values())
    return {lora.lora_int_id for lora in loras if lora is not None}


def _patch_offline(engine: Any) -> None:
    """The same for `vllm.LLM`, before the request is put into any queue: its caller gets the error."""
    stock = engine.add_request

    @wraps(stock)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(stock).bind(self, *args, **kwargs).arguments
        lora = given.get("lora_request")
        if lora is not None and settings_of(self.vllm_config.additional_config) is not None:
            plain = lora if not lora.load_inplace else _kept(lora)
            self.engine_core.add_lora(plain)
            _read_text(self, lora)
        return stock(self, *args, **kwargs)

    engine.add_request = add_request


def _kept(lora: Any) -> Any:
    """A request's variant, not to be read again if it is there."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora.lora_name, lora.lora_int_id, lora.lora_path)


def _read_text(engine: Any, lora: Any) -> None:
    """End tokens, sampling defaults and detokenising by the variant's own files, if it has them."""
    from deltafold.compress import Checkpoint
    from deltafold.runtime.vllm.source import untagged
    from deltafold.runtime.vllm.texts import texts_of

    read: set[str] = engine.__dict__.setdefault("_deltafold_read", set())
    if lora.lora_path in read:
        return
    settings = settings_of(engine.vllm_config.additional_config)
    assert settings is not None
    base = Checkpoint.open(settings.base or engine.vllm_config.model_config.model).folder
    folder = Path(untagged(lora.lora_path)[0]).expanduser()
    texts_of(engine, base).read(lora.lora_path, folder)
    read.add(lora.lora_path)


def _prefetch(self: Any, path: str, drop: bool = False) -> str:
    """Worker method: begin to read a variant, or tell how far it is."""
    from deltafold.runtime.vllm.manager import manager_of

    return manager_of(self.model_runner).prefetch(path, drop)


def _leave(self: Any, numbers: list[int]) -> None:
    """Worker method: let variants go from host memory; they stay registered."""
    from deltafold.runtime.vllm.manager import manager_of

    manager_of(self.model_runner).leave(numbers)
