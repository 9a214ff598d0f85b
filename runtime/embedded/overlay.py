"""Prompts that bring input embeddings of their own for some of their positions.

Such positions hold a placeholder id; before a pass over them the model's own embedding looks up the
ids, under each row's variant, and the given embeddings take their places. What they must look like is
what transformers' `inputs_embeds` means for the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeGuard

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.embedded.text import TextFront
from deltafold.runtime.engine import Embeddings, Prompt

#: Stands where there is an embedding instead of a token.
PLACEHOLDER: Final = 0


@dataclass(frozen=True, eq=False, slots=True)
class Overlay:
    """Embeddings and where they go: ascending int64 `[E]`, and float `[E, hidden]`."""

    positions: torch.Tensor
    values: torch.Tensor

    def within(self, start: int, stop: int) -> Overlay:
        """The part in `[start, stop)`, its positions counted from `start`."""
        first, last = torch.searchsorted(self.positions, torch.tensor([start, stop])).tolist()
        return Overlay(self.positions[first:last] - start, self.values[first:last])


def read_prompt(
    front: TextFront, prompt: Prompt, width: int | None
) -> tuple[list[int], Overlay | None]:
    """Token ids of a prompt, and the embeddings that take the place of some of them.

    Args:
        front: the variant's text side.
        prompt: as in a request.
        width: the hidden size; None where the model takes no embeddings.

    Raises:
        DeltafoldError: `bad-argument`, or `engine-unsupported` where the model takes none.
    """
    pieces = [prompt] if isinstance(prompt, Embeddings) else prompt
    if not _mixed(pieces):
        return front.encode(prompt), None
    if width is None:
        raise DeltafoldError(
            "engine-unsupported",
            "this model takes no input embeddings.",
            fix="send token ids or text",
        )
    ids: list[int] = []
    positions: list[int] = []
    values: list[torch.Tensor] = []
    for piece in pieces:
        if isinstance(piece, Embeddings):
            values.append(_checked(piece.values, width))
            positions += range(len(ids), len(ids) + len(values[-1]))
            ids += [PLACEHOLDER] * len(values[-1])
        else:
            ids += front.encode([piece])
    return ids, Overlay(torch.tensor(positions), torch.cat(values))


def _mixed(prompt: Prompt) -> TypeGuard[Sequence[int | Embeddings]]:
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        return False
    return any(isinstance(piece, Embeddings) for piece in prompt)


def _checked(values: torch.Tensor, width: int) -> torch.Tensor:
    sound = isinstance(values, torch.Tensor) and values.is_floating_point()
    if not (sound and values.dim() == 2 and len(values) > 0 and values.shape[1] == width):
        found = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise DeltafoldError(
            "bad-argument",
            "input embeddings must be a floating-point tensor, a row for each position.",
            facts=[("expected", f"[positions, {width}]"), ("found", found)],
        )
    if not bool(torch.isfinite(values).all()):
        raise DeltafoldError("bad-argument", "input embeddings must be finite.")
    return values.detach().to("cpu", torch.float32)
