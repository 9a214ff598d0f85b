"""What is wrong with a variant is the error of who asked for it; the engine serves on."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import engines
import failures
import pytest
import talker
import torch
import zoo_models

from deltafold.compress import DeltafoldError
from deltafold.runtime.vllm.source import tagged
from deltafold.runtime.vllm.variant import Loader


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> zoo_models.Models:
    folder = tmp_path_factory.mktemp("failures")
    codecs = {"sign1": "bitdelta", "rank8": "svd:rank=8"}
    models = engines.make(folder, "Llama", codecs, vocab_size=136)
    talker.make(folder)
    for name in ("temporary", "flipped"):
        shutil.copytree(models.zoo / "sign1", models.zoo / name)
    payload = models.zoo / "flipped" / "delta.safetensors"
    raw = bytearray(payload.read_bytes())
    raw[-3] ^= 1
    payload.write_bytes(raw)
    return models


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> zoo_models.Models:
    """Another base: the same names and shapes, other values."""
    return engines.make(
        tmp_path_factory.mktemp("other"), "Llama", {"exact": "lossless"}, initializer_range=0.1
    )


@pytest.mark.slow
def test_a_bad_variant_is_refused_and_the_engine_serves_on(made, other, tmp_path, monkeypatch):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    bad = {
        "not-found": made.zoo / "nowhere",
        "not-a-delta": made.base,
        "checksum": made.zoo / "flipped",
        "engine-unsupported": failures.resized(made.base.parent, made.base.parent / "resized"),
    }
    with engines.serving(made.base, max_loras=1, max_cpu_loras=1) as llm:
        good = engines.request("sign1", 1, made.zoo / "sign1")
        before = engines.ask(llm, engines.PROMPTS, [good] * 4)
        for number, (code, path) in enumerate(bad.items(), 10):
            with pytest.raises(DeltafoldError) as caught:
                engines.ask(llm, [[1, 2, 3]], [engines.request(code, number, path)])
            assert caught.value.code == code
            with pytest.raises(DeltafoldError):
                llm.llm_engine.add_lora(engines.request(code, number, path))
            assert number not in llm.llm_engine.list_loras()
        wrong = tagged(made.zoo / "sign1", "sha256:" + "0" * 64)
        with pytest.raises(DeltafoldError, match="was replaced"):
            llm.llm_engine.add_lora(engines.request("replaced", 20, wrong))

        # A variant that was registered is served on after its folder is gone, evicted or not.
        temporary = engines.request("temporary", 2, made.zoo / "temporary")
        first = engines.ask(llm, engines.PROMPTS, [temporary] * 4)
        shutil.rmtree(made.zoo / "temporary")
        assert engines.ask(llm, engines.PROMPTS, [good] * 4) == before
        assert engines.ask(llm, engines.PROMPTS, [temporary] * 4) == first

        # Offline too a variant ends by its own end token; text would be the base's tokenizer's.
        speaker = engines.request("talker", 4, made.zoo / "talker")
        own = talker.Dense(made.base.parent)
        prompt = own.render([{"role": "user", "content": "hello"}])
        greedy = SamplingParams(temperature=0, max_tokens=talker.MOST)
        (out,) = llm.generate({"prompt_token_ids": prompt}, greedy, lora_request=speaker)
        assert list(out.outputs[0].token_ids) == own.generate(prompt)
        with pytest.raises(VLLMValidationError, match="a tokenizer of its own"):
            llm.generate("hello", greedy, lora_request=speaker)

        # With room for one in host memory, a pinned variant is read once, whoever comes between.
        read, load = [], Loader.load
        monkeypatch.setattr(Loader, "load", lambda *a: read.append(a[1].folder.name) or load(*a))
        assert llm.llm_engine.pin_lora(1)
        rank8 = engines.request("rank8", 3, made.zoo / "rank8")
        for one in (rank8, temporary, rank8, good):
            engines.ask(llm, [[1, 2, 3]], [one])
        assert read == ["sign1", "rank8", "temporary", "rank8"]

        temporary_files = str(made.zoo / "temporary")
        assert temporary_files in Path("/proc/self/maps").read_text()
        assert llm.llm_engine.remove_lora(3)
        assert llm.llm_engine.remove_lora(2)
        for _ in range(100):  # it is let go of beside the steps
            if temporary_files not in Path("/proc/self/maps").read_text():
                break
            time.sleep(0.05)
        assert temporary_files not in Path("/proc/self/maps").read_text()
        assert llm.llm_engine.list_loras() == {1, 4}
        with pytest.raises(DeltafoldError, match="not-found"):
            engines.ask(llm, [[1, 2, 3]], [temporary])
        assert engines.ask(llm, engines.PROMPTS, [good] * 4) == before


@pytest.mark.slow
def test_what_left_memory_is_read_beside_the_steps_and_fails_alone(made, monkeypatch):
    flipped = shutil.copytree(made.zoo / "sign1", made.zoo / "overwritten")
    shortened = shutil.copytree(made.zoo / "sign1", made.zoo / "shortened")
    readers, load, go_on = [], Loader.load, threading.Event()

    def loading(loader: Loader, repo: Any) -> Any:
        readers.append(threading.current_thread().name)
        assert go_on.wait(60)
        return load(loader, repo)

    with engines.serving(made.base, max_loras=1, max_cpu_loras=1) as llm:
        good, rank8 = (
            engines.request(name, n, made.zoo / name)
            for n, name in enumerate(("sign1", "rank8"), 1)
        )
        first = engines.ask(llm, engines.PROMPTS, [good] * 4)
        odd = [engines.request(p.name, n, p) for n, p in enumerate((flipped, shortened), 3)]
        for one in odd:
            assert engines.ask(llm, engines.PROMPTS, [one] * 4) == first
        other = engines.ask(llm, engines.PROMPTS, [rank8] * 4)
        failures.overwrite(flipped, lambda raw: raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
        failures.overwrite(shortened, lambda raw: raw[: len(raw) // 2])
        for one, code in zip(odd, ("checksum", "truncated"), strict=True):
            with pytest.raises(DeltafoldError) as caught:
                engines.ask(llm, [[1, 2, 3], [4, 5]], [rank8, one])
            assert caught.value.code == code
            assert engines.ask(llm, engines.PROMPTS, [rank8] * 4) == other

        # A read that does not end holds nobody up, and the step that needs the variant reads nothing.
        monkeypatch.setattr(Loader, "load", loading)
        ahead = ("deltafold_prefetch", None, (good.lora_path,))
        assert llm.llm_engine.engine_core.collective_rpc(*ahead) == ["reading"]
        assert engines.ask(llm, engines.PROMPTS, [rank8] * 4) == other
        go_on.set()
        for _ in range(200):
            if llm.llm_engine.engine_core.collective_rpc(*ahead) == ["ready"]:
                break
            time.sleep(0.05)
        assert engines.ask(llm, engines.PROMPTS, [good] * 4) == first
        assert len(readers) == 1
        assert readers[0].startswith("deltafold-read")

        # A number stands for one variant; another path under it is no silent stand-in.
        with pytest.raises(DeltafoldError, match="another variant's") as caught:
            engines.ask(llm, [[1, 2, 3]], [engines.request("other", 1, made.zoo / "rank8")])
        assert caught.value.code == "bad-argument"
        assert engines.ask(llm, engines.PROMPTS, [good] * 4) == first


@pytest.mark.slow
def test_a_tensor_that_is_read_around_its_hook_is_refused(made, monkeypatch):
    from vllm.model_executor.models.llama import LlamaMLP

    plain = LlamaMLP.forward

    def around(self: Any, x: torch.Tensor) -> torch.Tensor:
        # What a fused kernel would do: the same numbers, the layer itself never called.
        layer = self.down_proj
        h, _ = self.gate_up_proj(x)
        inner = getattr(layer.quant_method, "inner", layer.quant_method)
        return inner.apply(layer, self.act_fn(h))

    monkeypatch.setattr(LlamaMLP, "forward", around)
    with engines.serving(made.base) as llm:
        assert plain is not LlamaMLP.forward
        with pytest.raises(DeltafoldError, match="down_proj") as caught:
            engines.ask(llm, [[1, 2, 3]], [engines.request("sign1", 1, made.zoo / "sign1")])
        assert caught.value.code == "engine-unsupported"
        # A server asks ahead, and hears the same.
        path, core = str(made.zoo / "sign1"), llm.llm_engine.engine_core
        told = "reading"
        while told == "reading":
            (told,) = core.collective_rpc("deltafold_prefetch", None, (path,))
        assert "down_proj" in told
        assert len(engines.ask(llm, [[1, 2, 3]])[0].tokens) == 12


@pytest.mark.slow
def test_in_a_process_of_its_own_a_bad_variant_ends_its_request_alone(made, other, monkeypatch):
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    with engines.serving(made.base, in_process=False) as llm:
        good = engines.request("sign1", 1, made.zoo / "sign1")
        before = engines.ask(llm, engines.PROMPTS, [good] * 4)
        # Packed against another base; told by content, not by name.
        foreign = engines.request("foreign", 5, other.zoo / "exact")
        with pytest.raises(Exception, match="base-mismatch"):
            llm.llm_engine.add_lora(foreign)
        with pytest.raises(Exception, match="base-mismatch"):
            engines.ask(llm, [[1, 2, 3], [4, 5]], [foreign, good])
        # Whoever hands requests to the engine itself, past our own front, gets an error as the answer.
        monkeypatch.setattr(LLMEngine, "add_request", LLMEngine.add_request.__wrapped__)
        outs = llm.generate(
            [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": engines.PROMPTS[0]}],
            SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False),
            lora_request=[foreign, good],
            use_tqdm=False,
        )
        assert outs[0].outputs[0].finish_reason == "error"
        assert list(outs[1].outputs[0].token_ids) == before[0].tokens
        assert engines.ask(llm, engines.PROMPTS, [good] * 4) == before
