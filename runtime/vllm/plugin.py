"""The entry point of `vllm.general_plugins`: it runs in every process of vLLM.

It changes nothing for an engine that was started without `deltafold` in its `--additional-config`.
"""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

from deltafold.runtime.vllm.settings import settings_of

_log = logging.getLogger(__name__)
_DONE = "_deltafold_installed"


def install() -> None:
    """Hook into vLLM's classes; a second call does nothing."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
    from vllm.v1.worker.worker_base import WorkerBase

    if getattr(LoRAModelRunnerMixin, _DONE, False):
        return
    setattr(LoRAModelRunnerMixin, _DONE, True)
    _patch_loading(LoRAModelRunnerMixin)
    _patch_requests(EngineCore)
    WorkerBase.deltafold_prefetch = _prefetch


def _patch_loading(mixin: Any) -> None:
    """Our manager in place of vLLM's, where an engine asks for it."""
    stock = mixin.load_lora_model

    @wraps(stock)
    def load_lora_model(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        settings = settings_of(vllm_config.additional_config)
        if settings is None:
            return stock(self, model, vllm_config, device)
        from deltafold.runtime.vllm.manager import DeltaManager

        self.lora_manager = DeltaManager(self, model, vllm_config, settings, device)
        _follow_logits(self, self.lora_manager)
        return model

    mixin.load_lora_model = load_lora_model


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
    sample, stock = runner.sample, type(runner.prompt_logprobs_worker)

    def sample_rows(hidden_states: Any, input_batch: Any, grammar_output: Any) -> Any:
        with rows.reading_logits(input_batch.logits_indices):
            return sample(hidden_states, input_batch, grammar_output)

    runner.sample = sample_rows
    for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
        plain = getattr(stock, name, None)
        if plain is not None:
            setattr(runner.prompt_logprobs_worker, name, _sliced(runner, plain, rows))


def _sliced(runner: Any, plain: Any, rows: Any) -> Any:
    def run(logits_fn: Any, hidden_states: Any, *args: Any) -> Any:
        with rows.around(hidden_states):
            return plain(runner.prompt_logprobs_worker, logits_fn, hidden_states, *args)

    return run


def _patch_requests(core: Any) -> None:
    """Load a variant when its first request arrives, so that what is wrong with it is that request's
    error. On vLLM's own path it would be read in the middle of a step, where an error ends the engine.
    """
    stock = core.add_request

    @wraps(stock)
    def add_request(self: Any, request: Any, request_wave: int = 0) -> None:
        lora = request.lora_request
        if lora is not None and settings_of(self.vllm_config.additional_config) is not None:
            known: set[tuple[int, str]] = self.__dict__.setdefault("_deltafold_known", set())
            if (lora.lora_int_id, lora.lora_path) not in known:
                try:
                    self.model_executor.add_lora(lora)
                except Exception as error:
                    reject = getattr(self, "_send_error_outputs_to_client", None)
                    if reject is None:  # the engine runs in the caller's own process
                        raise
                    _log.error("request %s: %s", request.request_id, error)
                    reject([request.request_id], request.client_index)
                    return
                known.add((lora.lora_int_id, lora.lora_path))
        stock(self, request, request_wave)

    core.add_request = add_request


def _prefetch(self: Any, path: str, drop: bool = False) -> str:
    """Worker method: begin to read a variant, or tell how far it is."""
    from deltafold.runtime.vllm.manager import manager_of

    return manager_of(self.model_runner).prefetch(path, drop)
