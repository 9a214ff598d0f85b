"""The shared trunk: the base without a head, run once for a mixed batch of texts or images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from deltafold.compress import DeltafoldError
from deltafold.compress.errors import name_some
from deltafold.compress.memory import ran_out
from deltafold.runtime.embedded.plans import named_class, plan_of, refused_input
from deltafold.runtime.warm_up import Inputs, end_token, ended, warm_up_inputs

#: What a request is made of.
Way: TypeAlias = Literal["text", "image"]
#: Requests share a batch with none, with those of equal length, or with any: short texts are padded.
Together: TypeAlias = Literal["alone", "equal", "padded"]
_COMPANY: tuple[Together, ...] = ("alone", "equal", "padded")
_INPUT: dict[Way, str] = {"text": "input_ids", "image": "pixel_values"}
_FEATURES: dict[Way, str] = {"text": "get_text_features", "image": "get_image_features"}


def trunk_class(folder: Path) -> Any:
    """The class to run for a base: its architecture's bare model, with all that variants may use.

    A base that was saved with a head is opened without it, one with a decoder as its encoder where
    transformers has a class for that. Bare models with names of their own (one tower of two) stay what
    they are.

    Raises:
        DeltafoldError: `engine-unsupported` where transformers knows neither.
    """
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

    config, named = named_class(folder)
    if getattr(config, "is_encoder_decoder", False):
        encoder = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
        if encoder is not None:
            return encoder
    auto = MODEL_MAPPING.get(type(config), None) if config is not None else None
    auto = auto[0] if isinstance(auto, tuple) else auto
    plan = plan_of(folder) if named is not None else None
    if plan is not None and (not plan.own or auto is None):
        return named
    if auto is None:
        raise DeltafoldError("engine-unsupported", f"transformers has no bare model for {folder}.")
    return auto


@dataclass(frozen=True)
class Encoder:
    """A model and the ways of asking it.

    Attributes:
        model: wrapped or not, in eval mode.
        inputs: of a warm-up batch.
        ways: what requests may be made of.
        named: arguments that its forward knows.
        together: which requests may share a batch.
        dual: texts and images go through towers of their own into one space, and are asked so.
    """

    model: nn.Module
    inputs: Inputs
    ways: tuple[Way, ...]
    named: frozenset[str]
    together: Together = "equal"
    dual: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Encoder:
        """Observe a bare model.

        Raises:
            DeltafoldError: `engine-unsupported` where it cannot be asked for texts or images alone.
        """
        named = _named(model)
        types = getattr(_config(model).get_text_config(), "type_vocab_size", None)
        if not isinstance(types, int) or types < 2:
            named.discard("token_type_ids")
        inputs = _as_asked(warm_up_inputs(model, cached=False), named)
        ways = tuple(way for way, name in _INPUT.items() if name in inputs)
        encoder = cls(model, inputs, ways, frozenset(named), dual=len(ways) == 2)
        if not ways:
            raise DeltafoldError(
                "engine-unsupported",
                f"{type(model).__name__} reads neither texts nor images.",
                facts=[("it reads", name_some(sorted(inputs), len(inputs)))],
            )
        return encoder._tried()

    def around(self, model: nn.Module) -> Encoder:
        """A class whose trunk this is, to be asked for all that it returns.

        Raises:
            DeltafoldError: `engine-unsupported` where it cannot be asked what its trunk can.
        """
        named = frozenset(_named(model))
        return replace(self, model=model, named=named, together="equal", dual=False)._tried()

    def _tried(self) -> Encoder:
        for way in self.ways:
            self._try(way)
        found = [self._company(way) for way in self.ways]
        return replace(self, together=min(found, key=_COMPANY.index))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def sample(self) -> tuple[Inputs, Any]:
        """The warm-up batch's first request, and what the model returns for it."""
        way = self.ways[0]
        inputs = self.batch(way, [self._row(way, 0)])
        with torch.inference_mode():
            return inputs, self.run(way, inputs)

    def run(self, way: Way, inputs: Mapping[str, Any]) -> Any:
        """The model's output for a batch; of a dual encoder, that of one tower with its features.

        Args:
            way: of the batch.
            inputs: as `batch` makes them.

        Raises:
            DeltafoldError: `bad-argument` where the model refuses them.
        """
        given = {name: value for name, value in inputs.items() if name in self.named}
        if not self.dual and "use_cache" in self.named:
            given["use_cache"] = False
        ask = getattr(self.model, _FEATURES[way]) if self.dual else self.model
        try:
            return ask(**given)
        except ValueError as error:
            if isinstance(error, DeltafoldError):
                raise
            raise refused_input(self.model, error) from error

    def kind(self, way: Way, row: Mapping[str, torch.Tensor]) -> object:
        """Requests of one kind fit into one batch."""
        if self.together == "alone":
            return object()
        if way == "image":
            return tuple(row["pixel_values"].shape)
        return "text" if self.together == "padded" else len(row["input_ids"])

    def batch(self, way: Way, rows: Sequence[Mapping[str, torch.Tensor]]) -> Inputs:
        """Requests as one batch on the model's device; texts are padded on the right.

        Args:
            way: of all of them.
            rows: `input_ids` int64 `[T]` and perhaps `token_type_ids`, or `pixel_values`
                `[C, H, W]`.
        """
        if way == "image":
            pixels = torch.stack([row["pixel_values"] for row in rows])
            return {"pixel_values": pixels.to(self.device, self.dtype)}
        lengths = [len(row["input_ids"]) for row in rows]
        inputs = {"input_ids": _padded([r["input_ids"] for r in rows], self.padding)}
        if "attention_mask" in self.named:
            inputs["attention_mask"] = _padded([torch.ones(n, dtype=torch.int64) for n in lengths])
        if any("token_type_ids" in row for row in rows):
            types = [r.get("token_type_ids", torch.zeros_like(r["input_ids"])) for r in rows]
            inputs["token_type_ids"] = _padded(types)
        return {name: value.to(self.device) for name, value in inputs.items()}

    @property
    def padding(self) -> int:
        """The token that fills a shorter text's row up; positions may be counted by it."""
        value = getattr(self.config.get_text_config(), "pad_token_id", None)
        return value if isinstance(value, int) and value >= 0 else 0

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return _config(self.model)

    @property
    def max_tokens(self) -> int:
        """Most tokens of a text; 0 where the model reads none."""
        if "text" not in self.ways:
            return 0
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(most, int) or most <= 0:
            return 2**20
        # Some count positions from the padding token on, and lose those before.
        tables = [m for m in self.model.modules() if isinstance(m, nn.Embedding)]
        offsets = [m.padding_idx + 1 for m in tables if m.num_embeddings == most and m.padding_idx]
        return most - max(offsets, default=0)

    def _row(self, way: Way, index: int, cut: int = 0) -> dict[str, torch.Tensor]:
        """A request of the warm-up batch; a text ends as texts do, and has that token once."""
        value = self.inputs[_INPUT[way]][index].cpu()
        if way == "text":
            value, end = value[: len(value) - cut], end_token(self.config)
            value = value if end is None else ended(value, end)
        return {_INPUT[way]: value}

    def _company(self, way: Way) -> Together:
        """Whether a request is answered alike alone, beside another one, and beside a longer one."""
        first, second = self._row(way, 0), self._row(way, 1)
        if not self._agree(way, first, second):
            return "alone"
        if way == "image":
            return "padded"
        return "padded" if self._agree(way, first, self._row(way, 1, cut=1)) else "equal"

    def _agree(self, way: Way, *rows: Mapping[str, torch.Tensor]) -> bool:
        """Whether the last request is answered in a batch as it is alone."""
        tokens = len(rows[-1]["input_ids"]) if way == "text" else None
        try:
            with torch.inference_mode():
                together = self.run(way, self.batch(way, rows))
                alone = answers_in(self.run(way, self.batch(way, rows[-1:])))
        except (RuntimeError, ValueError, IndexError) as error:
            if ran_out(error):
                raise
            return False
        found = answers_in(row_of(together, len(rows) - 1, tokens))
        limit = 1e-4 if self.dtype == torch.float32 else 5e-2
        return found.keys() == alone.keys() and all(
            found[n].shape == e.shape
            and bool(((found[n] - e).abs() <= limit * e.abs().max()).all())
            for n, e in alone.items()
        )

    def _try(self, way: Way) -> None:
        try:
            with torch.inference_mode():
                self.run(way, self.batch(way, [self._row(way, 0)]))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            if ran_out(error):
                raise
            raise DeltafoldError(
                "engine-unsupported",
                f"{type(self.model).__name__} cannot be asked about a {way} alone.",
                facts=[("it says", str(error).splitlines()[0] if str(error) else repr(error))],
            ) from error


def _named(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _as_asked(inputs: Inputs, named: set[str]) -> Inputs:
    """A warm-up batch with all that requests bring: no other inputs are given later."""
    if "input_ids" not in inputs:
        return inputs
    extra = {}
    if "attention_mask" in named:
        extra["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "token_type_ids" in named:
        extra["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        extra["token_type_ids"][:, -1] = 1
    return {**inputs, **extra}


def _config(model: nn.Module) -> Any:
    return model.config


def row_of(value: Any, row: int, tokens: int | None) -> Any:
    """One request's part of a trunk's output `[1, ...]`, cut to its own tokens.

    Args:
        value: the output: a tensor, or tensors in tuples and mappings.
        row: of the request.
        tokens: of its text and of the longest one; None for images.
    """
    if isinstance(value, torch.Tensor):
        mine = value[row : row + 1]
        return mine[:, :tokens] if tokens is not None and mine.dim() >= 3 else mine
    if isinstance(value, Mapping):  # in transformers' outputs, None is left out
        kept = {k: row_of(v, row, tokens) for k, v in value.items()}
        return type(value)(**kept)
    if isinstance(value, tuple | list):
        return tuple(row_of(v, row, tokens) for v in value)
    return value


def answers_in(output: Any) -> dict[str, torch.Tensor]:
    """Tensors of an output by name."""
    if isinstance(output, torch.Tensor):
        return {"": output}
    return {n: v for n, v in output.items() if isinstance(v, torch.Tensor)}


def _padded(rows: Sequence[torch.Tensor], padding: int = 0) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=padding)
