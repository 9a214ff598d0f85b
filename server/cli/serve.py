"""`deltafold serve`: one base and a zoo of deltas behind the OpenAI API."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NoReturn

import click

from deltafold.compress.errors import DeltafoldError
from deltafold.server.addresses import is_loopback

if TYPE_CHECKING:
    from deltafold.runtime.engine import Served

_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_SHOWN_VARIANTS = 12
_STOPS = (signal.SIGINT, signal.SIGTERM)


@click.command("serve")
@click.argument("base")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_FLAGS...]")
@click.option("--zoo", required=True, help="Folder of deltas.")
@click.option(
    "--engine",
    type=click.Choice(["embedded", "vllm"]),
    default="embedded",
    show_default=True,
    help="What runs the model; vllm starts vLLM's own server and takes its flags after --.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0: any free one.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="DELTAFOLD_API_KEY",
    help="Key that clients must send; repeat for several. [env: DELTAFOLD_API_KEY]",
)
@click.option("--served-model-name", help="One more name for the base, shown in replies.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Type of the base's weights in memory.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the model runs.",
)
@click.option(
    "--base-quantization",
    type=click.Choice(["nf4", "int8"]),
    help="Keep the base's linear layers in 4 or 8 bits.",
)
@click.option(
    "--runner",
    type=click.Choice(["auto", "generate", "pooling"]),
    default="auto",
    show_default=True,
    help="What the model is for: text, or labels and vectors; auto asks the base.",
)
@click.option("--max-model-len", type=click.IntRange(1), help="Most tokens of prompt and output.")
@click.option("--max-batch", type=click.IntRange(1), help="Most requests that run together.")
@click.option("--max-deltas", type=click.IntRange(1), help="Most variants kept in memory.")
@click.option(
    "--pin",
    "pin",
    multiple=True,
    metavar="NAME",
    help="With vllm: variant that is loaded at the start and stays; repeat for several.",
)
@click.option(
    "--strict/--no-strict",
    default=True,
    show_default=True,
    help="Check each delta against the base before it serves.",
)
@click.option(
    "--rebuild",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="Give variants that cannot be applied a dense model of their own, or refuse them.",
)
@click.option(
    "--log-level",
    type=click.Choice(["critical", "error", "warning", "info", "debug"]),
    default="info",
    show_default=True,
    help="What goes to the log on stderr.",
)
def serve(
    base: str,
    vllm_flags: tuple[str, ...],
    zoo: str,
    engine: str,
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    served_model_name: str | None,
    log_level: str,
    runner: str,
    pin: tuple[str, ...],
    **engine_options: Any,
) -> None:
    """Serve BASE and every delta of a zoo over HTTP.

    Models that generate answer chats and completions, others give labels and vectors. The server
    listens at once and answers 503 until the base is loaded. Without --api-key it can be reached
    from this machine only.
    """
    if engine == "vllm":
        refuse_open_bind(host, api_keys)
        own = _vllm_options(engine_options | {"runner": runner}) | {"uvicorn-log-level": log_level}
        if engine_options["strict"]:
            _check_zoo(base, zoo)
        _become_vllm(base, zoo, host, port, api_keys, served_model_name, own, vllm_flags, pin)
    if pin:
        raise DeltafoldError(
            "bad-argument",
            "--pin is an option of --engine vllm",
            fix="leave it out; --max-deltas is how many variants the embedded engine keeps",
        )
    if vllm_flags:
        raise DeltafoldError(
            "bad-argument",
            f"the embedded engine does not know {vllm_flags[0]!r}",
            fix="flags after -- are for --engine vllm",
        )
    require_serve_extra()
    refuse_open_bind(host, api_keys)
    logging.basicConfig(level=log_level.upper(), stream=sys.stderr, format=_LOG_FORMAT)
    given = {name: value for name, value in engine_options.items() if value is not None}

    def open_engine() -> Served:
        from deltafold.runtime import EmbeddedEngine, PoolingEngine

        text = _generates(base) if runner == "auto" else runner == "generate"
        kind: Any = EmbeddedEngine if text else PoolingEngine
        engine: Served = kind.open(base, zoo=zoo, served_model_name=served_model_name, **given)
        return engine

    _run(open_engine, host, port, api_keys, served_model_name)


def _generates(base: str) -> bool:
    from deltafold.runtime.embedded.opening import generates

    return generates(base)


def _vllm_options(options: dict[str, Any]) -> dict[str, Any]:
    """vLLM's names for our options."""
    foreign = ["base-quantization"] if options["base_quantization"] is not None else []
    foreign += [name for name in ("device", "runner") if options[name] != "auto"]
    if foreign:
        raise DeltafoldError(
            "bad-argument",
            f"--{foreign[0]} is an option of the embedded engine",
            fix="leave it out; vLLM's own flags go after --",
        )
    return {
        "dtype": options["dtype"],
        "max-model-len": options["max_model_len"],
        "max-num-seqs": options["max_batch"],
        "max-cpu-loras": options["max_deltas"],
    }


def _check_zoo(base: str, zoo: str) -> None:
    from deltafold.server.vllm.front import check_zoo

    check_zoo(base, zoo)


def _become_vllm(*given: Any) -> NoReturn:
    from deltafold.server.vllm.command import VllmServer, become

    become(VllmServer(*given))


def _run(
    open_engine: Callable[[], Served],
    host: str,
    port: int,
    api_keys: Sequence[str],
    served_model_name: str | None,
) -> None:
    from deltafold.server.app import create_app
    from deltafold.server.run import bind, make_server, url_of

    listener = bind(host, port)  # before the base is read: a taken port should fail at once
    url = url_of(listener)
    promise: Future[Served] = Future()
    server = make_server(
        create_app(promise, api_keys=api_keys, served_model_name=served_model_name)
    )

    def load() -> None:
        try:
            engine = open_engine()
        except BaseException as error:  # raised again where the server ends
            promise.set_exception(error)
            server.should_exit = True
            return
        promise.set_result(engine)
        click.echo(ready_text(url, engine, bool(api_keys)), err=True)

    click.echo(f"deltafold listens at {url} and loads the base ...", err=True)
    # A daemon: an impatient Ctrl-C must not wait for a base that is half read.
    threading.Thread(target=load, name="deltafold-load", daemon=True).start()
    with _signals_end_quietly():
        server.run(sockets=[listener])
    if promise.done():
        promise.result().close()
    click.echo("deltafold stopped", err=True)


def ready_text(url: str, engine: Served, has_key: bool) -> str:
    """What the terminal shows once requests can be answered."""
    names = [info.name for info in engine.variants() if info.parent is not None]
    shown = ", ".join(names[:_SHOWN_VARIANTS])
    if len(names) > _SHOWN_VARIANTS:
        shown += f", ... ({len(names) - _SHOWN_VARIANTS} more: GET /v1/models)"
    key = ' -H "Authorization: Bearer $DELTAFOLD_API_KEY"' if has_key else ""
    model = names[0] if names else "base"
    route, body = "/v1/completions", f'{{"model": "{model}", "prompt": "Hello", "max_tokens": 32}}'
    chat = [f"    deltafold chat --url {url}"]
    if not hasattr(engine, "submit"):
        given = "Hello" if engine.max_model_len else "data:image/png;base64,..."
        route, body, chat = "/v1/embeddings", f'{{"model": "{model}", "input": "{given}"}}', []
    return "\n".join(
        [
            "",
            f"  deltafold is ready at {url}",
            f"  base      {engine.base_name}",
            f"  variants  {shown or 'none: the zoo is empty'}",
            "  try it",
            f"    curl {url}{route}{key} \\",
            f"      -H 'content-type: application/json' -d '{body}'",
            *chat,
            "  stop      Ctrl-C",
            "",
        ]
    )


def require_serve_extra() -> None:
    """Refuse to start without the server's libraries.

    Raises:
        DeltafoldError: `missing-extra`.
    """
    needed = ("fastapi", "uvicorn", "prometheus_client")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise DeltafoldError(
            "missing-extra",
            f"serving needs packages that are not installed: {', '.join(missing)}",
            fix="pip install 'deltafold[serve]'",
        )


def refuse_open_bind(host: str, api_keys: Sequence[str]) -> None:
    """Keep a server without keys on this machine.

    Raises:
        DeltafoldError: `bad-argument`.
    """
    if any(not key.strip() for key in api_keys):
        raise DeltafoldError(
            "bad-argument",
            "an empty API key would let everyone in",
            fix="--api-key SECRET, or leave the option out and serve this machine only",
        )
    if not api_keys and not is_loopback(host):
        raise DeltafoldError(
            "bad-argument",
            f"--host {host} would let other machines in, and there is no API key",
            fix="add --api-key SECRET (or set DELTAFOLD_API_KEY), or drop --host",
        )


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more; here a stop is a normal end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.signal(number, lambda *_: None) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
