"""What the command line makes of an exception: a message, and an exit status."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import click

from deltafold.server.cli.output import Output

if TYPE_CHECKING:
    from deltafold.compress.errors import DeltafoldError

INTERRUPTED = 130
BUG = 1


def interrupted(error: BaseException, output: Output) -> int:
    """Ctrl-C. Whatever was going on has cleaned up after itself, and noted what it kept."""
    message = "; ".join(["interrupted", *getattr(error, "__notes__", ())])
    if output.as_json:
        output.failure_json("interrupted", message)
    else:
        click.echo(message, err=True)
    return INTERRUPTED


def explain(error: Exception, output: Output) -> int:
    """Tell the user about an error, and return the exit status."""
    if output.debug:
        traceback.print_exception(error)
    known = _known(error)
    if known is None:
        return _bug(error, output)
    if output.as_json:
        output.emit({"error": known.to_json()})
    else:
        head, _, rest = str(known).partition("\n")
        text = output.style(head, fg="red") + (f"\n{rest}" if rest else "")
        click.echo(text, err=True)
    return known.exit_code


def _known(error: Exception) -> DeltafoldError | None:
    # Imported here, where something has failed: the package brings torch along.
    from deltafold.compress.errors import DeltafoldError
    from deltafold.compress.memory import ran_out

    if isinstance(error, DeltafoldError):
        return error
    if ran_out(error):
        return DeltafoldError(
            "not-enough-memory",
            "this machine's memory is not enough.",
            fix="close other programs, or use a machine with more",
        )
    if isinstance(error, OSError) and error.filename is not None:
        return DeltafoldError("not-found", f"{error.filename}: {error.strerror}.")
    return None


def _bug(error: Exception, output: Output) -> int:
    kind = type(error).__name__
    advice = "" if output.debug else " Run it again with --debug for the traceback, and report it."
    message = f"this is a bug in deltafold: {kind}: {error}.{advice}"
    if output.as_json:
        output.failure_json("bug", message)
    else:
        click.echo(message, err=True)
    return BUG
