"""`deltafold version`: what a bug report should name."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import click

from deltafold.server.cli.output import Output, facts, output_options

_OTHERS = ("torch", "safetensors", "transformers", "vllm")


@click.command("version")
@output_options
@click.pass_obj
def version(output: Output) -> None:
    """Print the version of deltafold and of what it works with.

    \b
    deltafold version
    """
    # Asked of the metadata: importing torch to print its version takes a second.
    versions = {
        "deltafold": _version("deltafold") or "unknown",
        "python": platform.python_version(),
    }
    versions |= {name: found for name in _OTHERS if (found := _version(name))}
    others = [(name, found) for name, found in versions.items() if name != "deltafold"]
    output.result(versions, f"deltafold {versions['deltafold']}\n{facts(others)}")


def _version(name: str) -> str | None:
    try:
        return installed(name)
    except PackageNotFoundError:
        return None
