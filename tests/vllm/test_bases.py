"""Other bases than dense ones in one type: experts, and quantised copies."""

from __future__ import annotations

import engines
import pytest
import quantised

from deltafold.compress import Checkpoint, DeltafoldError
from deltafold.runtime.vllm.checks import check_copy


@pytest.mark.slow
def test_experts_are_each_variants_own(tmp_path):
    """Routers, experts, norms and tables are all moved; each token goes to two of four experts."""
    made = engines.make(tmp_path, "Qwen3Moe", {n: engines.CODECS[n] for n in ("sign1", "exact")})
    expected = engines.dense_answers(made, base=False)
    with engines.serving(made.base) as llm:
        found = engines.mixed_answers(llm, made)
        alone = engines.mixed_answers(llm, made, only_base=True)["base"]
    assert found.pop("base") == alone, "rows of the base are bit for bit those of its own batch"
    engines.check_equal(found, expected)


@pytest.mark.slow
def test_a_quantised_base_gets_whole_deltas(tmp_path):
    """4-bit linears, whose kernels know half precision alone: tokens equal, logarithms nearly."""
    made = engines.make(tmp_path, "Llama", {n: engines.CODECS[n] for n in ("sign1", "exact")})
    copy = tmp_path / "q4"
    quantised.make(made.base, copy)
    for name in made.variants:
        quantised.dense(made.base, made.dense / name)
    expected = engines.dense_answers(made, base=False, dtype="float16")
    with engines.plain(copy, dtype="float16") as llm:
        alone = engines.mixed_answers(llm, made, only_base=True)["base"]
    with engines.serving(copy, base=str(made.base), dtype="float16") as llm:
        found = engines.mixed_answers(llm, made)
    assert found.pop("base") == alone
    engines.check_equal(found, expected, within=0.1)

    # Deltas of another checkpoint than the one that was quantised would be added to wrong weights.
    with pytest.raises(DeltafoldError, match="not a quantised copy") as caught:
        check_copy(Checkpoint.open(copy), Checkpoint.open(made.dense / "exact"))
    assert caught.value.code == "base-mismatch"
