"""Dense models that do not fit: refused by a code, under real limits of the process's memory."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pooling_zoo
import pytest
import torch
import transformers

from deltafold.compress import (
    Checkpoint,
    DeltafoldError,
    Recipe,
    compress_checkpoint,
    parse_spec,
)
from deltafold.runtime import EmbeddedEngine, PoolingEngine, PoolRequest, Request, Sampling
from deltafold.runtime import room as rooms
from deltafold.runtime.deltas import Deltas
from deltafold.runtime.room import need_room, room, within_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")

MIB = 2**20
#: One table that no allocator has lying about: it always asks the system for so much.
_SIZES = {
    "vocab_size": 9 * 2**14,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TABLE = _SIZES["vocab_size"] * 64 * 4


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[None]:
    """Within it, the process may take so many bytes of address space more than it has."""
    # What earlier tests left in cycles would make room while this one runs.
    gc.collect()
    size = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def code_of(work: Callable[[], Any]) -> DeltafoldError:
    with pytest.raises(DeltafoldError) as caught:
        work()
    assert caught.value.code == "not-enough-memory"
    return caught.value


def test_what_is_left_is_what_the_limits_leave() -> None:
    cpu = torch.device("cpu")
    with limited(64 * MIB):
        left = room(cpu)
        assert left is not None
        assert left <= 64 * MIB
        error = code_of(lambda: need_room(512 * MIB, cpu, "a model"))
        assert dict(error.facts)["needed"] == "512 MiB"
        need_room(MIB, cpu, "a model")


def test_running_out_is_told_by_its_code_and_lets_go_of_what_was_made() -> None:
    def work() -> None:
        held = [torch.zeros(MIB)]
        held.append(torch.zeros(2**40))

    with limited(64 * MIB):
        error = code_of(lambda: within_memory("a model", work))
    assert "allocate" in dict(error.facts)["reason"]
    assert error.__cause__ is None
    assert error.__context__ is None
    with pytest.raises(ZeroDivisionError):
        within_memory("a model", lambda: 1 // 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two variants of another depth: all of their tensors differ from the base's."""
    folder = tmp_path_factory.mktemp("room")
    config = transformers.LlamaConfig(**_SIZES)
    pooling_zoo.save(transformers.LlamaForCausalLM, config, folder / "base")
    for name, step in (("one", 0.01), ("two", 0.02)):
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "base", num_hidden_layers=1)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(step)
        model.save_pretrained(folder / "full" / name)
        compress_checkpoint(
            folder / "base",
            folder / "full" / name,
            folder / "zoo" / name,
            recipe=Recipe(default=parse_spec("exact")),
            accept=["missing-tensors"],
        )
    return folder


def does_not_fit(made: Path) -> None:
    """A dense model that is larger than what is left: nobody else is worse off."""
    with EmbeddedEngine.open(made / "base", made / "zoo", device="cpu") as engine:
        assert engine.resolve("one").applied == "rebuilt"
        request = Request("one", [3, 5], Sampling(max_tokens=1))
        with limited(TABLE // 2):
            error = code_of(lambda: list(engine.generate([request])))
        assert "--max-deltas" in error.fix
        # It is served once there is room.
        list(engine.generate([Request("base", [3], Sampling(max_tokens=1))]))
        list(engine.generate([request]))
    with PoolingEngine.open(made / "base", made / "zoo", device="cpu") as pooling:
        with limited(TABLE // 2):
            code_of(lambda: pooling.embed([PoolRequest("one", [3, 5])]))
        assert len(pooling.embed([PoolRequest(n, [3, 5]) for n in ("base", "one")])) == 2


def does_not_fit_unforeseen(made: Path) -> None:
    """The same where the system does not say how much is left, and only refuses to give more."""
    with mock.patch.object(rooms, "room", return_value=None):
        does_not_fit(made)


@pytest.mark.parametrize("work", [does_not_fit, does_not_fit_unforeseen], ids=["foreseen", "met"])
def test_a_dense_model_that_does_not_fit(made: Path, work: Callable[[Path], None]) -> None:
    """In a process of its own: what a long one has freed in between can hold the whole model."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as child:
        child.submit(work, made).result()


def test_variants_that_nobody_uses_make_room(made: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(made / "base").eval()
    deltas = Deltas(base, Checkpoint.open(made / "base"), made / "zoo", rebuild="auto")
    held = deltas.acquire("one")
    with limited(TABLE // 2):
        code_of(lambda: deltas.acquire("two"))
    assert set(deltas.resident()) == {"one"}, "what is used stays"
    deltas.release(held)
    del held
    with limited(3 * TABLE // 4):
        deltas.release(deltas.acquire("two"))
    assert set(deltas.resident()) == {"two"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_dense_model_that_a_card_has_no_room_for(made: Path) -> None:
    with EmbeddedEngine.open(made / "base", made / "zoo", device="cuda") as engine:
        request = Request("one", [3, 5], Sampling(max_tokens=1))
        total = torch.cuda.get_device_properties(0).total_memory
        most = torch.cuda.memory_reserved() + TABLE // 2
        torch.cuda.set_per_process_memory_fraction(most / total)
        try:
            code_of(lambda: list(engine.generate([request])))
            list(engine.generate([Request("base", [3], Sampling(max_tokens=1))]))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        list(engine.generate([request]))
