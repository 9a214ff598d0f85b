"""Answers of vLLM's second model runner, whose own kernels run in Triton's interpreter.

    python second_runner.py BASE ZOO OUT

vLLM asks Triton for a CPU backend before it lets that runner start. The interpreter needs none.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def main(base: Path, zoo: Path, out: Path) -> None:
    """Serve the base and all variants in one batch."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    from vllm.triton_utils import HAS_TRITON

    del backends["cpu"]
    assert HAS_TRITON
    import engines

    requests = {"base": None}
    for number, folder in enumerate(sorted(zoo.iterdir()), 1):
        requests[folder.name] = engines.request(folder.name, number, folder)
    found = {}
    with engines.serving(base) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        assert "cpu.model_runner" in type(worker.model_runner).__module__
        prompts = [prompt for prompt in engines.PROMPTS[:2] for _ in requests]
        variants = [request for _ in engines.PROMPTS[:2] for request in requests.values()]
        answers = engines.ask(llm, prompts, variants)
    for number, name in enumerate(requests):
        found[name] = [asdict(answer) for answer in answers[number :: len(requests)]]
    out.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
