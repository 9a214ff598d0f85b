"""What the API process knows of deltas: the zoo's names, and loading without stalling anybody."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from deltafold.compress import Checkpoint
from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.vllm.aside import reading_pool, short_turns
from deltafold.runtime.vllm.hosted import room_of
from deltafold.runtime.vllm.settings import Settings
from deltafold.runtime.vllm.source import Source, tagged, untagged
from deltafold.runtime.vllm.texts import OwnText, Texts, texts_of
from deltafold.runtime.zoo import Zoo, ZooEntry

_T = TypeVar("_T")
#: Between two looks at a variant that the workers are reading.
_LOOK_SECONDS = 0.02
#: Between two tries to forget a variant that requests still run.
_RELEASE_SECONDS = 0.5


class Front:
    """Beside vLLM's table of served models. Blocking work runs in threads.

    Args:
        engine: vLLM's engine client.
        settings: the plugin's.
        base: what vLLM was given as its model.
        names: that stand for the base.

    Attributes:
        settings: as given.
    """

    def __init__(self, engine: Any, settings: Settings, base: str, names: list[str]) -> None:
        self._engine, self.settings = engine, settings
        self._base, self._names = settings.base or base, names
        self._opening = asyncio.Lock()
        self._pool = reading_pool("deltafold-front", threads=4)
        self._opened: tuple[Source, Zoo, Texts] | None = None
        self._room = max(room_of(engine.vllm_config.lora_config) - len(settings.pin), 0)
        self._recent: OrderedDict[str, None] = OrderedDict()

    async def ready(self) -> None:
        """Open the base and the zoo, and have the workers ready themselves, before anybody asks."""
        await self._open()
        await self._engine.collective_rpc("deltafold_prefetch", args=("",))

    async def entries(self) -> list[ZooEntry]:
        """The zoo's deltas that can be served, as its folder is now."""
        _, zoo, _ = await self._open()
        await self._aside(zoo.rescan)
        return [entry for entry in zoo.entries() if entry.error is None]

    async def find(self, name: str) -> str:
        """The path of a variant of the zoo.

        Raises:
            DeltafoldError: `variant-not-found`, or what is wrong with it.
        """
        _, zoo, _ = await self._open()
        entry = await self._aside(zoo.find, name)
        return tagged(entry.folder, entry.opened().digest)

    async def near(self, name: str) -> str:
        """Words for a client that asked for a name that is not served: near names of the zoo."""
        try:
            await self.find(name)
        except DeltafoldError as error:
            return f" {error}"
        return ""

    async def prepare(self, path: str) -> str:
        """Check a delta and have every worker read it beside the running steps.

        Returns:
            Its path with its digest, which is how the workers and the prefix cache know it.

        Raises:
            DeltafoldError: what is wrong with it.
        """
        self._check_place(path)
        source, _, texts = await self._open()
        repo = await self._aside(source.open, path)
        whole = tagged(untagged(path)[0], repo.digest)
        await self._aside(texts.read, repo.digest, repo.folder)
        await self._read_by_workers(whole)
        return whole

    async def ensure(self, lora_request: Any) -> None:
        """Have a variant that left host memory read again before its request goes to the engine.

        The workers are asked only where it can have left: where as many others as they keep were asked
        for since.

        Raises:
            RefusedError: what is wrong with it by now.
        """
        path = lora_request.lora_path
        if path not in self._recent:
            await self._read_by_workers(path)
        self._recent[path] = None
        self._recent.move_to_end(path)
        while len(self._recent) > self._room:
            self._recent.popitem(last=False)

    async def _read_by_workers(self, path: str) -> None:
        while True:
            states = await self._engine.collective_rpc("deltafold_prefetch", args=(path,))
            wrong = [s for s in states if s not in ("reading", "ready")]
            if wrong:
                await self._engine.collective_rpc("deltafold_prefetch", args=(path, True))
                raise RefusedError(wrong[0])
            if all(state == "ready" for state in states):
                return
            await asyncio.sleep(_LOOK_SECONDS)

    async def release(self, lora_request: Any, others: Iterable[Any]) -> None:
        """Have the workers forget a variant, its files and its memory, once no request runs it.

        Args:
            lora_request: which was taken out of the table of served models.
            others: those that are still in it.
        """
        number = lora_request.lora_int_id
        while number in await self._engine.list_loras():
            if await self._engine.remove_lora(number):
                break
            await asyncio.sleep(_RELEASE_SECONDS)
        _, _, texts = await self._open()
        if lora_request.lora_path not in {other.lora_path for other in others}:
            texts.forget(lora_request.lora_path)

    async def text_of(self, lora_request: Any) -> OwnText | None:
        """What a loaded variant does not share with the base's text."""
        _, _, texts = await self._open()
        return texts.of(lora_request)

    def _check_place(self, path: str) -> None:
        if self.settings.any_path:
            return
        folder = Path(untagged(path)[0]).expanduser().resolve()
        zoo = Path(self.settings.zoo).expanduser().resolve()
        if not self.settings.zoo or zoo not in folder.parents:
            raise DeltafoldError(
                "bad-argument",
                "only deltas of the zoo may be loaded.",
                fix="put the delta into the zoo, or start vLLM itself with any_path",
            )

    async def _aside(self, work: Callable[..., _T], *given: Any) -> _T:
        """Run what blocks in a thread that steps back for the streams."""

        def turned() -> _T:
            with short_turns():
                return work(*given)

        return await asyncio.get_running_loop().run_in_executor(self._pool, turned)

    async def _open(self) -> tuple[Source, Zoo, Texts]:
        async with self._opening:
            if self._opened is None:
                self._opened = await self._aside(self._read)
            return self._opened

    def _read(self) -> tuple[Source, Zoo, Texts]:
        source = Source(Checkpoint.open(self._base))
        folder = Path(self.settings.zoo).expanduser() if self.settings.zoo else None
        zoo = source.zoo(folder, self._names)
        return source, zoo, texts_of(self._engine, source.base.folder)


class RefusedError(Exception):
    """What a worker said of a variant, as text: errors do not cross processes whole."""


def check_zoo(base: str, zoo: str) -> None:
    """Raises what is wrong with the first broken delta of a zoo."""
    source = Source(Checkpoint.open(base))
    for entry in source.zoo(Path(zoo).expanduser()).entries():
        entry.opened()
