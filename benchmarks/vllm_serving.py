"""vLLM with the plugin beside plain vLLM: throughput, and what a load does to running streams.

    python benchmarks/vllm_serving.py [--hidden 1024] [--layers 8] [--rounds 12] [--json FILE]

Run it in the environment that `make test-vllm` makes. Two engines live in one process and run in pairs,
each first every other time, so that a busy machine slows both alike: plain vLLM, and vLLM with the
plugin and no variant in use. Then the second one serves variants, in pairs with plain vLLM again. After
that `deltafold serve --engine vllm` is started. Streams of the base and of a variant run. Beside them
variants are loaded for the first time, and then asked for in turns, more than stay in host memory, so
that each is read again. Gaps between the streams' tokens are compared with those of a time without
loads. The model is random: only its size matters here. Prints a table and writes JSON.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
RESULT = Path(__file__).parent / "results"
#: A variant that streams all the time, and those that are loaded beside it.
RUNNING = "running"
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
    _print(found)
    place = Path(options.json or RESULT / f"vllm-{found['machine']['kind']}.json")
    place.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    print(f"written to {place}")


def _print(found: dict[str, Any]) -> None:
    print(", ".join(str(value) for value in found["machine"].values()))
    print(f"{'throughput':30} {'tokens/s':>9} {'of plain':>9} {'low':>6} {'high':>6}")
    for name, row in found["throughput"].items():
        ratios = [f"{row[key]:.3f}" for key in ("of_plain", "lowest", "highest")]
        print(f"{name:30} {row['best']:9.1f} {ratios[0]:>9} {ratios[1]:>6} {ratios[2]:>6}")
    stalls = found["stalls"]
    print(
        f"{'gaps between tokens':30} {'tokens':>9} {'median':>9} {'p99':>6} {'max':>6}  over 50 ms"
    )
    for name in ("without loads", "first loads", "loads again"):
        row = stalls[name]
        times = [f"{row[key]:.1f}" for key in ("median_ms", "p99_ms", "longest_ms")]
        print(
            f"{name:30} {row['tokens']:9} {times[0]:>9} {times[1]:>6} {times[2]:>6}"
            f"  {row['over 50 ms']}"
        )
    for kind in ("load_seconds", "again_seconds"):
        print(kind, {name: round(seconds, 1) for name, seconds in stalls[kind].items()})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=12, help="pairs")
    parser.add_argument("--seconds", type=float, default=10, help="of streams without loads")
    parser.add_argument("--compile", action="store_true", help="not --enforce-eager")
    parser.add_argument("--json", help="file to write; benchmarks/results/vllm-cpu.json by default")
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
    for name, codec in {**CODECS, RUNNING: "bitdelta"}.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-3)
        model.save_pretrained(folder / "full")
        recipe = Recipe(default=parse_spec(codec))
        compress_checkpoint(folder / "base", folder / "full", folder / "zoo" / name, recipe=recipe)
    return folder / "base", folder / "zoo"


def _throughput(base: Path, zoo: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second, best of the rounds, and the pairs' ratios to plain vLLM: middle and ends."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    given: dict[str, Any] = {
        "max_model_len": 512,
        "max_num_seqs": 8,
        "enforce_eager": not options.compile,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    if torch.cuda.is_available():
        given["gpu_memory_utilization"] = 0.4  # of each of the two
    plain = LLM(str(base), **given)
    own = {"deltafold": {"zoo": str(zoo)}}
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
    run(plain)
    found = {"plain": {"best": run(plain), "of_plain": 1.0, "lowest": 1.0, "highest": 1.0}}
    for name, loras in {"no variant": None, "three variants and the base": mixed}.items():
        run(ours, loras)
        rates: dict[str, list[float]] = {"plain": [], name: []}
        for turn in range(options.rounds):
            for mine in (False, True) if turn % 2 else (True, False):
                rate = run(ours, loras) if mine else run(plain)
                rates[name if mine else "plain"].append(rate)
        ratios = [a / b for a, b in zip(rates[name], rates["plain"], strict=True)]
        found["plain"]["best"] = max(found["plain"]["best"], *rates["plain"])
        found[name] = {
            "best": max(rates[name]),
            "of_plain": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "best_of_best": max(rates[name]) / max(rates["plain"]),
        }
    for llm in (plain, ours):
        llm.llm_engine.engine_core.shutdown()
    gc.collect()
    return found


def _stalls(base: Path, zoo: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Gaps between tokens of running streams, in milliseconds, without and with loads beside them."""
    with _server(base, zoo, options) as url:
        _post(url, "/v1/completions", {"model": RUNNING, "prompt": [1], "max_tokens": 1}).read()
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
        again = {name: _ask(url, name) for name in CODECS}
        ended.set()
        for stream in streams:
            stream.join()
    return {
        "streams": STREAMS,
        "without loads": _summary([g for at, g in gaps if quiet <= at < loading]),
        "first loads": _within(gaps, loads),
        "loads again": _within(gaps, again),
        "load_seconds": {name: b - a for name, (a, b) in loads.items()},
        "again_seconds": {name: b - a for name, (a, b) in again.items()},
    }


def _within(
    gaps: list[tuple[float, float]], spans: dict[str, tuple[float, float]]
) -> dict[str, float]:
    return _summary([g for at, g in gaps if any(a <= at < b for a, b in spans.values())])


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
    """When a variant's load began and ended."""
    began = time.perf_counter()
    body = {"lora_name": name, "lora_path": str(zoo / name)}
    _post(url, "/v1/load_lora_adapter", body).read()
    return began, time.perf_counter()


def _ask(url: str, name: str) -> tuple[float, float]:
    """When a request of a variant began and ended, which has to be read for it."""
    began = time.perf_counter()
    request = {"model": name, "prompt": [1, 2, 3], "max_tokens": 1}
    _post(url, "/v1/completions", request).read()
    return began, time.perf_counter()


def _stream(url: str, number: int, gaps: list[tuple[float, float]], ended: threading.Event) -> None:
    """Note when each token came, and how long after the one before."""
    while not ended.is_set():
        body = {
            "model": "base" if number else RUNNING,
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
    program = Path(sys.executable).with_name("deltafold")
    words = [str(program), "serve", str(base), "--zoo", str(zoo), "--engine", "vllm"]
    words += ["--port", str(port), "--max-model-len", "512", "--", "--max-loras", "2"]
    words += ["--max-cpu-loras", "2"]
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
        "kind": "gpu" if torch.cuda.is_available() else "cpu",
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
