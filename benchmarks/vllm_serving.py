"""vLLM with the plugin beside plain vLLM: throughput, and what a load does to running streams.

    python benchmarks/vllm_serving.py [--hidden 1024] [--layers 8] [--rounds 6] [--json FILE]

Run it in the environment that `make test-vllm` makes. Two engines live in one process and take turns,
so that a busy machine slows both alike: plain vLLM, and vLLM with the plugin and no variant in use.
Then the second one serves variants. After that `deltafold serve --engine vllm` is started, streams run,
and variants are loaded and unloaded beside them; gaps between tokens are compared with those of a time
without loads. The model is random: only its size matters here.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
CODECS = {"sign1": "bitdelta", "int4": "int:bits=4,group=128", "exact": "lossless"}
STREAMS, PROMPT = 4, 64


def main() -> None:
    """Measure and print."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DELTAFOLD_HOME"] = str(Path(folder) / "home")
        base, zoo = _models(Path(folder), options)
        found = {"machine": _machine(), "model": vars(options) | {"json": None}}
        found["throughput"] = _throughput(base, zoo, options)
        found["stalls"] = _stalls(base, zoo, options)
    text = json.dumps(found, indent=2)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n", "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=10, help="of streams without loads")
    parser.add_argument("--compile", action="store_true", help="not --enforce-eager")
    parser.add_argument("--json", help="file to write")
    return parser.parse_args()


def _models(folder: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """A random Llama in bfloat16, and fine-tunes of it in a zoo."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from deltafold.compress import Recipe, compress_checkpoint, parse_spec

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        max_position_embeddings=1024,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    for name, codec in CODECS.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-3)
        model.save_pretrained(folder / "full")
        recipe = Recipe(default=parse_spec(codec))
        compress_checkpoint(folder / "base", folder / "full", folder / "zoo" / name, recipe=recipe)
    return folder / "base", folder / "zoo"


def _throughput(base: Path, zoo: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second, best and middle of the rounds, and ratios of both to plain vLLM's."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    given: dict[str, Any] = {
        "max_model_len": 512,
        "max_num_seqs": 8,
        "enforce_eager": not options.compile,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    plain = LLM(str(base), **given)
    own = {"deltafold": {}}
    ours = LLM(str(base), enable_lora=True, max_loras=3, additional_config=own, **given)
    variants = [LoRARequest(n, i, str(zoo / n)) for i, n in enumerate(CODECS, 1)]
    sampling = SamplingParams(
        temperature=0, max_tokens=options.tokens, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": list(range(10 + i, 10 + i + PROMPT))} for i in range(8)]

    def run(llm: Any, loras: list[Any] | None = None) -> float:
        began = time.perf_counter()
        llm.generate(prompts, sampling, lora_request=loras, use_tqdm=False)
        return len(prompts) * options.tokens / (time.perf_counter() - began)

    mixed = [None if i % 4 == 3 else variants[i % 4] for i in range(len(prompts))]
    cases: dict[str, Callable[[], float]] = {
        "plain": lambda: run(plain),
        "no variant": lambda: run(ours),
        "three variants and the base": lambda: run(ours, mixed),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for turn in range(options.rounds):
        names = list(cases) if turn % 2 else list(reversed(cases))
        for name in names:
            rates[name].append(cases[name]())
    pairs = zip(rates["no variant"], rates["plain"], strict=True)
    found: dict[str, Any] = {
        name: {"best": max(r), "median": statistics.median(r)} for name, r in rates.items()
    }
    for figures in found.values():
        figures["of_plain"] = figures["best"] / found["plain"]["best"]
    found["median of the rounds' ratios, no variant"] = statistics.median(a / b for a, b in pairs)
    for llm in (plain, ours):
        llm.llm_engine.engine_core.shutdown()
    gc.collect()
    return found


def _stalls(base: Path, zoo: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Gaps between tokens of running streams, in milliseconds, without and with loads beside them."""
    with _server(base, zoo, options) as url:
        gaps: list[tuple[float, float]] = []
        ended = threading.Event()
        streams = [
            threading.Thread(target=_stream, args=(url, number, gaps, ended))
            for number in range(STREAMS)
        ]
        for stream in streams:
            stream.start()
        time.sleep(3)  # warmed up
        quiet = time.perf_counter()
        time.sleep(options.seconds)
        loading = time.perf_counter()
        loads = {name: _load(url, name, zoo) for name in CODECS}
        ended.set()
        for stream in streams:
            stream.join()
    return {
        "streams": STREAMS,
        "without loads": _summary([g for at, g in gaps if quiet <= at < loading]),
        "during loads": _summary(
            [g for at, g in gaps if any(a <= at < b for a, b in loads.values())]
        ),
        "load_seconds": {name: b - a for name, (a, b) in loads.items()},
    }


def _summary(gaps: list[float]) -> dict[str, float]:
    ordered = sorted(g * 1e3 for g in gaps)
    return {
        "tokens": len(ordered),
        "median_ms": statistics.median(ordered),
        "p99_ms": ordered[int(len(ordered) * 0.99)],
        "longest_ms": ordered[-1],
        "over 50 ms": sum(gap > 50 for gap in ordered),
    }


def _load(url: str, name: str, zoo: Path) -> tuple[float, float]:
    """When a variant's load began and ended. It is then used once and unloaded."""
    began = time.perf_counter()
    body = {"lora_name": f"own-{name}", "lora_path": str(zoo / name)}
    _post(url, "/v1/load_lora_adapter", body).read()
    ended = time.perf_counter()
    request = {"model": f"own-{name}", "prompt": [1, 2, 3], "max_tokens": 1}
    _post(url, "/v1/completions", request).read()
    _post(url, "/v1/unload_lora_adapter", {"lora_name": f"own-{name}"}).read()
    return began, ended


def _stream(url: str, number: int, gaps: list[tuple[float, float]], ended: threading.Event) -> None:
    """Note when each token came, and how long after the one before."""
    while not ended.is_set():
        body = {
            "model": "base",
            "prompt": list(range(10 + number, 40 + number)),
            "max_tokens": 400,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        before = None
        with _post(url, "/v1/completions", body) as reply:
            for line in reply:
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                if before is not None:
                    gaps.append((now, now - before))
                before = now
                if ended.is_set():
                    break


def _post(url: str, path: str, body: dict[str, Any]) -> Any:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=600)


@contextmanager
def _server(base: Path, zoo: Path, options: argparse.Namespace) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [sys.executable, "-m", "deltafold.server.cli.main"]
    program = Path(sys.executable).with_name("deltafold")
    words = [str(program), "serve", str(base), "--zoo", str(zoo), "--engine", "vllm"]
    words += ["--port", str(port), "--max-model-len", "512", "--", "--max-loras", "2"]
    words += ["--max-num-seqs", "8", "--skip-tokenizer-init", "--no-enable-prefix-caching"]
    words += [] if options.compile else ["--enforce-eager"]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    server = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            assert server.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.25)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def _machine() -> dict[str, str]:
    import torch
    import vllm

    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "python": platform.python_version(),
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((n.partition(":")[2].strip() for n in lines if n.startswith("model name")), "CPU")


if __name__ == "__main__":
    main()
