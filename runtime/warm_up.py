"""Inputs for a warm-up batch of any transformers model, made of what the model says of itself.

The forward method's signature names the inputs, the configuration gives their sizes. Where that
leaves a choice, the model is asked: richer inputs are tried before poorer ones, and the first that
runs are taken. No architecture is known by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from deltafold.compress import DeltafoldError
from deltafold.runtime.layout import WARM_ROWS, WARM_TOKENS

Inputs: TypeAlias = dict[str, Any]

#: Side of an image where the configuration leaves it open, in pixels.
_SIDES = (224, 64)
#: Samples of a waveform, enough for the strides of any convolutional front end.
_SAMPLES = 4000
_FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)


@torch.no_grad()
def warm_up_inputs(model: nn.Module, *, cached: bool = True) -> Inputs:
    """Keyword arguments of a forward pass over `WARM_ROWS` requests, all of them different.

    Args:
        model: of transformers, in eval mode.
        cached: use the model's cache, if it has one, as generating does.

    Returns:
        `input_ids` and `decoder_input_ids` int64 `[WARM_ROWS, WARM_TOKENS]` (longer where images
        take places among the tokens); `pixel_values` `[WARM_ROWS, channels, height, width]` and
        other features in the model's dtype; `use_cache` where the model has a cache.

    Raises:
        DeltafoldError: `engine-unsupported` where the model runs with none of them.
    """
    failure: Exception | None = None
    for inputs in _candidates(model, cached):
        try:
            model(**inputs)
        except (torch.OutOfMemoryError, DeltafoldError):
            raise
        except _FAILURES as error:
            failure = failure or error
        else:
            return inputs
    raise DeltafoldError(
        "engine-unsupported",
        f"{type(model).__name__} cannot be run on inputs that follow from its configuration.",
        facts=[("it says", str(failure).splitlines()[0] if str(failure or "") else repr(failure))],
        fix="restore this model's variants and serve each by itself",
    )


def later_inputs(inputs: Inputs, output: Any) -> Inputs | None:
    """Keyword arguments that go on by one token from a pass; None where it left no cache."""
    cache = {n: getattr(output, n, None) for n in ("past_key_values", "cache_params")}
    cache = {n: c for n, c in cache.items() if c is not None}
    if not cache:
        return None
    own = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    # An encoder's inputs are given again; images stand in the cache like any token.
    kept = inputs if own == "decoder_input_ids" else {"use_cache": True}
    return {**kept, own: inputs[own][:, :1], **cache}


def _candidates(model: nn.Module, cached: bool) -> Iterator[Inputs]:
    """Inputs worth a try, richest first."""
    named = set(inspect.signature(model.forward).parameters)
    has_cache = bool({"use_cache", "past_key_values", "cache_params"} & named)
    plain = list(_without_cache(model, named))
    for inputs in (*plain, *(_ended(model, inputs) for inputs in plain if "input_ids" in inputs)):
        if not cached:
            # Decoders keep a cache unless they are told not to.
            yield {**inputs, "use_cache": False} if "use_cache" in named else inputs
            continue
        if has_cache or _generates(model):
            yield {**inputs, "use_cache": True}
        if not _generates(model):
            yield inputs


def _without_cache(model: nn.Module, named: set[str]) -> Iterator[Inputs]:
    text, signals = _text(model, named), list(_signals(model, named))
    for signal in signals:
        if "input_ids" in text and not _is_pair(model, named):
            placed = _with_placeholders(model, text, signal, named)
            if placed is not None:
                yield placed
        else:
            yield {**text, **signal}
    # A model that reads text and images also reads text alone.
    if text and not (signals and _main_input(model) in signals[0]):
        yield text
    yield from signals


def _ended(model: nn.Module, inputs: Inputs) -> Inputs:
    """The same with texts that end in the end token, which some heads look for."""
    end = end_token(_config(model))
    return inputs if end is None else {**inputs, "input_ids": ended(inputs["input_ids"], end)}


def end_token(config: Any) -> int | None:
    """The token that ends a text; None where there is none that the model knows."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    end, words = getattr(text, "eos_token_id", None), getattr(text, "vocab_size", None)
    known = isinstance(end, int) and isinstance(words, int) and 0 <= end < words
    return end if known else None


def ended(ids: torch.Tensor, end: int) -> torch.Tensor:
    """Tokens `[..., T]` with the end token in their last place and in no other."""
    ids = torch.where(ids == end, ids.roll(1, -1), ids)
    return torch.cat([ids[..., :-1], torch.full_like(ids[..., -1:], end)], dim=-1)


def _text(model: nn.Module, named: set[str]) -> Inputs:
    """Token ids for every input of the model that takes some."""
    config = _config(model)
    words = _vocabulary(model)
    if words is None:
        return {}
    count = WARM_ROWS * WARM_TOKENS
    ids = torch.arange(count, device=_device(model)).reshape(WARM_ROWS, WARM_TOKENS) % words
    # No word may be taken for an image.
    ids[ids == _image_token(config)] = 0
    inputs: Inputs = {}
    if "input_ids" in named and _main_input(model) in ("input_ids", "pixel_values"):
        inputs["input_ids"] = ids
    if "decoder_input_ids" in named and getattr(config, "is_encoder_decoder", False):
        start = getattr(config, "decoder_start_token_id", None)
        own = (ids + 1) % words
        if isinstance(start, int) and 0 <= start < words:
            own[:, 0] = start
        inputs["decoder_input_ids"] = own
    return inputs


def _signals(model: nn.Module, named: set[str]) -> Iterator[Inputs]:
    """Images and sounds, by the shapes that the configuration allows."""
    config = _config(model)
    if "flattened_patches" in named:
        yield {"flattened_patches": _numbered_patches(model)}
    if "image_grid_thw" in named:
        yield from _patches(model)
    elif "pixel_values" in named:
        vision = _vision(config)
        for height, width in _sides(vision):
            channels = int(getattr(vision, "num_channels", None) or 3)
            yield {"pixel_values": _waves(model, (WARM_ROWS, channels, height, width))}
    bins = getattr(config, "num_mel_bins", None)
    if "input_features" in named and isinstance(bins, int):
        frames = getattr(config, "max_source_positions", None) or 32
        for length in (2 * frames, frames):
            yield {"input_features": _waves(model, (WARM_ROWS, bins, length))}
            yield {"input_features": _waves(model, (WARM_ROWS, length, bins))}
    if "input_values" in named:
        if isinstance(bins, int):
            length = int(getattr(config, "max_length", None) or 32)
            yield {"input_values": _waves(model, (WARM_ROWS, length, bins))}
        yield {"input_values": _waves(model, (WARM_ROWS, _SAMPLES))}


def _vision(config: Any) -> Any:
    """The part of a configuration that speaks of images."""
    encoder = getattr(config, "encoder", None)
    return getattr(config, "vision_config", None) or (
        encoder if hasattr(encoder, "image_size") else config
    )


def _patches(model: nn.Module) -> Iterator[Inputs]:
    """Images that come as one list of patches, with each image's size in patches."""
    vision = _vision(_config(model))
    names = ("temporal_patch_size", "patch_size", "spatial_merge_size")
    depth, side, merged = (int(getattr(vision, n, None) or 1) for n in names)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    grid = torch.tensor([[1, 2 * merged, 2 * merged]] * WARM_ROWS, device=_device(model))
    shape = (WARM_ROWS * 4 * merged**2, int(channels) * depth * side**2)
    yield {"pixel_values": _waves(model, shape), "image_grid_thw": grid}


def _numbered_patches(model: nn.Module) -> torch.Tensor:
    """Patches that bring their row and column, counted from 1, in front."""
    vision = _vision(_config(model))
    width = int(getattr(vision, "patch_embed_hidden_size", None) or 768)
    values = _waves(model, (WARM_ROWS, 4, 2 + width))
    places = torch.tensor([[1, 1], [1, 2], [2, 1], [2, 2]], device=values.device)
    values[:, :, :2] = places.to(values.dtype)
    return values


def _sides(config: Any) -> Iterator[tuple[int, int]]:
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        yield size, size
    elif isinstance(size, list | tuple) and len(size) == 2:
        yield int(size[0]), int(size[1])
    for side in _SIDES:
        yield side, side


def _with_placeholders(
    model: nn.Module, text: Inputs, signal: Inputs, named: set[str]
) -> Inputs | None:
    """Text with as many image tokens as the model makes of one image."""
    token = _image_token(_config(model))
    features: Any = getattr(model, "get_image_features", None)
    if token < 0 or features is None:
        return None
    try:
        found = cast(Any, features)(**signal)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES:
        return None
    count = _rows_of(getattr(found, "pooler_output", found)) // WARM_ROWS
    ids = text["input_ids"]
    images = ids.new_full((WARM_ROWS, count), token)
    ids = torch.cat([ids[:, :-1], images, ids[:, -1:]], dim=1)
    placed = {**text, "input_ids": ids, **signal}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in named:
            placed[name] = (ids == token).long()
    return placed


def _rows_of(value: Any) -> int:
    """Vectors in a tensor, or in a list of tensors."""
    if isinstance(value, torch.Tensor):
        return int(value.shape[:-1].numel())
    return sum(_rows_of(v) for v in value) if isinstance(value, list | tuple) else 0


def _is_pair(model: nn.Module, named: set[str]) -> bool:
    """Whether text and images are two inputs side by side, not one within the other."""
    return _image_token(_config(model)) < 0 and "past_key_values" not in named


def _image_token(config: Any) -> int:
    """The token that stands for a piece of an image; -1 where there is none."""
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    return token if isinstance(token, int) else -1


def _vocabulary(model: nn.Module) -> int | None:
    config = _config(model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for holder in (text, config):
        words = getattr(holder, "vocab_size", None)
        if isinstance(words, int) and words > 0:
            return words
    return None


def _generates(model: nn.Module) -> bool:
    can: Any = getattr(model, "can_generate", None)
    return can is not None and bool(can())


def _main_input(model: nn.Module) -> str:
    return str(getattr(model, "main_input_name", "input_ids"))


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise DeltafoldError(
            "engine-unsupported", f"{type(model).__name__} is not a model of transformers."
        )
    return config


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _waves(model: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """Smooth values between -1 and 1 that do not repeat from one request to the next."""
    count = torch.Size(shape).numel()
    # A quantised model holds codes beside what it computes in.
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    values = torch.sin(torch.arange(count, dtype=torch.float64) * 0.7391)
    return values.reshape(shape).to(parameter.device, parameter.dtype)
