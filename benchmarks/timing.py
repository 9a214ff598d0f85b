"""Times of calls that are taken in turn, so that whatever slows a machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

#: Calls of one measurement on a GPU, each with other copies of the weights.
CALLS = 4
#: Rounds that every case gets, and milliseconds of one call in sum after which it gets no more.
_LEAST_ROUNDS, _ENOUGH = 3, 500.0
Call = Callable[[int], torch.Tensor]


def time_in_turn(
    cases: dict[str, Call], device: torch.device, rounds: int
) -> dict[str, tuple[float, float] | str]:
    """Least and median milliseconds of one call, or why a case failed.

    Args:
        cases: each takes the number of the call, by which it chooses its copy of the weights.
        device: where they run; on a GPU each case is captured into a graph of `CALLS` calls.
        rounds: how often each is timed.
    """
    ready: dict[str, Callable[[], object]] = {}
    found: dict[str, tuple[float, float] | str] = {}
    with torch.inference_mode():
        for name, call in cases.items():
            try:
                ready[name] = _captured(call) if device.type == "cuda" else _plain(call)
            except Exception as error:  # whatever a case's package may raise
                found[name] = why_not(error)
        times: dict[str, list[float]] = {name: [] for name in ready}
        for done in range(rounds):
            for name, run in ready.items():
                # Slow cases need fewer rounds, and there are many of them.
                if done < _LEAST_ROUNDS or sum(times[name]) < _ENOUGH:
                    times[name].append(_once(run, device) / (CALLS if device.type == "cuda" else 1))
    return found | {n: (min(t), statistics.median(t)) for n, t in times.items()}


def why_not(error: Exception) -> str:
    """An error in one short line, for a table."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:100]}"


def _plain(call: Call) -> Callable[[], object]:
    call(0)
    return partial(call, 0)


def _captured(call: Call) -> Callable[[], None]:
    """A graph of several calls, after they ran once for what they compile and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Where a capture fails, torch leaves the stream that it captured on current. This one is our own,
    # and the block around it goes back to the stream before.
    with torch.cuda.stream(stream):
        for i in range(CALLS):
            call(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(CALLS):
                call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end.record()
    end.synchronize()
    return float(start_event.elapsed_time(end))


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes read and written by a copy of `size` bytes, a second."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy(i: int) -> torch.Tensor:
        return target.copy_(source)

    times = time_in_turn({"copy": copy}, device, 10)["copy"]
    assert not isinstance(times, str), times
    return 2 * size / (times[0] * 1e-3)
