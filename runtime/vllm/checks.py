"""What a worker looks at once: settings that cannot be served, and hooks that are never called."""

from __future__ import annotations

from typing import Any

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.vllm.rows import StepRows

_TOKENS = 8


def check_config(vllm_config: Any) -> None:
    """Refuse what would give wrong answers.

    Raises:
        DeltafoldError: `engine-unsupported`, naming the option.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    compilation = vllm_config.compilation_config
    refused = [
        (vllm_config.quant_config is not None, "a quantised base (--quantization)"),
        (
            getattr(model, "head_dtype", model.dtype) != model.dtype,
            "a head in another dtype (head_dtype)",
        ),
        (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "prefill context parallelism",
        ),
        (
            bool(getattr(parallel, "use_sequence_parallel_moe", False)),
            "sequence-parallel experts",
        ),
        (
            bool(getattr(compilation.pass_config, "enable_sp", False)),
            "the sequence-parallelism pass (pass_config.enable_sp)",
        ),
        (
            bool(getattr(parallel, "enable_batch_sharded_sampling", False)),
            "batch-sharded sampling",
        ),
    ]
    found = [what for is_set, what in refused if is_set]
    if found:
        raise DeltafoldError(
            "engine-unsupported",
            f"deltas cannot be served in vLLM with {' and '.join(found)}.",
            fix="start vLLM without it",
        )


@torch.inference_mode()
def probe(runner: Any, model: Any, rows: StepRows) -> None:
    """Run the model once on made-up tokens of the base, the head included."""
    rows.set([-1] * _TOKENS, [-1])
    ran = runner._dummy_run(_TOKENS)
    hidden = ran[0] if isinstance(ran, tuple) else ran
    if isinstance(hidden, torch.Tensor) and hasattr(model, "compute_logits"):
        model.compute_logits(hidden[:1])
    rows.set((), ())
