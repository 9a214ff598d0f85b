"""`deltafold plan`: the memory that serving a zoo will take, before it is served."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.sizes import human
from deltafold.server.cli.output import Output, facts, output_options

if TYPE_CHECKING:
    from deltafold.runtime.vllm.plan import SlotPlan


@click.command("plan")
@click.argument("base")
@click.option("--zoo", required=True, help="Folder of deltas.")
@click.option(
    "--engine",
    type=click.Choice(["vllm"]),
    default="vllm",
    show_default=True,
    help="What will run the model.",
)
@click.option(
    "--max-loras",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Slots: variants in one step, as vLLM's flag of this name.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Type of the base's weights in memory.",
)
@output_options
@click.pass_obj
def plan(output: Output, base: str, zoo: str, engine: str, max_loras: int, dtype: str) -> None:
    """Tell what slots in GPU memory will take for BASE and a zoo, to the byte.

    It is what one GPU takes; with tensor parallelism each GPU takes about its share.

    \b
    deltafold plan Llama-3.1-8B --zoo zoo --max-loras 8
    """
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise DeltafoldError(
            "missing-extra",
            "the plan asks vLLM how it lays the model out, and vLLM is not installed.",
            fix="pip install 'deltafold[vllm]'",
        )
    with _quiet():
        from deltafold.runtime.vllm.plan import plan_slots

        made = plan_slots(base, zoo, max_loras, dtype)
    output.result({"engine": engine, "base": base, "zoo": zoo, **asdict(made)}, _text(made))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """vLLM says much on stdout, where our result goes."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _text(made: SlotPlan) -> str:
    lines = [
        ("variants", str(made.variants)),
        ("slots", str(made.slots)),
        ("packed slots", f"{human(made.packed)} ({made.packed:,} bytes)"),
        ("dense slots", f"{human(made.dense)} ({made.dense:,} bytes)"),
    ]
    if made.copies:
        lines.append(("dense in packed slots", ", ".join(made.copies)))
    return facts(lines)
