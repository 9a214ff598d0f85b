"""What slots will cost, before an engine is started: the engine's own way to cut them, on no memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltafold.compress import Checkpoint
from deltafold.runtime.vllm.checks import check_config
from deltafold.runtime.vllm.hooks import LayerHook
from deltafold.runtime.vllm.routes import empty_model, routes_of
from deltafold.runtime.vllm.rows import StepRows
from deltafold.runtime.vllm.settings import Settings
from deltafold.runtime.vllm.sites import find_sites
from deltafold.runtime.vllm.slots import SlotMaker, zoo_repos
from deltafold.runtime.vllm.source import Source
from deltafold.runtime.vllm.variant import DENSE, PACKED


@dataclass(frozen=True)
class SlotPlan:
    """GPU memory of all slots, in bytes.

    Attributes:
        slots: how many.
        variants: deltas of the zoo that fit the base.
        packed: memory of packed slots.
        dense: memory of dense slots.
        copies: modules that need a dense copy in packed slots too, since a variant changes them in a
            way that has no packed form.
    """

    slots: int
    variants: int
    packed: int
    dense: int
    copies: tuple[str, ...]


def plan_slots(base: str, zoo: str, slots: int, dtype: str = "auto") -> SlotPlan:
    """Predict what an engine on one GPU will take for its slots.

    Args:
        base: folder or hub id.
        zoo: folder of deltas.
        slots: vLLM's `--max-loras`.
        dtype: vLLM's `--dtype`.

    Raises:
        DeltafoldError: what is wrong with the base or the zoo; `engine-unsupported`.
    """
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(base, dtype=dtype, enable_lora=True, max_loras=slots)
    config = args.create_engine_config()
    check_config(config)
    source = Source(Checkpoint.open(base))
    repos = zoo_repos(source, Settings(zoo=zoo))
    with _one_rank(config):
        model = empty_model(config)
        routes = routes_of(model, source.base)
        sizes, copies = {}, []
        for layout in (PACKED, DENSE):
            rows = StepRows.make(1, 1, torch.device("cpu"))
            sites = find_sites(model, routes, rows, slots, fixed=True)
            number_type = config.model_config.dtype
            meta = torch.device("meta")
            maker = SlotMaker(source.base, routes, sites, slots, layout, number_type, meta)
            maker.allocate(repos)
            sizes[layout] = maker.nbytes
            if layout == PACKED:
                hooks = sites.hooks.values()
                copies = [h.name for h in hooks if isinstance(h, LayerHook) and h.has_copies]
    return SlotPlan(slots, len(repos), sizes[PACKED], sizes[DENSE], tuple(sorted(copies)))


@contextmanager
def _one_rank(vllm_config: Any) -> Iterator[None]:
    """vLLM's models ask for the ranks that they are spread over; here there is one."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(vllm_config):
        store = f"file://{Path(folder) / 'store'}"
        init_distributed_environment(1, 0, store, 0, backend="gloo")
        try:
            initialize_model_parallel(1, 1)
            yield
        finally:
            cleanup_dist_env_and_memory()
