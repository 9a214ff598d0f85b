"""The options that say which codec stores which tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from deltafold.server.cli.options import F, add_options

if TYPE_CHECKING:
    from deltafold.compress import Method, Recipe


def recipe_options(command: F) -> F:
    """Decorator: `--codec`, `--set`, `--edit` and `--recipe`; `read_recipe` takes their values."""
    options = [
        click.option(
            "--codec",
            metavar="SPEC",
            help="Codec of matrices, e.g. bitdelta:bits=4,group=128 (the default).",
        ),
        click.option(
            "--set",
            "sets",
            metavar="'PATTERN=SPEC'",
            multiple=True,
            help="Codec of the tensors whose names match; repeat it, the last match wins.",
        ),
        click.option(
            "--edit",
            "edits",
            metavar="SPEC",
            multiple=True,
            help="Change the delta before its codec sees it, e.g. scale:by=1.5; PATTERN=SPEC for "
            "some tensors. Repeat it; edits are applied in order.",
        ),
        click.option(
            "--recipe",
            metavar="FILE",
            help="YAML recipe; the options above come on top of it.",
        ),
    ]
    return add_options(command, options)


def read_recipe(
    codec: str | None, sets: Sequence[str], recipe: str | None, edits: Sequence[str] = ()
) -> Recipe:
    """The recipe that options and file describe together.

    Raises:
        DeltafoldError: `unknown-codec`, `bad-recipe`, `bad-argument` or `not-found`.
    """
    from deltafold.compress import Recipe, parse_spec
    from deltafold.compress.recipe import parse_edit_for

    chosen = Recipe.from_file(recipe) if recipe else Recipe()
    if codec:
        chosen = replace(chosen, default=parse_spec(codec))
    return replace(
        chosen,
        overrides=(*chosen.overrides, *map(_override, sets)),
        edits=(*chosen.edits, *map(parse_edit_for, edits)),
    )


def _override(text: str) -> tuple[str, Method]:
    from deltafold.compress import DeltafoldError, parse_spec

    pattern, equals, spec = text.partition("=")
    if not (pattern and equals and spec):
        raise DeltafoldError(
            "bad-argument",
            f"--set {text!r} is not of the form PATTERN=SPEC.",
            fix="--set '*norm*=exact'",
        )
    try:
        return pattern, parse_spec(spec)
    except DeltafoldError as error:
        usage = error.fix.removeprefix("--codec ")
        fix = f"--set '{pattern}={usage}'" if usage != error.fix else error.fix
        raise DeltafoldError(error.code, error.message, facts=error.facts, fix=fix) from error
