"""What a worker looks at once: settings that cannot be served, and hooks that are never called."""

from __future__ import annotations

from typing import Any

import torch

from deltafold.compress import Checkpoint, dtypes
from deltafold.compress.errors import DeltafoldError, name_some
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
        (
            bool(getattr(parallel, "use_ubatching", False)),
            "microbatches (enable_dbo, ubatch_size)",
        ),
    ]
    found = [what for is_set, what in refused if is_set]
    if found:
        raise DeltafoldError(
            "engine-unsupported",
            f"deltas cannot be served in vLLM with {' and '.join(found)}.",
            fix="start vLLM without it",
        )


def check_copy(served: Checkpoint, base: Checkpoint) -> None:
    """Whether a quantised checkpoint is a copy of the base in all that it did not quantise.

    Some quantisers move scales from linear layers into the norms before them. Deltas of the base would
    then meet other activations than they were made for.

    Raises:
        DeltafoldError: `base-mismatch`, naming the tensors.
    """
    if served.folder == base.folder:
        return
    both = [n for n in served.names() if n in base.names() and served.spec(n).dtype in dtypes.TORCH]
    odd = []
    for name in both:
        mine, other = served.tensor(name), base.tensor(name)
        if mine.is_floating_point() and not torch.equal(mine, other.to(mine.dtype)):
            odd.append(name)
    if odd or not both:
        raise DeltafoldError(
            "base-mismatch",
            f"{served.folder} is not a quantised copy of {base.folder}.",
            facts=[("differ", name_some(odd, len(odd)) if odd else "no tensor has the same name")],
            fix="give the checkpoint that it was made of, quantised without moving scales to norms",
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
