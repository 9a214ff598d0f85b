"""`deltafold chat`: talk to the variants of a running server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import click

from deltafold.compress.errors import DeltafoldError
from deltafold.server.client import Client

_HELP = """\
/model NAME  switch the variant and keep the conversation
/models      list what the server has
/reset       forget the conversation
/quit        leave (also Ctrl-D)"""


@dataclass
class Conversation:
    """What was said so far, and to whom the next message goes."""

    client: Client
    model: str
    max_tokens: int | None = None
    temperature: float = 0.0
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Send a message and print the answer as it comes. A failure leaves no trace."""
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        try:
            pieces = self.client.chat(self.model, asked, self.max_tokens, self.temperature)
            for piece in pieces:
                answer += piece
                click.echo(piece, nl=False)
        except KeyboardInterrupt:  # enough: what was said stays
            click.echo(" ...", nl=False)
        finally:
            click.echo()
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash."""
        name, _, argument = line[1:].partition(" ")
        if name == "model" and argument.strip():
            self.model = self.client.model(argument.strip())
            click.echo(f"now talking to {self.model}", err=True)
        elif name in ("model", "models"):
            for one in self.client.models():
                click.echo(f"{'*' if one == self.model else ' '} {one}")
        elif name == "reset":
            self.messages = []
            click.echo("conversation forgotten", err=True)
        elif name == "help":
            click.echo(_HELP)
        else:
            raise DeltafoldError("bad-argument", f"unknown command /{name}", fix=_HELP)


@click.command("chat")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server.")
@click.option("--model", help="Variant to talk to; the base if left out.")
@click.option(
    "--api-key",
    envvar="DELTAFOLD_API_KEY",
    help="The server's key. [env: DELTAFOLD_API_KEY]",
)
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer.")
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="0 gives the same answer every time.",
)
def chat(
    url: str, model: str | None, api_key: str | None, max_tokens: int | None, temperature: float
) -> None:
    """Talk to a server; /model NAME switches the variant in mid-conversation.

    If the input is not a terminal, each of its lines is answered, and the first failure ends it.
    """
    client = Client(url, api_key)
    chosen = client.model(model) if model else client.models()[0]
    conversation = Conversation(client, chosen, max_tokens, temperature)
    interactive = sys.stdin.isatty()
    if interactive:
        click.echo(f"talking to {chosen} at {url}; /help lists commands", err=True)
    for line in _typed(conversation) if interactive else _piped():
        if line in ("/quit", "/exit"):
            break
        _act(conversation, line, interactive)


def _act(conversation: Conversation, line: str, interactive: bool) -> None:
    try:
        if line.startswith("/"):
            conversation.command(line)
        elif line:
            conversation.say(line)
    except DeltafoldError as error:
        if not interactive:
            raise
        click.echo(str(error), err=True)


def _typed(conversation: Conversation) -> Iterator[str]:
    """Lines from the terminal, with history and editing where Python has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input(f"{conversation.model}> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return


def _piped() -> Iterator[str]:
    for line in sys.stdin:
        yield line.strip()
