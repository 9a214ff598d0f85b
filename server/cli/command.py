"""The running command, as a model card may show it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

#: How a run was printed, or where it went, says nothing of what it made.
_UNTOLD: Final = ("overwrite", "device", "jobs", "max_memory", "fresh")
#: Options that name files or folders of this machine.
_PLACES: Final = ("out", "recipe", "file")
#: Options that take a folder or a hub id.
_REFERENCES: Final = ("base",)


def command_line(name: str) -> str:
    """The running command: what was given, defaults left out.

    Of files and folders on this machine only the name is told.
    """
    context = click.get_current_context()
    words = ["deltafold", name]
    for parameter in context.command.params:
        key = str(parameter.name)
        given = context.get_parameter_source(key) == ParameterSource.COMMANDLINE
        if not given or not parameter.expose_value or key in _UNTOLD:
            continue
        value = context.params.get(key)
        for one in value if isinstance(value, tuple) else (value,):
            words += _words(parameter, one)
    return shlex.join(words)


def _words(parameter: click.Parameter, value: Any) -> list[str]:
    if isinstance(parameter, click.Argument):
        return [public(str(value))]
    flag = parameter.opts[0]
    if value is True:
        return [flag]
    if parameter.name in _REFERENCES:
        return [flag, public(str(value))]
    if parameter.name == "references":
        role, _, model = str(value).partition("=")
        return [flag, f"{role}={public(model)}"]
    return [flag, Path(str(value)).name if parameter.name in _PLACES else str(value)]


def public(reference: str) -> str:
    """A reference as a model card may show it: of a file or folder on this machine only the name."""
    folder = Path(reference).expanduser()
    return folder.resolve().name if folder.exists() else reference
