"""Progress on stderr: a bar in a terminal, a line now and then elsewhere, JSON for programs."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, TextIO

from deltafold.compress.memory import peak_memory
from deltafold.server.cli.meter import Meter

if TYPE_CHECKING:
    from tqdm import tqdm

    from deltafold.compress.progress import Progress

#: Seconds between two lines where there is no terminal.
_EVERY = 10.0


class Bar:
    """A listener for progress events.

    Args:
        stream: where to draw; a terminal gets a bar.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._bar: tqdm[Any] | None = None
        self._meter = Meter()
        self._printed = 0.0

    def __call__(self, event: Progress) -> None:
        """Draw one step."""
        if self._meter.count(event):
            self._start(event)
        if self._live:
            self._draw(last=event.done == event.total)
        elif event.done == event.total or time.monotonic() - self._printed >= _EVERY:
            self._print(event)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _start(self, event: Progress) -> None:
        self.close()
        self._printed = time.monotonic()
        if self._live:
            from tqdm import tqdm

            self._bar = tqdm(
                total=event.total,
                desc=event.phase,
                file=self._stream,
                leave=False,
                dynamic_ncols=True,
                bar_format="{desc:<8}{n_fmt}/{total_fmt} tensors |{bar}|{postfix}, {remaining} left",
            )

    def _draw(self, *, last: bool) -> None:
        assert self._bar is not None
        self._bar.set_postfix_str(f"{self._rate()}, peak {peak_memory_text()}", refresh=False)
        self._bar.update(self._meter.done - self._bar.n)
        if last:  # tqdm draws ten times a second at most, and a short run is shorter
            self._bar.refresh()

    def _print(self, event: Progress) -> None:
        self._printed = time.monotonic()
        left = self._meter.seconds_left(event)
        eta = f", {left:.0f} s left" if event.done < event.total else ""
        print(
            f"{event.phase}: {event.done}/{event.total} tensors, {self._rate()}, "
            f"peak {peak_memory_text()}{eta}",
            file=self._stream,
            flush=True,
        )

    def _rate(self) -> str:
        return f"{self._meter.bytes_per_second / 1e9:.2f} GB/s"


class Events:
    """The same for programs: each step as a line with one JSON object.

    Args:
        stream: where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._meter = Meter()

    def __call__(self, event: Progress) -> None:
        """Write one step."""
        self._meter.count(event)
        data = {
            "phase": event.phase,
            "name": event.name,
            "done": event.done,
            "total": event.total,
            "bytes": event.nbytes,
            "bytes_per_second": round(self._meter.bytes_per_second),
            "seconds_left": round(self._meter.seconds_left(event), 1),
            "peak_memory_bytes": peak_memory(),
        }
        print(json.dumps({"progress": data}, ensure_ascii=False), file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is left to do."""


def peak_memory_text() -> str:
    """The same in GiB."""
    return f"{peak_memory() / 2**30:.1f} GiB"
