"""The worker's manager of variants, in the place of vLLM's manager of LoRAs.

vLLM's own request path stays: a `LoRARequest` names the variant, the scheduler keeps a step to
`max_loras` of them, and each step says which variant every token and every row of logits runs. What is
replaced is everything behind that.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

from deltafold.compress import Checkpoint, DeltafoldError, DeltaRepo
from deltafold.runtime.vllm.aside import reading_pool, short_turns
from deltafold.runtime.vllm.checks import check_config, check_copy, probe
from deltafold.runtime.vllm.routes import find_routes
from deltafold.runtime.vllm.rows import StepRows
from deltafold.runtime.vllm.settings import Settings
from deltafold.runtime.vllm.sites import find_sites, install
from deltafold.runtime.vllm.slots import SlotMaker, layout_of, zoo_repos
from deltafold.runtime.vllm.source import Source, untagged
from deltafold.runtime.vllm.variant import FORMS, PACKED, LoadedVariant, Loader, pinned

#: Variants that were read ahead and wait for the request that they were read for.
_UNCLAIMED: Final = 4


class DeltaManager:
    """Implements what vLLM's model runners ask of their LoRA manager.

    All methods but those of the prefetching thread run on the engine's loop. `add_adapter` raises what
    is wrong with a variant, to the caller who asked for it; a step must never raise, since vLLM's
    engine ends then. A registered variant's files stay open, so that it can be read again after its
    folder is gone.

    Args:
        runner: vLLM's model runner.
        model: as vLLM loaded it.
        vllm_config: vLLM's configuration.
        settings: ours.
        device: of the model.

    Raises:
        DeltafoldError: `engine-unsupported` where vLLM is set up in a way that the plugin cannot serve.
    """

    def __init__(
        self,
        runner: Any,
        model: nn.Module,
        vllm_config: Any,
        settings: Settings,
        device: torch.device,
    ) -> None:
        check_config(vllm_config)
        self._runner, self._model, self._device = runner, model, device
        slots = vllm_config.lora_config.max_loras
        layout = layout_of(settings.slots, device, zoo=bool(settings.zoo))
        tokens = _most_tokens(vllm_config)
        self.rows = StepRows.make(tokens, tokens, device)
        served = Checkpoint.open(vllm_config.model_config.model)
        self._source = Source(Checkpoint.open(settings.base) if settings.base else served)
        check_copy(served, self._source.base)
        routes = find_routes(vllm_config, self._source.base)
        sites = find_sites(model, routes, self.rows, slots, fixed=layout != FORMS)
        install(model, sites)
        self._sites = sites
        base, dtype = self._source.base, vllm_config.model_config.dtype
        self.slots = SlotMaker(base, routes, sites, slots, layout, dtype, device)
        self.slots.allocate(zoo_repos(self._source, settings) if layout == PACKED else [])
        self._loader = Loader(base, routes, sites, dtype, layout)
        self._repos: dict[int, DeltaRepo] = {}
        self._paths: dict[int, str] = {}
        self._host: dict[int, LoadedVariant] = {}
        self._pinned: set[int] = set()
        self._dummies: set[int] = set()
        self._slots: list[int | None] = [None] * slots
        self._used: OrderedDict[int, int] = OrderedDict()  # variant -> slot, least recent first
        self._reading: dict[str, Future[tuple[DeltaRepo, LoadedVariant]]] = {}
        self._lock = threading.Lock()
        self._pool = reading_pool("deltafold-read")
        self._leaving = reading_pool("deltafold-leave")

    # What vLLM's runners call.

    def add_adapter(self, request: Any) -> bool:
        """Have a variant in host memory. Raises what is wrong with it."""
        number, path = int(request.lora_int_id), str(request.lora_path)
        kept = self._paths.get(number)
        if kept is not None and not request.load_inplace:
            if kept != path:
                raise _taken(number, kept, path)
            self._host_copy(number)
            return True
        self._probe()
        repo, loaded = self._shared(path) or self._read(path)
        self._forget(number)
        self._repos[number], self._paths[number] = repo, path
        self._host[number] = loaded
        return True

    def remove_adapter(self, number: int) -> bool:
        """Forget a variant."""
        known = number in self._repos or number in self._dummies
        self._forget(number)
        return known

    def remove_all_adapters(self) -> None:
        """Forget the stand-ins of vLLM's warm-up; variants stay, for their base stays too."""
        for number in list(self._dummies):
            self._forget(number)
        self.rows.set((), ())

    def list_adapters(self) -> set[int]:
        """Numbers of all variants."""
        return {*self._repos, *self._dummies}

    def pin_adapter(self, number: int) -> bool:
        """Keep a variant in host memory, and in its slot as long as another one's can be taken."""
        if number not in self._repos:
            return False
        self._pinned.add(number)
        self._host_copy(number)
        return True

    def set_active_adapters(self, requests: Iterable[Any], mapping: Any) -> None:
        """Begin a step: bring its variants into slots, and note each row's slot."""
        wanted = {int(r.lora_int_id): r for r in requests if r is not None}
        for number, request in wanted.items():
            if number not in self._repos and number not in self._dummies:
                self.add_adapter(request)
        for number in wanted:
            self._activate(number, wanted)
        if not wanted:
            self.rows.rest()
        elif mapping is not None:
            slots = {0: -1, **{n: s for n, s in self._used.items() if n in wanted}}
            tokens = [slots[int(n)] for n in mapping.index_mapping]
            self.rows.set(tokens, [slots[int(n)] for n in mapping.prompt_mapping])

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """A variant that changes nothing, for vLLM's warm-up."""
        number = int(request.lora_int_id)
        if number in self.list_adapters():
            return False
        self._dummies.add(number)
        return True

    def get_dummy_lora_warmup_rank(self, default: int) -> int:
        """Ranks mean nothing here."""
        return default

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Stand-ins need no cache."""
        yield

    def supports_tower_connector_lora(self) -> bool:
        """Variants of vision towers are not served."""
        return False

    # What our own front and the engine's core ask for.

    def leave(self, numbers: Iterable[int]) -> None:
        """Let variants go from host memory and slots. They stay registered, their files open."""
        for number in numbers:
            self._vacate(number)
            self._let_go(self._host.pop(number, None))

    def prefetch(self, path: str, drop: bool = False) -> str:
        """Begin to read a variant beside the running steps, or with `drop` forget what was read.

        No path readies the worker itself: it learns the base's digests and which hooks are called.
        A variant that is registered is read again from the files that it was registered with.

        Returns:
            `reading`, `ready`, or the error as text.
        """
        if drop:
            with self._lock:
                self._reading.pop(path, None)
            return "ready"
        self._probe()
        if not path:
            self._pool.submit(self._source.digests)
            return "ready"
        number = self._number(path)
        if number in self._host:
            return "ready"
        with self._lock:
            future = self._reading.get(path)
            if future is None:
                self._drop_unclaimed()
                future = self._reading[path] = self._pool.submit(self._load_aside, path, number)
        if not future.done():
            return "reading"
        error = future.exception()
        if error is None:
            return "ready"
        with self._lock:
            self._reading.pop(path, None)
        return str(error) or type(error).__name__

    def _number(self, path: str) -> int | None:
        """Of a variant of that path, one in host memory if there is one."""
        numbers = [n for n, known in self._paths.items() if known == path]
        held = [n for n in numbers if n in self._host]
        return next(iter(held or numbers), None)

    def _shared(self, path: str) -> tuple[DeltaRepo, LoadedVariant] | None:
        """What another name of the same content has in host memory."""
        number = self._number(path)
        if number is None or number not in self._host or untagged(path)[1] is None:
            return None
        return self._repos[number], self._host[number]

    def _drop_unclaimed(self) -> None:
        """Forget the oldest of what was read for requests that never came."""
        done = [path for path, future in self._reading.items() if future.done()]
        for path in done[: max(len(done) - _UNCLAIMED, 0)]:
            del self._reading[path]

    def _read(self, path: str, number: int | None = None) -> tuple[DeltaRepo, LoadedVariant]:
        with self._lock:
            future = self._reading.pop(path, None)
        return self._load(path, number) if future is None else future.result()

    def _load(self, path: str, number: int | None) -> tuple[DeltaRepo, LoadedVariant]:
        known = None if number is None else self._repos.get(number)
        repo = self._source.open(path) if known is None else known
        loaded = self._loader.load(repo)
        self._loader.check_called(loaded, str(repo.folder))
        self.slots.check(loaded, str(repo.folder))
        if self._device.type == "cuda":
            loaded = pinned(loaded)
        return repo, loaded

    def _load_aside(self, path: str, number: int | None) -> tuple[DeltaRepo, LoadedVariant]:
        with short_turns():
            return self._load(path, number)

    def _probe(self) -> None:
        """See once which hooks the model calls; vLLM's own warm-up may have shown it already."""
        if not self._sites.called():
            probe(self._runner, self._model, self.rows)
        self._sites.note()

    def _host_copy(self, number: int) -> LoadedVariant:
        """A registered variant in host memory; the engine's core sees to it before a step asks."""
        if number not in self._host:
            path = self._paths[number]
            self._host[number] = (self._shared(path) or self._read(path, number))[1]
        return self._host[number]

    def _activate(self, number: int, wanted: dict[int, Any]) -> None:
        if number in self._used:
            self._used.move_to_end(number)
            return
        if None not in self._slots:
            free = [n for n in self._used if n not in wanted]
            self._vacate(next((n for n in free if n not in self._pinned), free[0]))
        loaded = None if number in self._dummies else self._host_copy(number)
        slot = self._slots.index(None)
        for name, hook in self._sites.hooks.items():
            hook.put(slot, None if loaded is None else loaded.contents.get(name))
        self._slots[slot] = number
        self._used[number] = slot

    def _vacate(self, number: int) -> None:
        slot = self._used.pop(number, None)
        if slot is not None:
            self._slots[slot] = None
            for hook in self._sites.hooks.values():
                hook.put(slot, None)

    def _forget(self, number: int) -> None:
        self._vacate(number)
        self._let_go(self._repos.pop(number, None), self._host.pop(number, None))
        self._paths.pop(number, None)
        self._pinned.discard(number)
        self._dummies.discard(number)

    def _let_go(self, *things: object) -> None:
        """Free memory and files beside the steps: giving gigabytes back takes the system a while."""
        held = [thing for thing in things if thing is not None]
        if held:
            del things
            self._leaving.submit(held.clear)


def _taken(number: int, kept: str, path: str) -> DeltafoldError:
    return DeltafoldError(
        "bad-argument",
        f"lora_int_id {number} is another variant's.",
        facts=[("registered", kept), ("asked for", path)],
        fix="give each variant a number of its own, or set load_inplace to replace the old one",
    )


def _most_tokens(vllm_config: Any) -> int:
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(int(vllm_config.scheduler_config.max_num_batched_tokens), int(captured))


def manager_of(runner: Any) -> DeltaManager:
    """The runner's manager.

    Raises:
        DeltafoldError: `engine-unsupported` where the engine runs without deltas.
    """
    manager = getattr(runner, "lora_manager", None)
    if not isinstance(manager, DeltaManager):
        raise DeltafoldError(
            "engine-unsupported",
            "this engine was started without deltas.",
            fix="start it with --enable-lora --additional-config '{\"deltafold\": {}}'",
        )
    return manager
