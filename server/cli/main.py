"""`deltafold`: the group of all commands.

Commands are imported when they are run, so that help comes at once: neither torch nor a web
framework is loaded to print a list of names.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final, NamedTuple

import click

from deltafold.server.cli.failures import explain, interrupted
from deltafold.server.cli.output import Output, debug_option


class Lazy(NamedTuple):
    """A command's place, the line that lists it, and the extra that brings what it needs."""

    place: str
    help: str
    extra: str = "serve"


_ROOM: Final = "deltafold.server.cli"
COMMANDS: Final[Mapping[str, Lazy]] = {
    "compress": Lazy(f"{_ROOM}.compress:compress", "Pack a fine-tune as a delta against its base."),
    "family": Lazy(
        f"{_ROOM}.family:family", "Pack several fine-tunes as deltas that share tensors."
    ),
    "import-blocks": Lazy(
        f"{_ROOM}.import_blocks:import_blocks", "Turn steps on rows and columns into a delta."
    ),
    "import-lora": Lazy(
        f"{_ROOM}.import_lora:import_lora", "Turn a PEFT LoRA into a delta against its base."
    ),
    "merge": Lazy(f"{_ROOM}.merge:merge", "Merge several deltas of one base into one."),
    "inspect": Lazy(f"{_ROOM}.inspect:inspect", "Show what is in a delta, or in a zoo of deltas."),
    "verify": Lazy(f"{_ROOM}.verify:verify", "Check a delta's files, payload, base and coverage."),
    "eval": Lazy(
        f"{_ROOM}.eval:evaluate", "Measure a delta beside its fine-tune, and record it.", "hf"
    ),
    "diagnose": Lazy(
        f"{_ROOM}.diagnose:diagnose", "Tell what codecs and edits would do to the loss.", "hf"
    ),
    "restore": Lazy(f"{_ROOM}.restore:restore", "Write the fine-tune as a full checkpoint again."),
    "export": Lazy(
        f"{_ROOM}.export:export", "Write a delta as a LoRA folder or a full checkpoint."
    ),
    "report": Lazy(
        f"{_ROOM}.report:report", "Draw a delta or a zoo: bytes, errors, quality, memory."
    ),
    "zoo": Lazy(f"{_ROOM}.zoo:zoo", "Look after a zoo: add, list, rm, alias, gc, verify."),
    "pull": Lazy(f"{_ROOM}.pull:pull", "Fetch a delta from the hub, and verify it.", "hf"),
    "push": Lazy(f"{_ROOM}.push:push", "Verify a delta, and upload it to the hub.", "hf"),
    "plan": Lazy(f"{_ROOM}.plan:plan", "Tell the memory that serving a zoo will take.", "vllm"),
    "serve": Lazy(f"{_ROOM}.serve:serve", "Serve a base and a zoo over the OpenAI API."),
    "chat": Lazy(f"{_ROOM}.chat:chat", "Talk to the variants of a running server."),
    "demo": Lazy(
        f"{_ROOM}.demo:demo", "Pack, serve and compare real fine-tunes, all tiny.", "demo"
    ),
    "codecs": Lazy(f"{_ROOM}.codecs:codecs", "List the codecs and their options."),
    "schema": Lazy(f"{_ROOM}.schema:schema", "Print the JSON schema of delta_config.json."),
    "version": Lazy(f"{_ROOM}.version:version", "Print the versions that matter in a report."),
}


class Program(click.Group):
    """A group that loads its commands late and tells failures in one way for all of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order in which people meet them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        lazy = COMMANDS.get(cmd_name)
        return None if lazy is None else _load(cmd_name, lazy)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, with near names for one that does not exist."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=2)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"there is no command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table instead of from their modules."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.help) for name, lazy in COMMANDS.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note first whether JSON is asked for: a wrong command line is answered in JSON too."""
        ctx.obj = Output(as_json="--json" in args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; every failure ends in a message and an exit status."""
        output: Output = ctx.obj
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if not output.as_json:
                raise
            output.failure_json("bad-argument", error.format_message())
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as error:
            ctx.exit(interrupted(error, output))
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            ctx.exit(explain(error, output))


def _load(name: str, lazy: Lazy) -> click.Command:
    module, _, attribute = lazy.place.partition(":")
    try:
        command: click.Command = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing == "deltafold":
            raise click.UsageError(f"{name} is not part of this installation.") from error
        from deltafold.compress.errors import DeltafoldError

        raise DeltafoldError(
            "missing-extra",
            f"deltafold {name} needs {missing}, which is not installed.",
            fix=f"pip install 'deltafold[{lazy.extra}]'",
        ) from error
    return command


@click.group("deltafold", cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@debug_option
def cli() -> None:
    """Many full fine-tunes of one model as small deltas, served together.

    \b
    deltafold compress BASE FINE_TUNE -o zoo/sql
    deltafold serve BASE --zoo zoo
    """


def main() -> None:
    """The entry point of the `deltafold` program."""
    cli(prog_name="deltafold")


if __name__ == "__main__":
    main()
