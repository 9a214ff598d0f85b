"""A scripted engine: real threads, no model. It exercises the HTTP mechanics, nothing else.

Its variants: `base` repeats the prompt, `sql` shouts it, `law` reverses it. `slow` takes 20 ms a
token and never stops by itself; the others misbehave as their names say. Tokens are characters.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import openai
import pytest

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.engine import (
    Chunk,
    Output,
    Stats,
    Ticket,
    TokenLogprob,
    VariantInfo,
)
from deltafold.server.app import create_app
from deltafold.server.run import BackgroundServer

BASE = "org/tiny"
DIGESTS = {
    "base": "sha256:b0b0cafe" + "0" * 56,
    "sql": "sha256:3f2a9c11" + "1" * 56,
    "law": "sha256:77aa0001" + "2" * 56,
    "slow": "sha256:510f0000" + "3" * 56,
    "checksum": "sha256:bad00001" + "4" * 56,
    "base-mismatch": "sha256:bad00002" + "5" * 56,
    "not-enough-memory": "sha256:bad00003" + "6" * 56,
    "crash": "sha256:bad00004" + "7" * 56,
    "dies-at-once": "sha256:bad00005" + "8" * 56,
    "dies-later": "sha256:bad00006" + "9" * 56,
    "loads-slowly": "sha256:510f0001" + "a" * 56,
    "odd:name@beef": "sha256:0dd00000" + "b" * 56,
}
LIMIT = 512


class _Run:
    def __init__(self, ticket, request, on_chunk):
        self.ticket, self.request, self.on_chunk = ticket, request, on_chunk
        self.script = _script(request)
        self.sent = 0
        self.cancelled = False


def _script(request) -> str:
    prompt = _text(request.prompt)
    if request.sampling.temperature > 0:
        draw = random.Random(request.sampling.seed)
        return "".join(draw.choice("abcdefgh") for _ in range(8))
    return {"sql": prompt.upper(), "law": prompt[::-1]}.get(request.variant, prompt)


def _text(prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], int):
        return "".join(map(chr, prompt))
    return " ".join(message["content"] for message in prompt)


class ScriptedEngine:
    base_name = BASE
    max_model_len = LIMIT

    def __init__(self):
        self.forget()
        #: `loads-slowly` waits while this is not set.
        self.disk = threading.Event()
        self.disk.set()
        self.closed = False
        self._runs: list[_Run] = []
        self._lock = threading.Condition()
        self._generated = 0
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def forget(self):
        self.cancels: list[str] = []
        self.requests = []
        self._tickets = 0

    def submit(self, request, on_chunk):
        info = self.resolve(request.variant)
        if info.name == "crash":
            raise ZeroDivisionError("secret detail")
        if info.name in ("checksum", "base-mismatch", "not-enough-memory"):
            raise DeltafoldError(
                info.name, f"{info.name} of /disk/zoo", facts=[("path", "/disk/zoo")], fix="mend it"
            )
        if info.name == "loads-slowly":
            self.disk.wait()
        ids = tuple(self.encode(info.name, request.prompt))
        if len(ids) + (request.sampling.max_tokens or 0) > LIMIT:
            raise DeltafoldError("context-length", f"{len(ids)} tokens do not fit in {LIMIT}")
        with self._lock:
            self.requests.append(request)
            self._tickets += 1
            ticket = Ticket(f"t{self._tickets}", info.name, info.digest, ids)
            if request.sampling.echo:
                ticket.prompt_logprobs.append(None)
                ticket.prompt_logprobs.extend(self._logprob(chr(i), 1) for i in ids[1:])
            self._runs.append(_Run(ticket, request, on_chunk))
            self._lock.notify()
        return ticket

    def cancel(self, ticket_id):
        with self._lock:
            self.cancels.append(ticket_id)
            for run in self._runs:
                run.cancelled |= run.ticket.id == ticket_id

    def generate(self, requests):
        for request in requests:
            done = threading.Event()
            text = []

            def on_chunk(chunk, text=text, done=done):
                text.append(chunk.text)
                if chunk.finish_reason:
                    done.set()

            ticket = self.submit(request, on_chunk)
            done.wait()
            yield Output(ticket.variant, ticket.digest, "".join(text), (), 0, "stop")

    def variants(self):
        return [self.resolve(name) for name in DIGESTS]

    def resolve(self, name):
        name = "base" if name == BASE else name
        if name not in DIGESTS:
            raise DeltafoldError(
                "variant-not-found",
                f"no variant '{name}'",
                facts=[("near", "sql, law")],
                fix="GET /v1/models",
            )
        base = name == "base"
        return VariantInfo(
            name,
            DIGESTS[name],
            None if base else BASE,
            codec="" if base else "sign",
            delta_bytes=0 if base else 25,
            variant_bytes=100,
            tier="device" if base else "host",
            created=1700000000,
            quality={} if base else {"top1": 0.99},
            applied=None if base else "rebuilt",
            obstacle="" if base else "mixer.A_log",
        )

    def encode(self, variant, prompt):
        return [ord(char) for char in _text(prompt)]

    def decode(self, variant, token_ids):
        return "".join(map(chr, token_ids))

    def stats(self):
        with self._lock:
            running = [run.ticket.variant for run in self._runs]
            by_variant = {name: running.count(name) for name in running}
            return Stats(
                len(running), 2, 7, 3, 0, self._generated, 1, 50, 100, by_variant, {"sql": 1000}
            )

    def close(self):
        with self._lock:
            self.closed = True
            self._lock.notify()
        self._thread.join()

    @property
    def running(self) -> int:
        with self._lock:
            return len(self._runs)

    def _loop(self):
        while True:
            with self._lock:
                while not self._runs and not self.closed:
                    self._lock.wait()
                if self.closed:
                    break
                runs = list(self._runs)
            slow = all(run.request.variant == "slow" for run in runs)
            time.sleep(0.02 if slow else 0.0005)
            for run in runs:
                self._step(run)
        for run in self._runs:
            run.on_chunk(Chunk("", finish_reason="cancelled"))

    def _step(self, run):
        chunk = self._next_chunk(run)
        run.sent += len(chunk.token_ids)
        with self._lock:
            self._generated += len(chunk.token_ids)
            if chunk.finish_reason:
                self._runs.remove(run)
        run.on_chunk(chunk)

    def _next_chunk(self, run) -> Chunk:
        sampling, name = run.request.sampling, run.request.variant
        if run.cancelled:
            return Chunk("", finish_reason="cancelled")
        if name == "dies-at-once":
            error = DeltafoldError("not-enough-memory", "no room for the cache")
            return Chunk("", finish_reason="error", error=error)
        if name == "dies-later" and run.sent == 2:
            return Chunk("", finish_reason="error", error=ZeroDivisionError("secret detail"))
        if run.sent == sampling.max_tokens:
            return Chunk("", finish_reason="length")
        if name == "slow":
            return Chunk("z", (122,), finish_reason=None)
        if run.sent == len(run.script):
            return Chunk("", finish_reason="stop")
        char = run.script[run.sent]
        if char in sampling.stop:
            return Chunk("", (ord(char),), finish_reason="stop")
        logprobs = ()
        if sampling.logprobs is not None:
            logprobs = (self._logprob(char, sampling.logprobs),)
        return Chunk(char, (ord(char),), logprobs)

    def _logprob(self, char, count) -> TokenLogprob:
        others = [("?", float("-inf")), ("\ufffd", -3.0)]
        top = [TokenLogprob(ord(char), char, -0.5)]
        top += [TokenLogprob(ord(text), text, value) for text, value in others]
        return TokenLogprob(ord(char), char, -0.5, tuple(top[:count]))


@pytest.fixture
def make_engine() -> Iterator[Callable[[], ScriptedEngine]]:
    engines = []

    def make():
        engines.append(ScriptedEngine())
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def shared_server() -> Iterator[tuple[ScriptedEngine, str]]:
    """Starting and stopping a server takes a third of a second: most tests share this one."""
    engine = ScriptedEngine()
    with BackgroundServer(create_app(engine)) as server:
        yield engine, server.url
    engine.close()


@pytest.fixture
def engine(shared_server, eventually) -> ScriptedEngine:
    engine = shared_server[0]
    eventually(lambda: engine.running == 0)
    engine.forget()
    return engine


@pytest.fixture
def url(shared_server, engine) -> str:
    return shared_server[1]


@pytest.fixture
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    def wait(condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "did not happen within 20 s"
            time.sleep(0.01)

    return wait
