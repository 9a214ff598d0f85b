"""Which variants stay in host memory, without vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from deltafold.runtime.vllm.hosted import Hosted


@dataclass(frozen=True)
class Lora:
    """As vLLM's `LoRARequest`."""

    lora_int_id: int
    lora_path: str


class Workers:
    """Notes what they are told; `broken` paths cannot be loaded."""

    def __init__(self) -> None:
        self.loaded: list[int] = []
        self.left: list[int] = []
        self.broken: set[str] = set()

    def load(self, lora: Lora) -> None:
        if lora.lora_path in self.broken:
            raise ValueError(lora.lora_path)
        self.loaded.append(lora.lora_int_id)


def lora(number: int) -> Lora:
    return Lora(number, f"zoo/{number}")


def made(room: int) -> tuple[Hosted, Workers]:
    workers = Workers()
    return Hosted(room, workers.load, workers.left.extend), workers


def test_the_one_least_recently_asked_for_leaves_first():
    hosted, workers = made(2)
    assert [hosted.ready(lora(n), tuple) for n in (1, 2, 1, 3)] == [True, True, False, True]
    assert (workers.loaded, workers.left) == ([1, 2, 3], [2])
    assert hosted.ready(lora(2), tuple)
    assert workers.left == [2, 1]


def test_what_has_requests_or_is_pinned_never_leaves():
    hosted, workers = made(1)
    hosted.ready(lora(1), tuple)
    hosted.pin(1, tuple)
    hosted.ready(lora(2), tuple)
    hosted.ready(lora(3), lambda: {2})
    assert workers.left == []
    hosted.ready(lora(4), tuple)
    assert workers.left == [2, 3]
    hosted.forget(1)
    assert hosted.ready(lora(1), tuple)


def test_pinning_brings_back_what_left():
    hosted, workers = made(1)
    for number in (1, 2):
        hosted.ready(lora(number), tuple)
    hosted.pin(1, tuple)
    assert (workers.loaded, workers.left) == ([1, 2, 1], [1, 2])


def test_what_cannot_be_loaded_takes_nobodys_room():
    hosted, workers = made(1)
    hosted.ready(lora(1), tuple)
    workers.broken = {"zoo/2"}
    with pytest.raises(ValueError, match="zoo/2"):
        hosted.ready(lora(2), tuple)
    assert workers.left == []
    assert not hosted.ready(lora(1), tuple)


def test_another_path_under_the_same_number_is_asked_of_the_workers():
    hosted, workers = made(2)
    hosted.ready(lora(1), tuple)
    assert hosted.ready(Lora(1, "zoo/other"), tuple)
    assert workers.loaded == [1, 1]
    assert hosted.ready(Lora(1, "zoo/other"), tuple, again=True)
