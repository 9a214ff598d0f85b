"""Groups of options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def add_options(command: F, options: Sequence[Callable[[F], F]]) -> F:
    """A command with options, which its help lists in the order given."""
    for option in reversed(options):  # click prepends
        command = option(command)
    return command
