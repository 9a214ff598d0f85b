"""The demo's zoo: each shipped fine-tune, packed afresh by several codecs.

What is shipped is the base and each fine-tune as a lossless delta: an artifact of our own format. The
other codecs are packed from it on the spot, which takes seconds and shows the main job.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deltafold.compress import DeltaRepo, Recipe, compress_checkpoint, parse_spec
from deltafold.server.demo.tasks import VARIANT_TASKS


@dataclass(frozen=True, slots=True)
class Codec:
    """One column of the demo's table."""

    label: str
    suffix: str
    spec: str


#: The shipped codec comes first: it is the fine-tune itself.
CODECS: Final = (
    Codec("lossless", "", "lossless"),
    Codec("4 bit", "-4bit", "bitdelta:bits=4,group=64"),
    Codec("2 bit", "-2bit", "bitdelta:bits=2,group=64"),
    Codec("1 bit", "-1bit", "bitdelta:bits=1,group=64"),
    Codec("DARE 50%", "-dare50", "dare:drop=0.5"),
    Codec("DARE 90%", "-dare90", "dare:drop=0.9"),
)


def data_folder() -> Path:
    """Where the shipped models lie, in the installed package."""
    return Path(__file__).parent / "data"


def variant_name(task: str, codec: Codec) -> str:
    """The served name of a task's delta in one codec."""
    return task + codec.suffix


def build_zoo(
    shipped: Path, zoo: Path, progress: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Fill `zoo` with every task in every codec.

    Args:
        shipped: holds `base/` and `zoo/<task>/`, lossless deltas.
        zoo: an empty folder.
        progress: called with a line for each task.

    Returns:
        Size over the full copy by task and codec label.
    """
    sizes: dict[str, dict[str, float]] = {}
    for task in VARIANT_TASKS:
        source = shipped / "zoo" / task
        shutil.copytree(source, zoo / task)
        sizes[task] = {CODECS[0].label: DeltaRepo.open(source).manifest.totals.ratio}
        for codec in CODECS[1:]:
            report = compress_checkpoint(
                shipped / "base",
                source,
                zoo / variant_name(task, codec),
                recipe=Recipe(default=parse_spec(codec.spec)),
            )
            sizes[task][codec.label] = report.ratio
        shown = ", ".join(f"{label} {ratio:.0%}" for label, ratio in sizes[task].items())
        progress(f"{task:<10} {shown}")
    return sizes


def pack_shipped(models: Path, out: Path, progress: Callable[[str], None]) -> None:
    """From freshly trained checkpoints to what is shipped.

    Args:
        models: holds `base/` and a folder a task, as `train.retrain` writes them.
        out: receives `base/` and `zoo/<task>/`; replaced if it exists.
        progress: called with a line for each task.
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(models / "base", out / "base")
    for task in VARIANT_TASKS:
        report = compress_checkpoint(
            out / "base",
            models / task,
            out / "zoo" / task,
            recipe=Recipe(default=parse_spec("lossless")),
            command="deltafold demo --retrain",
        )
        progress(f"{task:<10} packed losslessly, {report.ratio:.0%} of the full copy")
