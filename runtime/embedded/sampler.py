"""Choosing tokens from logits.

What a request gets depends on its own logits, settings and random numbers alone, never on what
shares the batch: each row owns a generator that lives on the host, draws one number per token, and
the number picks a token by walking along the row's cumulative distribution. So the arithmetic can
run for all rows at once where the logits are, and one small transfer per step brings back tokens,
log-probabilities and whether the logits were numbers at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final, NamedTuple

import torch

from deltafold.runtime.engine import Sampling

#: Dividing by less than this overflows; the result would be greedy anyway.
_COLDEST: Final = 1e-5
#: Likeliest tokens looked at first on a CPU, where sorting a whole vocabulary is slow.
_FIRST_LOOK: Final = 256
#: Weights that are summed up together before looking closer.
_BLOCK: Final = 512


class RawLogprob(NamedTuple):
    """Natural logarithm of a token's probability in the raw distribution."""

    token: int
    logprob: float


class Choice(NamedTuple):
    """One row's next token; `top` is likeliest first. `finite` False: the logits are broken."""

    token: int
    finite: bool
    logprob: float | None
    top: tuple[RawLogprob, ...]


def generator(seed: int | None) -> Random:
    """A request's own source of random numbers; None seeds it from the operating system."""
    # Random drops the sign of an integer seed; folding keeps -1 and 1 apart.
    return Random() if seed is None else Random(seed & (2**64 - 1))


@torch.inference_mode()
def choose(
    logits: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[Random]
) -> list[Choice]:
    """The next token of every row; `logits` are `[rows, vocabulary]` in any dtype."""
    if logits.device.type == "mps":  # has no float64
        logits = logits.cpu()
    tokens = logits.argmax(dim=-1)
    # NaN is the largest of all to argmax, so one look at the winner finds broken logits.
    winners = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    drawn = [i for i, s in enumerate(samplings) if s.temperature >= _COLDEST]
    if drawn:
        numbers = [generators[i].random() for i in drawn]
        own = [samplings[i] for i in drawn]
        _put(tokens, drawn, _draw(_rows(logits, drawn).float(), own, numbers))
    table = [tokens.double().unsqueeze(1), winners.isfinite().double().unsqueeze(1)]
    asked = [i for i, s in enumerate(samplings) if s.logprobs is not None]
    if asked:
        most = max(samplings[i].logprobs or 0 for i in asked)
        found = torch.cat(_logprobs_of(_rows(logits, asked), _rows(tokens, asked), most), dim=1)
        columns = found.new_zeros((len(samplings), found.shape[1]))
        _put(columns, asked, found)
        table.append(columns)
    # float64 carries ids and float32 values without loss, so all of it travels together.
    host = torch.cat(table, dim=1).tolist()
    return [_to_choice(line, s) for line, s in zip(host, samplings, strict=True)]


def prompt_logprobs(
    logits: torch.Tensor, targets: Sequence[int], top: int
) -> list[tuple[RawLogprob, tuple[RawLogprob, ...]]]:
    """Log-probabilities of known tokens and their likeliest rivals.

    Args:
        logits: `[positions, vocabulary]`, each predicting the target of the same index.
        targets: token ids.
        top: likeliest alternatives to report.
    """
    with torch.inference_mode():
        wanted = torch.tensor(list(targets), device=logits.device)
        columns = _logprobs_of(logits, wanted, top)
        lines = torch.cat(columns, dim=1).tolist()
    return [
        (RawLogprob(target, line[0]), _pairs(line[1:], top))
        for target, line in zip(targets, lines, strict=True)
    ]


def _logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> list[torch.Tensor]:
    """float64 columns: the tokens' log-probabilities, then `top` values, then `top` ids."""
    logprobs = logits.float().log_softmax(dim=-1)
    values, ids = logprobs.topk(min(top, logits.shape[-1]), dim=-1)
    return [logprobs.gather(1, tokens.unsqueeze(1)).double(), values.double(), ids.double()]


def _to_choice(line: list[float], sampling: Sampling) -> Choice:
    token, finite, rest = int(line[0]), bool(line[1]), line[2:]
    if sampling.logprobs is None:
        return Choice(token, finite, None, ())
    return Choice(token, finite, rest[0], _pairs(rest[1:], sampling.logprobs))


def _pairs(line: list[float], top: int) -> tuple[RawLogprob, ...]:
    half = len(line) // 2
    values, ids = line[:half], line[half:]
    return tuple(RawLogprob(int(i), v) for i, v in zip(ids[:top], values[:top], strict=True))


def _draw(
    logits: torch.Tensor, samplings: Sequence[Sampling], numbers: Sequence[float]
) -> torch.Tensor:
    """Tokens for rows that sample: float32 logits `[rows, vocabulary]`, one number per row."""
    device, vocabulary = logits.device, logits.shape[-1]
    heat = torch.tensor([s.temperature for s in samplings], device=device).unsqueeze(1)
    probabilities = (logits / heat).softmax(dim=-1)
    uniform = torch.tensor(numbers, dtype=torch.float64, device=device).unsqueeze(1)
    # Each row's path depends on its own settings, so that company cannot change its rounding.
    cut = [i for i, s in enumerate(samplings) if s.top_p < 1 or 0 < s.top_k < vocabulary]
    whole = [i for i in range(len(samplings)) if i not in cut]
    tokens = torch.empty(len(samplings), dtype=torch.long, device=device)
    if whole:
        _put(tokens, whole, _walk(_rows(probabilities, whole), _rows(uniform, whole)))
    if cut:
        own = [samplings[i] for i in cut]
        _put(tokens, cut, _draw_truncated(_rows(probabilities, cut), own, _rows(uniform, cut)))
    return tokens


def _draw_truncated(
    probabilities: torch.Tensor, samplings: Sequence[Sampling], uniform: torch.Tensor
) -> torch.Tensor:
    """Top-k first, then top-p of what is left, as transformers and vLLM do."""
    vocabulary, device = probabilities.shape[-1], probabilities.device
    top_k = torch.tensor([s.top_k or vocabulary for s in samplings], device=device)
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=device)
    look = vocabulary
    if device.type == "cpu":
        look = min(vocabulary, max([_FIRST_LOOK, *(s.top_k for s in samplings)]))
    while True:
        found, order = probabilities.topk(look, dim=-1)
        # [rows, look], likeliest first; float64 keeps the long sum honest.
        found = found.double()
        found = found.masked_fill(
            torch.arange(look, device=found.device) >= top_k.unsqueeze(1), 0.0
        )
        limit = (top_p * torch.where(top_k < vocabulary, found.sum(dim=-1), 1.0)).unsqueeze(1)
        before = found.cumsum(dim=-1) - found
        if look == vocabulary or bool(((before[:, -1:] >= limit) | (found[:, -1:] == 0)).all()):
            break
        look = min(vocabulary, look * 8)
    kept = found.masked_fill((before >= limit) & (before > 0), 0.0)
    return order.gather(1, _walk(kept, uniform).unsqueeze(1)).squeeze(1)


def _walk(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index per row at which the cumulative weight passes `uniform` of the total.

    First the block in which that happens, then the place inside: a running sum over a whole
    vocabulary costs more than all the rest of sampling.
    """
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % _BLOCK))
    blocks = padded.view(weights.shape[0], -1, _BLOCK)
    sums = blocks.sum(dim=-1, dtype=torch.float64)
    ends = sums.cumsum(dim=-1)
    goal = uniform * ends[:, -1:]
    block = _first(ends > goal)
    row = torch.arange(len(block), device=block.device)
    begin = (ends - sums)[row, block].unsqueeze(1)
    inside = begin + blocks[row, block].double().cumsum(dim=-1)
    return block * _BLOCK + _first(inside > goal)


def _first(flags: torch.Tensor) -> torch.Tensor:
    """Index of the first True of every row; argmax gives the first of equal maxima."""
    return flags.to(torch.uint8).argmax(dim=-1)


def _rows(tensor: torch.Tensor, at: list[int]) -> torch.Tensor:
    """`tensor[at]`, without a copy where that is all of it."""
    return tensor if len(at) == len(tensor) else tensor[torch.tensor(at, device=tensor.device)]


def _put(tensor: torch.Tensor, at: list[int], values: torch.Tensor) -> None:
    tensor[torch.tensor(at, device=tensor.device)] = values
