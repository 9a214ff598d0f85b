"""Which variants the workers keep in host memory: decided in the core, where requests are known.

A step must find its variants in memory. Reading one there would hold up every stream, and what is wrong
with its files by then would end the engine. So a variant stays for as long as a request of it waits or
runs, and one that left is brought back before its next request is scheduled.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any


def room_of(lora_config: Any) -> int:
    """How many variants stay in host memory, those with requests aside."""
    slots = int(lora_config.max_loras)
    return max(int(lora_config.max_cpu_loras or slots), slots)


class Hosted:
    """Variants in host memory, least recently asked for first.

    Args:
        room: how many stay, as long as no more of them are pinned or have requests.
        load: has every worker load a variant; raises what is wrong with it.
        leave: has every worker let variants go, by number.
    """

    def __init__(
        self, room: int, load: Callable[[Any], object], leave: Callable[[list[int]], object]
    ) -> None:
        self._room, self._load, self._leave = room, load, leave
        self._held: OrderedDict[int, str] = OrderedDict()
        self._pinned: set[int] = set()
        self._asked: dict[int, Any] = {}

    def ready(self, lora: Any, live: Callable[[], Collection[int]], *, again: bool = False) -> bool:
        """Have a variant in host memory.

        Args:
            lora: vLLM's `LoRARequest`.
            live: tells the numbers of variants that requests wait for or run.
            again: whether it is to be read again if it is there.

        Returns:
            Whether it had to be loaded.

        Raises:
            DeltafoldError: what is wrong with it (a `RuntimeError` with its text from another process).
        """
        number = int(lora.lora_int_id)
        if not again and self._held.get(number) == lora.lora_path:
            self._held.move_to_end(number)
            return False
        self._load(lora)
        self._asked[number] = lora
        self._held[number] = lora.lora_path
        self._held.move_to_end(number)
        stay = {*live(), *self._pinned, number}
        over = max(len(self._held) - self._room, 0)
        leaving = [n for n in self._held if n not in stay][:over]
        if leaving:
            self._leave(leaving)
            for old in leaving:
                del self._held[old]
        return True

    def pin(self, number: int, live: Callable[[], Collection[int]]) -> None:
        """Keep a variant whatever else is asked for; raises as `ready` does."""
        if number in self._asked:
            self.ready(self._asked[number], live)
            self._pinned.add(number)

    def forget(self, number: int) -> None:
        """It was removed."""
        self._held.pop(number, None)
        self._asked.pop(number, None)
        self._pinned.discard(number)
