"""What the API process knows of deltas: the zoo's names, and loading without stalling anybody."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from deltafold.compress import Checkpoint
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.fingerprint import Digests, digest_source
from deltafold.compress.lora import cached_lora
from deltafold.runtime.vllm.settings import Settings
from deltafold.runtime.vllm.source import Source, tagged, untagged
from deltafold.runtime.zoo import Zoo, ZooEntry

#: Between two looks at a variant that the workers are reading.
_LOOK_SECONDS = 0.02


class Front:
    """Beside vLLM's table of served models. Blocking work runs in threads.

    Args:
        engine: vLLM's engine client.
        settings: the plugin's.
        base: what vLLM was given as its model.
        names: that stand for the base.
    """

    def __init__(self, engine: Any, settings: Settings, base: str, names: list[str]) -> None:
        self._engine, self._settings = engine, settings
        self._base, self._names = base, names
        self._opening = asyncio.Lock()
        self._opened: tuple[Source, Zoo] | None = None

    async def entries(self) -> list[ZooEntry]:
        """The zoo's deltas that can be served, as its folder is now."""
        _, zoo = await self._open()
        await asyncio.to_thread(zoo.rescan)
        return [entry for entry in zoo.entries() if entry.error is None]

    async def find(self, name: str) -> str:
        """The path of a variant of the zoo.

        Raises:
            DeltafoldError: `variant-not-found`, or what is wrong with it.
        """
        _, zoo = await self._open()
        entry = await asyncio.to_thread(zoo.find, name)
        return tagged(entry.folder, entry.opened().digest)

    async def prepare(self, path: str) -> str:
        """Check a delta and have every worker read it beside the running steps.

        Returns:
            Its path with its digest, which is how the workers and the prefix cache know it.

        Raises:
            DeltafoldError: what is wrong with it.
        """
        self._check_place(path)
        source, _ = await self._open()
        repo = await asyncio.to_thread(source.open, path)
        whole = tagged(untagged(path)[0], repo.digest)
        while True:
            states = await self._engine.collective_rpc("deltafold_prefetch", args=(whole,))
            wrong = [s for s in states if s not in ("reading", "ready")]
            if wrong:
                await self._engine.collective_rpc("deltafold_prefetch", args=(whole, True))
                raise RefusedError(wrong[0])
            if all(state == "ready" for state in states):
                return whole
            await asyncio.sleep(_LOOK_SECONDS)

    def _check_place(self, path: str) -> None:
        if self._settings.any_path:
            return
        folder = Path(untagged(path)[0]).expanduser().resolve()
        zoo = Path(self._settings.zoo).expanduser().resolve()
        if not self._settings.zoo or zoo not in folder.parents:
            raise DeltafoldError(
                "bad-argument",
                "only deltas of the zoo may be loaded.",
                fix="put the delta into the zoo, or start vLLM itself with any_path",
            )

    async def _open(self) -> tuple[Source, Zoo]:
        async with self._opening:
            if self._opened is None:
                self._opened = await asyncio.to_thread(self._read)
            return self._opened

    def _read(self) -> tuple[Source, Zoo]:
        source = Source(Checkpoint.open(self._base))
        folder = Path(self._settings.zoo).expanduser() if self._settings.zoo else None
        return source, open_zoo(source.base, source.digests(), folder, self._names)


class RefusedError(Exception):
    """What a worker said of a variant, as text: errors do not cross processes whole."""


def open_zoo(base: Checkpoint, digests: Digests, folder: Path | None, names: list[str]) -> Zoo:
    """A zoo of deltas and LoRAs for a base.

    Raises:
        DeltafoldError: `not-found`, `bad-argument`.
    """
    return Zoo(
        folder,
        digests,
        base.reference.name,
        reserved={"base", *names},
        import_lora=lambda lora: cached_lora(base, lora),
    )


def check_zoo(base: str, zoo: str) -> None:
    """Raises what is wrong with the first broken delta of a zoo."""
    checkpoint = Checkpoint.open(base)
    opened = open_zoo(checkpoint, digest_source(checkpoint), Path(zoo).expanduser(), [])
    for entry in opened.entries():
        entry.opened()
