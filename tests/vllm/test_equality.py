"""A mixed batch in vLLM answers as plain vLLM does with each variant's restored checkpoint.

Every tensor of every fine-tune is moved: linears, embeddings, head, norms, biases. All in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import engines
import pytest
import zoo_models


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> zoo_models.Models:
    return engines.make(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture(scope="module")
def dense(llama: zoo_models.Models) -> dict[str, list[engines.Answer]]:
    found = engines.dense_answers(llama)
    answers = {tuple(t for a in each for t in a.tokens) for each in found.values()}
    assert len(answers) == len(found), "variants must differ, or nothing is proved"
    return found


@pytest.mark.slow
def test_llama_in_every_layout_of_a_step(llama, dense):
    # Five variants on three slots; prompts in chunks of 32 tokens.
    with engines.serving(llama.base, max_num_batched_tokens=32, max_cpu_loras=8) as llm:
        found = engines.mixed_answers(llm, llama)
        engines.check_equal(found, dense)
        # Without prompt log-probabilities prefixes come from the cache, each variant's own.
        for _ in range(2):
            again = engines.mixed_answers(llm, llama, prompt_logprobs=None)
            engines.check_equal(again, dense)
        assert all(answers[2].cached for answers in again.values())


@pytest.mark.slow
def test_llama_compiled_with_dense_slots_through_a_workers_extension(llama, dense, monkeypatch):
    """As vLLM 0.33 calls extensions; the patch that 0.32 needs in their place is taken away."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    begin, stock = WorkerWrapperBase.init_device, LoRAModelRunnerMixin.load_lora_model.__wrapped__

    def init_device(self):
        begin(self)
        self.worker.init_worker_extension()

    monkeypatch.setattr(LoRAModelRunnerMixin, "load_lora_model", stock)
    monkeypatch.setattr(WorkerWrapperBase, "init_device", init_device)
    own = {"worker_extension_cls": "deltafold.runtime.vllm.extension.DeltaExtension"}
    own |= {"enforce_eager": False, "max_loras": 2}
    with engines.serving(llama.base, slots="dense", **own) as llm:
        engines.check_equal(engines.mixed_answers(llm, llama), dense)


@pytest.mark.slow
def test_llama_in_the_second_model_runner(llama, dense, tmp_path):
    """In a process of its own: whether vLLM may use Triton is settled when it is imported."""
    out = tmp_path / "answers.json"
    script = Path(__file__).with_name("second_runner.py")
    done = subprocess.run(
        [sys.executable, script, llama.base, llama.zoo, out],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(out.read_text("utf-8"))
    answers = {name: [engines.Answer(**a) for a in given] for name, given in found.items()}
    engines.check_equal(answers, {name: given[:2] for name, given in dense.items()})


@pytest.mark.slow
def test_llama_on_two_ranks_with_speculation(llama, dense, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    guess = {"method": "ngram", "num_speculative_tokens": 3}
    guess |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    own = {"speculative_config": guess, "disable_log_stats": False, "tensor_parallel_size": 2}
    # In a process of its own: vLLM's CPU build starts no second engine after it imported numba.
    with engines.serving(llama.base, in_process=False, **own) as llm:
        engines.check_equal(engines.mixed_answers(llm, llama), dense)
        statistics = {m.name: m for m in llm.get_metrics()}
        assert statistics["vllm:spec_decode_num_accepted_tokens"].value > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_biases_ties_and_norms_of_heads(tmp_path, family):
    three = {name: engines.CODECS[name] for name in ("sign1", "dare", "exact")}
    made = engines.make(tmp_path, family, three)
    expected = engines.dense_answers(made)
    with engines.plain(made.base) as llm:
        alone = engines.mixed_answers(llm, made, only_base=True)["base"]
    for slots in ("forms", "dense"):
        with engines.serving(made.base, slots=slots) as llm:
            found = engines.mixed_answers(llm, made)
        engines.check_equal(found, expected)
        assert found["base"] == alone, "rows of the base are bit for bit those of a plain batch"
