"""Running a module again that talks to a cache: what the cache said the first time is said again.

The first call goes to the real cache and is written down; the second, for some requests alone, gets
the same answers cut to those requests, and the cache does not move. Right as long as the parameters
in question do not decide what goes into the cache; `rehearse` tries that out before anything is served.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltafold.compress import DeltafoldError
from deltafold.runtime.batch import BatchState
from deltafold.runtime.layers import unwrap, wrap
from deltafold.runtime.layout import WARM_ROWS, is_cache
from deltafold.runtime.uses import Answers
from deltafold.runtime.warm_up import later_inputs

if TYPE_CHECKING:
    from deltafold.runtime.slots import Home


#: What a plain answer may be: it says something of the cache and cannot be changed through it.
_PLAIN = (type(None), bool, int, float, str)


class Recorder:
    """Stands in for a cache and writes down what its methods return.

    A cache of two caches (what the decoder said, and what it was told) hands out two of these, which
    write to the same list. To `isinstance` it is the cache that it stands for.
    """

    deltafold_cache = True

    def __init__(self, cache: Any, answers: list[tuple[str, Any]] | None = None) -> None:
        self._cache = cache
        self.answers: list[tuple[str, Any]] = [] if answers is None else answers

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._cache)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._cache, name)
        if is_cache(value):
            inner = Recorder(value, self.answers)
            self.answers.append((name, inner))
            return inner
        if not callable(value):
            if _is_plain(value):
                self.answers.append((name, _Plain(copy.copy(value))))
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = value(*args, **kwargs)
            # Keys and values are only read; a state may be moved on in place by who asked for it.
            self.answers.append((name, answer if name == "update" else _copy(answer)))
            return answer

        return call


@dataclass(frozen=True)
class _Plain:
    """The value of an attribute, not of a call."""

    value: Any


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(v, _PLAIN) for v in value.values())
    return isinstance(value, _PLAIN)


def _copy(answer: Any) -> Any:
    if isinstance(answer, tuple | list):
        return type(answer)(_copy(a) for a in answer)
    return answer.clone() if isinstance(answer, torch.Tensor) else answer


class Replay:
    """Gives a recorder's answers again, cut to some requests. Knows nothing but these calls."""

    deltafold_cache = True

    def __init__(
        self,
        recorder: Recorder,
        cut: Callable[[torch.Tensor], torch.Tensor],
        left: list[tuple[str, Any]] | None = None,
    ) -> None:
        self._kind = recorder.__class__
        self._left = list(recorder.answers) if left is None else left
        self._cut = cut

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self._kind

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not self._left or self._left[0][0] != name:
            raise AttributeError(f"{name} was not asked the first time")
        _, answer = self._left.pop(0)
        if isinstance(answer, _Plain):
            return copy.copy(answer.value)
        if isinstance(answer, Recorder):
            return Replay(answer, self._cut, self._left)
        return lambda *args, **kwargs: self._of(answer)

    def _of(self, answer: Any) -> Any:
        if isinstance(answer, tuple | list):
            return type(answer)(self._of(a) for a in answer)
        return self._cut(answer) if isinstance(answer, torch.Tensor) and answer.dim() else answer


def recorded(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with a recorder in the place of a cache."""
    named = {k: Recorder(v) if is_cache(v) else v for k, v in kwargs.items()}
    return tuple(Recorder(a) if is_cache(a) else a for a in args), named


@torch.no_grad()
def rehearse(
    model: nn.Module, inputs: dict[str, Any], homes: list[Home], answers: Answers
) -> set[str]:
    """Names of the homes that do not serve a changed parameter as a model that holds it does.

    Reads a prompt and one more token, so that both ways of using a cache are tried; models without
    a cache read the prompt alone.
    """
    if not homes or _serves(model, inputs, homes, answers):
        return set()
    names = {h.name for h in homes}
    return {
        n for n in names if not _serves(model, inputs, [h for h in homes if h.name == n], answers)
    }


def _serves(model: nn.Module, inputs: dict[str, Any], homes: list[Home], answers: Answers) -> bool:
    from deltafold.runtime.loading import LoadedVariant

    variant = LoadedVariant("rehearsal", Path())
    values = {(h.name, h.path): _parameter(h) for h in homes}
    moved = {key: _moved(value) for key, value in values.items()}
    for home in homes:
        key = (home.name, home.path)
        variant.add_vector(home, (moved[key].float() - values[key].float()))
    state = BatchState(next(model.parameters()).device)
    modules = {h.name: h for h in homes}
    passes = _Passes(model, inputs, answers)
    rows = [(variant if i % 2 else None, 1.0) for i in range(WARM_ROWS)]
    try:
        plain = passes.run()
        expected = _with_values(passes, homes, moved)
        for name, home in modules.items():
            wrap(name, home.module, state, home.layout)
        with state.running(rows):
            found = passes.run()
    except (DeltafoldError, RuntimeError, AttributeError, TypeError, ValueError, IndexError):
        return False
    finally:
        for home in modules.values():
            unwrap(home.module)
    return all(
        _close(f[i], (e if i % 2 else p)[i])
        for f, e, p in zip(found, expected, plain, strict=True)
        for i in range(WARM_ROWS)
    )


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    share = 1e-4 if expected.dtype == torch.float32 else 2e-2
    limit = share * float(expected.abs().max())
    return bool(((found - expected).abs() <= limit).all())


@dataclass(frozen=True)
class _Passes:
    """A prompt, and one more token where the model has a cache."""

    model: nn.Module
    inputs: dict[str, Any]
    answers: Answers

    def run(self) -> list[torch.Tensor]:
        """What the model says in each pass."""
        first = self.model(**self.inputs)
        told, later = self.answers.of(first), later_inputs(self.inputs, first)
        return told if later is None else [*told, *self.answers.of(self.model(**later))]


def _with_values(
    passes: _Passes, homes: list[Home], values: dict[tuple[str, str], torch.Tensor]
) -> list[torch.Tensor]:
    kept = {key: value.clone() for key, value in ((k, _parameter_of(homes, k)) for k in values)}
    try:
        for key, value in values.items():
            _parameter_of(homes, key).data.copy_(value)
        return passes.run()
    finally:
        for key, value in kept.items():
            _parameter_of(homes, key).data.copy_(value)


def _parameter_of(homes: list[Home], key: tuple[str, str]) -> torch.Tensor:
    return _parameter(next(h for h in homes if (h.name, h.path) == key))


def _parameter(home: Home) -> torch.Tensor:
    *inner, attribute = home.path.split(".")
    value = getattr(home.module.get_submodule(".".join(inner)), attribute)
    assert isinstance(value, torch.Tensor)
    return value


def _moved(value: torch.Tensor) -> torch.Tensor:
    """A value far enough off that a mistake shows in the answers."""
    wave = torch.arange(value.numel(), device=value.device).remainder(3).reshape(value.shape) - 0.5
    size = value.detach().float().abs().mean() * 0.5 + 0.05
    return (value.detach().float() + wave * size).to(value.dtype)
