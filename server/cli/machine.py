"""The options that say how much of the machine packing may take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from deltafold.compress.sizes import human
from deltafold.server.cli.options import F, add_options
from deltafold.server.cli.output import facts

if TYPE_CHECKING:
    from deltafold.compress.limits import Limits
    from deltafold.compress.predict import Prediction

_NAMES = ("jobs", "max_memory", "fresh")
#: More tensors at a time than this wait for the disk and for memory.
_MOST_JOBS = 8


def machine_options(command: F) -> F:
    """Decorator: `--jobs`, `--max-memory` and `--fresh`; `MachineOptions` takes their values."""
    options = [
        click.option(
            "--jobs",
            metavar="N",
            type=click.IntRange(1),
            help="Tensors coded at a time; as many as there are cores, 8 at most, if left out; "
            "one with --calibrate.",
        ),
        click.option(
            "--max-memory",
            metavar="SIZE",
            help="Most memory of the whole process, e.g. 4GiB. What does not fit is refused at once.",
        ),
        click.option(
            "--fresh",
            is_flag=True,
            help="Start over. Without it, a run that was cut short goes on where it stopped.",
        ),
    ]
    return add_options(command, options)


@dataclass(frozen=True)
class MachineOptions:
    """What `machine_options` were given."""

    jobs: int | None = None
    max_memory: str | None = None
    fresh: bool = False

    @classmethod
    def take(cls, given: dict[str, Any]) -> MachineOptions:
        """Take the options out of a command's arguments."""
        return cls(**{name: given.pop(name) for name in _NAMES})

    @property
    def threads(self) -> int:
        """Tensors at a time."""
        return self.jobs or min(os.cpu_count() or 1, _MOST_JOBS)

    def limits(self) -> Limits:
        """The same for `predict`. Raises `bad-argument` for what is no size."""
        from deltafold.compress.limits import Limits
        from deltafold.compress.sizes import parse_size

        bound = self.max_memory
        return Limits(self.threads, parse_size(bound, "--max-memory 4GiB") if bound else None)


def prediction_data(found: Prediction) -> dict[str, Any]:
    """A prediction for programs."""
    return {
        "bytes": found.nbytes,
        "variant_bytes": found.variant_bytes,
        "ratio": found.ratio,
        "fixed": found.fixed,
        "seconds": round(found.seconds, 1),
        "timed": found.timed,
        "memory_bytes": found.memory,
        "model_bytes": found.model,
    }


def _coding(found: Prediction) -> str:
    if not found.timed:
        return "time not known: a codec runs the model"
    return f"about {found.seconds:.0f} s, besides reading both checkpoints"


def prediction_text(found: Prediction) -> str:
    """A prediction for people."""
    sure = "to the byte, if every tensor differs from the base's"
    lines = [
        ("size", f"{found.nbytes:,} bytes, {found.ratio:.2%} of {human(found.variant_bytes)}"),
        ("", sure if found.fixed else "an estimate: a codec's size depends on the data"),
        ("coding", _coding(found)),
        ("memory", human(found.memory)),
    ]
    if found.model:
        lines.append(("", f"{human(found.model)} of it to run the model; activations come on top"))
    return f"nothing was read or written but headers\n{facts(lines)}"
