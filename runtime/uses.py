"""Who reads which parameter: a warm-up pass that watches every torch function and every module.

A parameter may be read by its own module, by a module around it, or by nobody. Where it is read
decides which module has to run again with a variant's value. Models are watched, not known by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from deltafold.compress import DeltafoldError
from deltafold.runtime.layout import WARM_ROWS, Layout, answers_of, kind_of
from deltafold.runtime.warm_up import later_inputs

#: Descriptors that give a tensor's values; all others tell its shape, dtype or place.
_VALUES = {"T", "mT", "H", "mH", "data", "real"}
#: Names of the modules that ran while a parameter was read, outermost first.
Chain: TypeAlias = tuple[str, ...]
#: The request whose rows `mixing` disturbs.
_DISTURBED = 1


class Uses:
    """What a warm-up pass saw.

    Attributes:
        readers: by `id` of a parameter, the chains of module names, outermost first, that ran while it
            was read.
        layouts: by module name; None where two calls were laid out differently.
    """

    def __init__(self) -> None:
        self.readers: dict[int, set[Chain]] = {}
        self.layouts: dict[str, Layout | None] = {}

    @classmethod
    @torch.no_grad()
    def watch(cls, model: nn.Module, inputs: dict[str, Any], tensors: Iterable[int]) -> Uses:
        """Run the model once and note every use of `tensors` (given by `id`)."""
        uses, stack = cls(), list[str]()
        handles = []
        for name, module in model.named_modules():
            handles += _hooks(uses, stack, name, module)
        try:
            with _Watch(uses.readers, stack, set(tensors)):
                model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        return uses

    def watch_later(
        self, model: nn.Module, inputs: dict[str, Any], tensors: Collection[int]
    ) -> frozenset[str]:
        """Note too who reads what while the model goes on by one token, with its cache.

        Models may read a parameter otherwise there. Layouts stay those of the prompt.

        Returns:
            The modules that ran; none where the model has no cache, or does not go on.
        """
        try:
            with torch.no_grad():
                later = later_inputs(inputs, model(**inputs))
            if later is None:
                return frozenset()
            seen = Uses.watch(model, later, tensors)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
            return frozenset()
        for tensor, chains in seen.readers.items():
            self.readers.setdefault(tensor, set()).update(chains)
        return frozenset(seen.layouts)

    def _note_layout(self, name: str, layout: Layout) -> None:
        known = self.layouts.setdefault(name, layout)
        if known is not None and (known.output, known.args) != (layout.output, layout.args):
            self.layouts[name] = None


def _hooks(uses: Uses, stack: list[str], name: str, module: nn.Module) -> list[Any]:
    def enter(*_: Any) -> None:
        stack.append(name)

    def leave(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        stack.pop()
        uses._note_layout(name, Layout.of(args, kwargs, output))

    return [
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, with_kwargs=True),
    ]


class _Watch(TorchFunctionMode):
    """Notes the modules that are running when a parameter is handed to a torch function."""

    def __init__(self, readers: dict[int, set[Chain]], stack: list[str], tensors: set[int]) -> None:
        super().__init__()
        self._readers, self._stack, self._tensors = readers, stack, tensors

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not tells_shape(func):
            for tensor in _flat((*args, *(kwargs or {}).values())):
                if id(tensor) in self._tensors:
                    self._readers.setdefault(id(tensor), set()).add(tuple(self._stack))
        return func(*args, **(kwargs or {}))


def tells_shape(func: Any) -> bool:
    """Whether a torch function asks for a tensor's shape, dtype or place, not for its values."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in _VALUES
    return name in ("size", "dim", "numel", "stride", "is_floating_point", "element_size")


def _flat(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _flat(value)
        elif isinstance(value, dict):
            yield from _flat(value.values())


@dataclass(frozen=True)
class Answers:
    """The parts of a model's output that speak of one request each.

    Attributes:
        places: of these tensors in the output. Scores of every text for every image, say, are none.
    """

    places: tuple[str, ...]

    @classmethod
    @torch.no_grad()
    def observe(cls, model: nn.Module, inputs: dict[str, Any]) -> Answers:
        """Find them: they move along when the requests of a warm-up batch change places.

        Raises:
            DeltafoldError: `engine-unsupported` where there are none.
        """
        plain = answers_of(model(**inputs))
        moved = answers_of(model(**{name: _moved_on(value) for name, value in inputs.items()}))
        places = [p for p, v in plain.items() if p in moved and _same(_moved_on(v), moved[p])]
        if not places:
            raise DeltafoldError(
                "engine-unsupported",
                f"nothing that {type(model).__name__} returns keeps requests apart.",
                fix="restore this model's variants and serve each by itself",
            )
        return cls(tuple(places))

    def of(self, output: Any) -> list[torch.Tensor]:
        """These tensors of one output, in a fixed order."""
        found = answers_of(output)
        return [found[place] for place in self.places]


def _moved_on(value: Any) -> Any:
    batched = isinstance(value, torch.Tensor) and value.dim() and len(value) % WARM_ROWS == 0
    return value.roll(len(value) // WARM_ROWS, 0) if batched else value


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool(
        ((found - expected).abs() <= _limit(expected)).all()
    )


def _limit(expected: torch.Tensor) -> torch.Tensor:
    return expected.abs().max() * (1e-3 if expected.dtype == torch.float32 else 5e-2)


@torch.no_grad()
def mixing(
    model: nn.Module,
    inputs: dict[str, Any],
    modules: dict[str, nn.Module],
    layouts: dict[str, Layout | None],
    answers: Answers,
) -> set[str]:
    """Names of modules whose rows do not stay with their request, found by disturbing one request.

    The output of each module is changed for one request alone; the model's answers to the others
    must stay as they were, and its own must change where the module gives one output for all.
    """
    trial = _Trial(model, inputs, answers, answers.of(model(**inputs)))
    shared = {n: m for n, m in modules.items() if _is_shared(layouts.get(n))}
    bad = {n for n, m in shared.items() if not trial.apart({n: m}, own=True)}
    others = {n: m for n, m in modules.items() if n not in shared}
    if not trial.apart(others):
        bad |= {n for n, m in others.items() if not trial.apart({n: m})}
    return bad


def _is_shared(layout: Layout | None) -> bool:
    return layout is not None and layout.shared


@dataclass(frozen=True)
class _Trial:
    """A model, and what it says while nothing is disturbed."""

    model: nn.Module
    inputs: dict[str, Any]
    answers: Answers
    expected: list[torch.Tensor]

    def apart(self, modules: dict[str, nn.Module], *, own: bool = False) -> bool:
        """Whether one request's part of the modules' outputs reaches this request alone."""
        try:
            with disturbed(modules):
                found = self.answers.of(self.model(**self.inputs))
        except (RuntimeError, ValueError, IndexError, KeyError):
            return False
        reached = False
        for value, plain in zip(found, self.expected, strict=True):
            moved = (value - plain).abs().flatten(1).amax(1)
            others = torch.cat([moved[:_DISTURBED], moved[_DISTURBED + 1 :]])
            if not (others <= _limit(plain)).all():
                return False
            reached = reached or bool(moved[_DISTURBED] != 0)
        return reached or not own


@contextmanager
def disturbed(modules: dict[str, nn.Module]) -> Iterator[None]:
    """Within it, the modules' outputs are changed for one request of the warm-up batch."""
    handles = [m.register_forward_hook(lambda _m, _a, out: _disturb(out)) for m in modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _disturb(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_disturb(v) for v in value)
    if isinstance(value, Mapping):
        return type(value)(**{key: _disturb(v) for key, v in value.items()})
    kind = kind_of(value)
    if kind not in ("rows", "tokens", "parts", "one") or not value.is_floating_point():
        return value
    out = value.expand(WARM_ROWS, *value.shape[1:]).clone() if kind == "one" else value.clone()
    each = len(out) // WARM_ROWS
    mine = out[_DISTURBED * each : (_DISTURBED + 1) * each]
    mine += mine.flip(-1) * 0.5 + 0.1
    return out
