"""What vLLM 0.33 offers for this: a class that its workers inherit from, told before a model is loaded.

`deltafold serve` names it where vLLM knows such hooks. Everywhere else, and for engines that are
started by hand without it, the entry point of `plugin` does the same to vLLM's classes.
"""

from __future__ import annotations

from typing import Any

from deltafold.runtime.vllm.plugin import load_deltas
from deltafold.runtime.vllm.settings import settings_of


class DeltaExtension:
    """Mixed into vLLM's worker by vLLM."""

    vllm_config: Any
    model_runner: Any

    def init_worker_extension(self) -> None:
        """Put our manager in the place of vLLM's: after the device is there, before the model is."""
        settings = settings_of(self.vllm_config.additional_config)
        if settings is None:
            return
        runner = self.model_runner

        def load_lora_model(model: Any, vllm_config: Any, device: Any) -> Any:
            return load_deltas(runner, model, vllm_config, device, settings)

        runner.load_lora_model = load_lora_model
