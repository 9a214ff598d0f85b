"""`deltafold demo`: the whole path on a laptop, without a GPU or a network."""

from __future__ import annotations

import json
import tempfile
import threading
from pathlib import Path

import click

from deltafold.compress.errors import DeltafoldError

NEXT = """\
Next:
  deltafold demo --serve                      keep it running, then in another terminal:
  deltafold chat --model shout-4bit           give it lower-case words of 3 to 8 letters, which is
                                              all it knows; /model reverse-4bit switches
  deltafold compress BASE VARIANT -o zoo/NAME pack a fine-tune of your own
  deltafold serve BASE --zoo zoo              serve it"""


@click.command("demo")
@click.option("--serve", "keep", is_flag=True, help="Keep serving until Ctrl-C.")
@click.option("--port", type=int, help="Port of the server; 8000 with --serve, else a free one.")
@click.option(
    "--retrain", type=click.Path(path_type=Path), help="Train the models again, into this folder."
)
@click.option("--words", default=32, show_default=True, help="Unseen words to ask each variant.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def demo(keep: bool, port: int | None, retrain: Path | None, words: int, as_json: bool) -> None:
    """Pack five real fine-tunes by six codecs, serve all thirty at once, compare them.

    The models are tiny (half a million weights), really trained, and shipped with the package. Nothing
    is restored to disk: one base in memory, every variant a delta beside it.

    \b
    Example:
      deltafold demo
      deltafold demo --retrain ./models     (a few minutes on two cores)
    """
    from deltafold.server.demo.zoo import data_folder

    _require_extras()
    shipped = data_folder() if retrain is None else _retrain(retrain)
    if not (shipped / "base" / "config.json").is_file():
        raise DeltafoldError(
            "not-found", f"{shipped} holds no demo models.", fix="deltafold demo --retrain ./models"
        )
    with tempfile.TemporaryDirectory(prefix="deltafold-demo-") as folder:
        _run(shipped, Path(folder), keep=keep, port=port, words=words, as_json=as_json)


def _require_extras() -> None:
    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import transformers  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise DeltafoldError(
            "missing-extra",
            f"the demo needs {error.name}.",
            fix="pip install 'deltafold[demo]'",
        ) from error


def _retrain(folder: Path) -> Path:
    from deltafold.server.demo.train import retrain
    from deltafold.server.demo.zoo import pack_shipped

    _say("training the base and five fine-tunes of it (a few minutes) ...")
    retrain(folder / "full", _say)
    pack_shipped(folder / "full", folder / "data", _say)
    return folder / "data"


def _run(
    shipped: Path, zoo: Path, *, keep: bool, port: int | None, words: int, as_json: bool
) -> None:
    from deltafold.runtime import EmbeddedEngine
    from deltafold.server.app import create_app
    from deltafold.server.demo.run import measure, shipped_bytes
    from deltafold.server.demo.table import render
    from deltafold.server.demo.zoo import build_zoo
    from deltafold.server.run import BackgroundServer

    if port is None:
        port = 8000 if keep else 0
    _say("packing five fine-tunes against their base, six codecs each ...")
    sizes = build_zoo(shipped, zoo, _say)
    with (
        EmbeddedEngine.open(shipped / "base", zoo=zoo, device="cpu") as engine,
        BackgroundServer(create_app(engine), port=port) as server,
    ):
        _say(f"serving all of them from one base at {server.url}")
        result = measure(server.url, sizes, shipped_bytes(shipped), words, _say)
        click.echo(json.dumps(result.to_json()) if as_json else f"\n{render(result)}\n\n{NEXT}")
        if keep:
            _say(f"\nstill serving at {server.url}; Ctrl-C ends it")
            threading.Event().wait()


def _say(line: str) -> None:
    click.echo(line, err=True)
