"""What a command prints, for people and for programs.

Results go to stdout: text, or with `--json` exactly one JSON object. Everything else (progress, notes,
errors as text) goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from deltafold.compress.progress import OnProgress

Command = TypeVar("Command", bound=Callable[..., Any])


class Output:
    """Renders a command's results.

    Attributes:
        as_json: one JSON object instead of text.
        quiet: no progress and no notes.
        debug: tracebacks.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.quiet = False
        self.debug = False

    def result(self, data: Mapping[str, Any], text: str) -> None:
        """Print the outcome: `data` under `--json`, else `text`."""
        if self.as_json:
            self.emit(data)
        else:
            click.echo(text)

    def emit(self, data: Mapping[str, Any]) -> None:
        """Print one JSON object on stdout."""
        click.echo(json.dumps(data, ensure_ascii=False, default=str))

    def failure_json(self, code: str, message: str) -> None:
        """Print an error that is not a `DeltafoldError`, in the same shape."""
        self.emit({"error": {"code": code, "message": message, "facts": {}, "fix": ""}})

    def style(self, text: str, **styles: Any) -> str:
        """Coloured text; plain where `NO_COLOR` is set. click drops colours outside terminals."""
        return text if os.environ.get("NO_COLOR") else click.style(text, **styles)

    @contextlib.contextmanager
    def progress(self) -> Iterator[OnProgress]:
        """A listener for a long run's events, on stderr while the block runs."""
        if self.quiet or os.environ.get("DELTAFOLD_PROGRESS") == "0":
            yield lambda event: None
            return
        from deltafold.server.cli.bar import Bar, Events

        listener = Events(sys.stderr) if self.as_json else Bar(sys.stderr)
        with contextlib.closing(listener):
            yield listener


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Columns aligned with spaces.

    Args:
        head: names of the columns.
        rows: cells.
        right: names of the columns that are aligned to the right, separated by spaces.
    """
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    to_right = [name in right.split() for name in head]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, to_right, strict=True)
        ).rstrip()
        for line in lines
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """`label  value` lines, indented and aligned."""
    width = max((len(label) for label, _ in pairs), default=0)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in pairs)


def _flag(name: str, attribute: str, text: str) -> Callable[[Command], Command]:
    def note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            setattr(ctx.ensure_object(Output), attribute, True)

    return click.option(
        name, is_flag=True, is_eager=True, expose_value=False, callback=note, help=text
    )


debug_option = _flag("--debug", "debug", "Print tracebacks.")
json_option = _flag("--json", "as_json", "Print one JSON object.")
quiet_option = _flag("--quiet", "quiet", "Print no progress.")


def output_options(command: Command) -> Command:
    """Decorator: `--json` and `--debug`."""
    return json_option(debug_option(command))
