"""Two and three bits, and PEFT's own folders; and vLLM's own LoRA, which the plugin leaves alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import adapters
import engines
import pytest
import zoo_models
from safetensors.torch import load_file, save_file

CODECS = {"sign2": "bitdelta:bits=2,group=32", "int3": "int:bits=3,group=32"}
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
ALPHA, RANK = 8, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> zoo_models.Models:
    models = engines.make(tmp_path_factory.mktemp("formats"), "Llama", CODECS)
    adapter(models)
    variants = (*models.variants, "adapter")
    return zoo_models.Models(models.base, models.zoo, models.dense, variants)


def adapter(made: zoo_models.Models) -> None:
    """A PEFT LoRA folder in the zoo, and the base with it merged in."""
    merged, factors = load_file(made.base / "model.safetensors"), {}
    for name in [n for n in merged if n.removesuffix(".weight").endswith(TARGETS)]:
        module, (out, into) = name.removesuffix(".weight"), merged[name].shape
        own = adapters.factors(module, out, into, RANK, seed=len(factors))
        down, up = own[f"{module}.lora_A.weight"], own[f"{module}.lora_B.weight"]
        merged[name] += ALPHA / RANK * (up @ down)
        factors |= own
    assert factors
    modules = [target.rpartition(".")[2] for target in TARGETS]
    adapters.write_adapter(
        made.zoo / "adapter", factors, lora_alpha=ALPHA, r=RANK, target_modules=modules
    )
    dense = shutil.copytree(made.base, made.dense / "adapter")
    save_file(merged, dense / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
def test_two_and_three_bits_and_a_lora_folder_answer_as_their_dense_checkpoints(made):
    expected = engines.dense_answers(made, base=False)
    tokens = {str([a.tokens for a in answers]) for answers in expected.values()}
    assert len(tokens) == len(expected), "variants must differ, or nothing is proved"
    with engines.serving(made.base) as llm:
        found = engines.mixed_answers(llm, made)
        del found["base"]
        engines.check_equal(found, expected)
    # An engine without our settings serves the folder by vLLM's own means.
    with engines.plain(made.base, enable_lora=True, max_loras=1, max_lora_rank=8) as llm:
        lora = engines.request("adapter", 1, made.zoo / "adapter")
        # Without log-probabilities of prompts, on which vLLM 0.32 itself fails with LoRA.
        loras = [lora] * len(engines.PROMPTS)
        stock = engines.ask(llm, engines.PROMPTS, loras, prompt_logprobs=None)
        engines.check_equal({"adapter": stock}, expected)


OTHER_VERSION = """
import vllm
vllm.__version_tuple__ = (0, 26, 0)
from vllm.config import VllmConfig
from vllm.v1.engine.core import EngineCore
from deltafold.runtime.vllm import plugin
from deltafold.server.vllm import names
stock = EngineCore.add_request
plugin.install()
names.install()
assert EngineCore.add_request is stock
VllmConfig()
try:
    VllmConfig(additional_config={"deltafold": {}})
except Exception as error:
    assert "only in 0.32 and 0.33" in str(error), error
else:
    raise AssertionError("deltas were taken")
"""


@pytest.mark.slow
def test_in_another_version_vllm_starts_without_deltas_alone(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", OTHER_VERSION], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert b"serves no deltas in vLLM" in done.stderr
