"""Room in memory: how much is left, and what is said when there is not enough.

Systems that promise more memory than they have end a process that takes them at their word. So what a
dense model will take is compared with what is left before it is made.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import torch

from deltafold.compress import DeltafoldError
from deltafold.compress.memory import ran_out
from deltafold.compress.sizes import human

T = TypeVar("T")

_FIX: Final = (
    "keep fewer variants in memory (--max-deltas), or serve on a machine with more; --rebuild never "
    "refuses at once what needs a dense model"
)
_GROUPS: Final = Path("/sys/fs/cgroup")


def need_room(nbytes: int, device: torch.device, what: str) -> None:
    """Refuse what would not fit.

    Args:
        nbytes: that will be taken.
        device: of that memory.
        what: takes it; how the error's message begins.

    Raises:
        DeltafoldError: `not-enough-memory`.
    """
    left = room(device)
    if left is not None and nbytes > left:
        raise _error(what, [("needed", human(nbytes)), ("left", f"{human(left)} ({device})")])


def room(device: torch.device) -> int | None:
    """Bytes that can still be taken of a device's memory; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    return min(_main_memory(), default=None)


def within_memory(what: str, work: Callable[[], T]) -> T:
    """What `work` returns.

    Raises:
        DeltafoldError: `not-enough-memory` where memory ran out in it, and whatever else it raises.
    """
    try:
        return work()
    except Exception as error:
        if not ran_out(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    # Outside of the handler: the error must not keep alive what had been made until then.
    raise _error(what, [("reason", reason)])


def _error(what: str, facts: list[tuple[str, object]]) -> DeltafoldError:
    return DeltafoldError(
        "not-enough-memory", f"{what}: there is not enough memory.", facts=facts, fix=_FIX
    )


def _main_memory() -> Iterator[int]:
    """What the machine, the process's limits and its control groups leave, each in bytes."""
    known = _numbers(Path("/proc/meminfo"))
    if "MemAvailable" in known:
        yield 1024 * (known["MemAvailable"] + known.get("SwapFree", 0))
    mine = _numbers(Path("/proc/self/status"))
    for kind, held in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and held in mine:
            yield max(0, limit - 1024 * mine[held])
    for group in _control_groups():
        limit_, used = _number(group / "memory.max"), _number(group / "memory.current")
        if limit_ is not None and used is not None:
            # Cached files are given up when somebody asks.
            yield max(0, limit_ - used + _numbers(group / "memory.stat").get("inactive_file", 0))


def _control_groups() -> Iterator[Path]:
    """Version 2 control groups of this process, the innermost first."""
    try:
        lines = Path("/proc/self/cgroup").read_text("ascii").splitlines()
    except (OSError, ValueError):
        return
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is not None:
        inner = _GROUPS / own.strip("/")
        yield from (g for g in (inner, *inner.parents) if g.is_relative_to(_GROUPS))


def _numbers(file: Path) -> dict[str, int]:
    """The numbers of a file of the system's that has a name and a number a line."""
    try:
        lines = [line.replace(":", " ").split() for line in file.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text("ascii"))
    except (OSError, ValueError):
        return None
