"""Packed slots, as a GPU has them, with the GPU's kernels in Triton's interpreter."""

from __future__ import annotations

import json
from typing import Any

import engines
import pytest
from click.testing import CliRunner

from deltafold.compress import DeltafoldError
from deltafold.server.cli.main import cli


@pytest.mark.slow
def test_packed_slots_cost_what_was_planned_and_answer_alike(tmp_path):
    """Slices and factors in one batch; the table of the low-rank variant has no packed form."""
    made = engines.make(tmp_path, "Llama", {n: engines.CODECS[n] for n in ("sign1", "rank8")})
    words = ["plan", made.base, "--zoo", made.zoo, "--max-loras", "2", "--dtype", "float32"]
    planned = CliRunner().invoke(cli, [str(w) for w in (*words, "--json")])
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert plan["copies"] == ["model.embed_tokens"]
    prompts, variants = [[5, 9, 30], [101, 7]], ["sign1", "rank8"]
    expected = {}
    for name in variants:
        with engines.plain(made.dense / name) as llm:
            expected[name] = engines.ask(llm, prompts, max_tokens=3)
    requests = engines.requests(made)
    jobs = [(name, i) for i in range(2) for name in ("base", *variants)]

    def answers(llm: Any) -> dict[str, list[engines.Answer]]:
        found = engines.ask(
            llm, [prompts[i] for _, i in jobs], [requests[n] for n, _ in jobs], max_tokens=3
        )
        return {n: [found[j] for j, (m, _) in enumerate(jobs) if m == n] for n in variants}

    with engines.serving(made.base, slots="packed", zoo=str(made.zoo), max_loras=2) as llm:
        assert slot_bytes(llm) == plan["packed"]
        engines.check_equal(answers(llm), expected)
        # What came after the slots were cut, and needs other places, is refused by name.
        engines.zoo_models.fine_tune(tmp_path, "later")
        engines.zoo_models.pack(tmp_path, "later", "int:bits=4,group=32")
        with pytest.raises(DeltafoldError, match="no room at") as caught:
            llm.llm_engine.add_lora(engines.request("later", 9, made.zoo / "later"))
        assert caught.value.code == "engine-unsupported"
        engines.check_equal(answers(llm), expected)
    with engines.serving(made.base, slots="dense", max_loras=2) as llm:
        assert slot_bytes(llm) == plan["dense"] > 2 * plan["packed"]


def slot_bytes(llm: Any) -> int:
    """What the engine in this process took for its slots."""
    worker = llm.llm_engine.model_executor.driver_worker.worker
    return int(worker.model_runner.lora_manager.slots.nbytes)
