"""What a request brings besides its text: images and sounds, as the tensors that the model takes.

A prompt may be a mapping. With the keys `text`, `images` or `audio` it goes through the variant's own
processor; other keys are the model's own inputs, ready made. Texts and chat messages without images
need no processor; they become `input_ids`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.embedded.text import TextFront
from deltafold.runtime.engine import Prompt

Tensors: TypeAlias = dict[str, torch.Tensor]

#: Keys of a mapping that a processor reads.
_RAW: Final = ("text", "images", "audio", "sampling_rate")
#: Inputs with one value a token, which are padded where requests differ in length.
_OF_TOKENS: Final = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
#: Processors kept ready.
_KEPT: Final = 32


@dataclass(frozen=True, slots=True)
class Brought:
    """One request's inputs.

    Attributes:
        tensors: by the names of the model's arguments, each for a batch of one.
        ids: the tokens among them that are the prompt.
    """

    tensors: Tensors
    ids: tuple[int, ...]

    @property
    def shapes(self) -> tuple[object, ...]:
        """Requests with equal shapes fit into one batch."""
        padded = _OF_TOKENS if "input_ids" in self.tensors else ()
        return tuple(
            (name, value.dtype, None if name in padded else tuple(value.shape))
            for name, value in sorted(self.tensors.items())
        )


class Processors:
    """The processor of every variant in use, by digest. Thread-safe."""

    def __init__(self, base_folder: Path) -> None:
        self._base_folder = base_folder
        self._lock = threading.Lock()
        self._known: dict[str, Any] = {}

    def get(self, digest: str, name: str, folder: Path) -> Any:
        """Raises `bad-argument` where neither the variant nor its base has one that loads."""
        with self._lock:
            if digest not in self._known:
                while len(self._known) >= _KEPT:
                    del self._known[next(iter(self._known))]
                self._known[digest] = self._load(name, folder)
            return self._known[digest]

    def _load(self, name: str, folder: Path) -> Any:
        from transformers import AutoProcessor, PreTrainedTokenizerBase

        problems = []
        for place in (folder, self._base_folder):
            try:
                made = AutoProcessor.from_pretrained(place, local_files_only=True)
                if not isinstance(made, PreTrainedTokenizerBase):
                    return made
                problems.append("it has a tokenizer alone")
            except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
                problems.append(str(error).strip().splitlines()[0])
        raise DeltafoldError(
            "bad-argument",
            f"{name} has no processor that turns images and sounds into inputs.",
            facts=[("it says", problems[0])],
            fix="give the model's own inputs as tensors, or add the processor's files to the "
            "fine-tune's folder and pack it again",
        )


def is_plain(prompt: Prompt) -> bool:
    """Whether a prompt is text, token ids, or chat messages without images and sounds."""
    if isinstance(prompt, Mapping):
        return False
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return True
    return all(
        _is_text(message.get("content")) for message in prompt if isinstance(message, Mapping)
    )


def _is_text(content: Any) -> bool:
    if not isinstance(content, Sequence) or isinstance(content, str):
        return True
    return all(isinstance(p, str) or (isinstance(p, Mapping) and "text" in p) for p in content)


def bring(prompt: Prompt, front: TextFront, processor: Any) -> Brought:
    """Make a request's inputs.

    Args:
        prompt: as `Request.prompt`.
        front: the variant's tokenizer.
        processor: called without arguments for the variant's processor, where one is needed.

    Raises:
        DeltafoldError: `bad-argument` for a prompt that the model or its processor does not take.
    """
    if is_plain(prompt):
        ids = front.encode(prompt)
        return Brought({"input_ids": torch.tensor([ids])}, tuple(ids))
    ready = isinstance(prompt, Mapping) and not set(prompt) & set(_RAW)
    made = prompt if ready and isinstance(prompt, Mapping) else _processed(prompt, processor)
    tensors = {str(n): v for n, v in made.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise _bad(f"none of its inputs is a tensor: {', '.join(map(str, made)) or 'it is empty'}")
    ids_of = tensors.get("input_ids")
    if ids_of is not None and (ids_of.dim() != 2 or ids_of.shape[0] != 1):
        raise _bad(f"input_ids must be [1, tokens], not {list(ids_of.shape)}")
    ids = [] if ids_of is None else ids_of[0].tolist()
    return Brought(tensors, tuple(ids))


def _processed(prompt: Prompt, processor: Any) -> Mapping[str, Any]:
    made = processor()
    try:
        if isinstance(prompt, Mapping):
            found: Mapping[str, Any] = made(**prompt, return_tensors="pt")
        else:
            found = made.apply_chat_template(
                prompt,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
    except Exception as error:  # a processor is a program of the model's author
        raise _bad(f"the variant's processor refused it: {error}") from error
    return found


def join(requests: Sequence[Brought], *, pad: int, on_the_left: bool) -> Tensors:
    """One batch of requests with equal `shapes`; shorter texts are padded and masked."""
    longest = max(len(r.ids) for r in requests)
    batch: Tensors = {}
    for name in requests[0].tensors:
        rows = [r.tensors[name] for r in requests]
        if name in _OF_TOKENS and requests[0].ids:
            fill = pad if name == "input_ids" else 0
            rows = [_padded(row, longest, fill, on_the_left) for row in rows]
        batch[name] = torch.cat(rows)
    if requests[0].ids and "attention_mask" not in batch:
        masks = [torch.ones(1, len(r.ids), dtype=torch.long) for r in requests]
        batch["attention_mask"] = torch.cat([_padded(m, longest, 0, on_the_left) for m in masks])
    return batch


def _padded(row: torch.Tensor, length: int, fill: int, on_the_left: bool) -> torch.Tensor:
    spare = length - row.shape[1]
    sides = (spare, 0) if on_the_left else (0, spare)
    return torch.nn.functional.pad(row, sides, value=fill)


def _bad(message: str) -> DeltafoldError:
    return DeltafoldError("bad-argument", f"the prompt cannot be read: {message}.")
