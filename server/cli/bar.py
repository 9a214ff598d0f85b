"""Progress on stderr: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TextIO

from deltafold.compress.memory import peak_memory

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
        self._phase = ""
        self._done = self._bytes = 0
        self._began = self._printed = 0.0

    def __call__(self, event: Progress) -> None:
        """Draw one step."""
        # The two models are hashed one after the other: the count starts again.
        if event.phase != self._phase or event.done <= self._done:
            self._start(event)
        self._done = event.done
        self._bytes += event.nbytes
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
        self._phase = event.phase
        self._done = self._bytes = 0
        self._began = self._printed = time.monotonic()
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
        self._bar.update(self._done - self._bar.n)
        if last:  # tqdm draws ten times a second at most, and a short run is shorter
            self._bar.refresh()

    def _print(self, event: Progress) -> None:
        self._printed = time.monotonic()
        left = (self._printed - self._began) / event.done * (event.total - event.done)
        eta = f", {left:.0f} s left" if event.done < event.total else ""
        print(
            f"{event.phase}: {event.done}/{event.total} tensors, {self._rate()}, "
            f"peak {peak_memory_text()}{eta}",
            file=self._stream,
            flush=True,
        )

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-6)
        return f"{self._bytes / seconds / 1e9:.2f} GB/s"


def peak_memory_text() -> str:
    """The same in GiB."""
    return f"{peak_memory() / 2**30:.1f} GiB"
