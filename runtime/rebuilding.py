"""A variant as a dense model of its own, made in memory from base and delta.

For variants whose delta cannot be applied to the shared model: it sits in what a layer remembers, or
the fine-tune has other layers or another configuration. transformers itself puts the tensors into the
model, so fused and renamed ones find their place as in any checkpoint. What the fine-tune left as it
was is not copied: the model holds the base's own parameters there, or its own quantised layers. What it
changed has the fine-tune's values, whether the base runs quantised or not.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltafold.compress import Checkpoint, DeltafoldError, DeltaRepo
from deltafold.compress.errors import name_some
from deltafold.compress.memory import ran_out
from deltafold.compress.naming import renamed
from deltafold.compress.rebuild import restored_tensor
from deltafold.runtime.gate import GATE
from deltafold.runtime.kernels.forms import Target
from deltafold.runtime.layers import is_linear, is_transposed_linear
from deltafold.runtime.loading import RebuiltVariant
from deltafold.runtime.misfit import slot_of
from deltafold.runtime.quantized import QuantizedLinear, is_quantized
from deltafold.runtime.quiet import quiet
from deltafold.runtime.room import need_room
from deltafold.runtime.slots import SlotMap

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blueprint:
    """What a variant's dense model is to be.

    Attributes:
        cls: its class of transformers.
        spare: names of parameters, without the class's prefix, that may go without a value. They are
            zero then.
        finish: makes what an engine keeps of the model, once that is whole and in its place.
    """

    cls: Any
    spare: frozenset[str] = frozenset()
    finish: Callable[[Any], Any] = lambda model: model


def rebuild_variant(
    repo: DeltaRepo,
    base: Checkpoint,
    shared: Any,
    slots: SlotMap,
    target: Target,
    tensor: str,
    blueprint: Blueprint | None = None,
) -> RebuiltVariant:
    """Make a variant's dense model and check that every tensor of the delta is in it.

    Args:
        repo: the delta.
        base: its base's checkpoint.
        shared: the base's model, of transformers.
        slots: of that model.
        target: where and in which dtype the model is to run.
        tensor: what makes it necessary; kept for whoever asks.
        blueprint: None makes another one of the shared model's class.

    Raises:
        DeltafoldError: `engine-unsupported` where the fine-tune's configuration is of another kind of
            model; `coverage` where a tensor finds no place or a parameter gets no value;
            `not-enough-memory`; `checksum` and what else reading gives.
    """
    blueprint = blueprint or Blueprint(type(shared))
    _need_room(repo, base, target)
    with GATE.computing():
        state = {name: _value(repo, base, slots, target, name) for name in repo.variant_names()}
    model, info = _load(repo, blueprint.cls, shared, state, target)
    missing = set(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    spare = {name for name in missing if _bare(model, name) in blueprint.spare}
    if missing - spare:
        raise _not_whole(repo, "parameters without a value", sorted(missing - spare))
    zero_missing(model, sorted(spare))
    lost = _lost(repo, model, state, told=not info["unexpected_keys"])
    if lost:
        raise _not_whole(repo, "without a place", lost)
    _share(model, slots)
    _share_quantised(repo, model, slots, state)
    del state
    model = model.to(target.device).eval()
    nbytes = _own_bytes(model, slots)
    with GATE.computing():
        kept = blueprint.finish(model)
    _log.info("%s is served by a model of its own (%d bytes): %s", repo.folder, nbytes, tensor)
    return RebuiltVariant(repo.digest, repo.folder, kept, tensor, nbytes)


def zero_missing(model: nn.Module, missing: Iterable[str]) -> frozenset[str]:
    """Zero what a checkpoint does not bring, so that a variant's difference is its value.

    Returns:
        The names of these tensors in the model.
    """
    state = model.state_dict()
    known = frozenset(name for name in missing if name in state)
    with torch.no_grad():
        for name in known:
            state[name].zero_()
    return known


def _need_room(repo: DeltaRepo, base: Checkpoint, target: Target) -> None:
    """Refuse a model that would not fit, before a byte of it is made."""
    what = f"{repo.folder} needs a dense model of its own"
    changed = _dense_bytes((repo.entry(n).shape for n in repo.manifest.tensors), target.dtype)
    need_room(changed, target.device, what)
    if target.device.type != "cpu":
        # There what is unchanged is the base's own memory; here all of it is made first.
        named = repo.named(base)
        kept = _dense_bytes((named.spec(n).shape for n in repo.manifest.unchanged), target.dtype)
        need_room(changed + kept, torch.device("cpu"), what)


def _dense_bytes(shapes: Iterable[Sequence[int]], dtype: torch.dtype) -> int:
    return sum(math.prod(shape) for shape in shapes) * dtype.itemsize


def _bare(model: Any, name: str) -> str:
    """A parameter's name without the prefix that its class puts before its trunk's."""
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    return name.removeprefix(f"{prefix}.") if prefix else name


def _value(
    repo: DeltaRepo, base: Checkpoint, slots: SlotMap, target: Target, name: str
) -> torch.Tensor:
    """One tensor of the fine-tune, rounded once, to the dtype in which its like is run."""
    slot = slot_of(name, repo.named(base), slots)
    # Codes of a quantised layer are no values.
    plain = slot is not None and not is_quantized(slots.slots[slot].module)
    held = slots.slots[slot].tensor.detach() if slot is not None and plain else None
    dtype = held.dtype if held is not None and held.is_floating_point() else target.dtype
    value = restored_tensor(repo, base, name, dtype)
    unchanged = name not in repo.manifest.tensors
    if unchanged and held is not None and held.shape == value.shape and held.device.type == "cpu":
        # The base's own memory from the start, where it can be used as it is.
        return held if torch.equal(held, value) else value
    return value


def _load(
    repo: DeltaRepo, kind: Any, shared: Any, state: dict[str, torch.Tensor], target: Target
) -> tuple[Any, dict[str, Any]]:
    """The model with these tensors, and what transformers says of loading them."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(repo.folder, local_files_only=True)
        if not isinstance(config, type(shared.config)):
            raise TypeError(f"its configuration is a {type(config).__name__}")
        with GATE.loading(), quiet():
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=target.dtype,
                attn_implementation=shared.config._attn_implementation,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        if ran_out(error):
            raise
        raise DeltafoldError(
            "engine-unsupported",
            f"{repo.folder} cannot be rebuilt as a {kind.__name__}: {error}",
            fix="restore this variant and serve it by itself",
        ) from error
    return model, info


def _lost(repo: DeltaRepo, model: Any, state: dict[str, torch.Tensor], *, told: bool) -> list[str]:
    """Tensors of the delta that the model does not hold.

    They are looked for by content. A loader may also change values (undo a packing, say); where
    transformers found a use for all it was given (`told`), such a tensor counts as placed, unless
    the model's class names it among those that are passed over in silence.
    """
    slots = SlotMap(model)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    lost = []
    for name in sorted(repo.manifest.tensors):
        slot = slots.find(name)
        held = None if slot is None else slots.slots[slot].tensor.detach()
        if held is not None and held.shape == state[name].shape:
            found = _equal(held, state[name]) or slots.region(name, state[name], state) is not None
        else:
            silent = any(re.search(pattern, name) for pattern in ignored)
            found = slots.region(name, state[name], state) is not None or (told and not silent)
        if not found:
            lost.append(name)
    return lost


def _equal(held: torch.Tensor, value: torch.Tensor) -> bool:
    value = value.to(held.device, held.dtype)
    return bool(((held == value) | ((held != held) & (value != value))).all())


def _share(model: nn.Module, slots: SlotMap) -> None:
    """Give the model the base's own parameters where they are equal."""
    for module_name, module in model.named_modules():
        for attribute, value in list(module._parameters.items()):
            name = slots.find(f"{module_name}.{attribute}" if module_name else attribute)
            slot = slots.slots[name] if name is not None else None
            if value is None or slot is None or not isinstance(slot.tensor, nn.Parameter):
                continue
            mine, held = value.detach(), slot.tensor.detach()
            if mine.shape != held.shape or mine.dtype != held.dtype:
                continue
            if torch.equal(mine.to(held.device), held):
                module._parameters[attribute] = slot.tensor


def _share_quantised(
    repo: DeltaRepo, model: Any, slots: SlotMap, state: Mapping[str, torch.Tensor]
) -> None:
    """Give the model the base's quantised layers where the fine-tune left the weights as they were."""
    unchanged, modules = set(repo.manifest.unchanged), dict(model.named_modules())
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    for slot in slots.slots.values():
        layer = slot.module
        if not isinstance(layer, QuantizedLinear) or slot.attribute != "weight":
            continue
        name = renamed(repo.manifest.base_names, layer.tensor)
        # The shared model may be the trunk of the variant's own class.
        path = next(
            (p for p in (slot.module_name, f"{prefix}.{slot.module_name}") if p in modules), ""
        )
        mine: Any = modules[path]
        if name not in unchanged or not (is_linear(mine) or is_transposed_linear(mine)):
            continue
        if mine.weight.shape == state[name].shape and _equal(mine.weight.detach(), state[name]):
            model.set_submodule(path, layer.beside(mine._parameters.get("bias")))


def _own_bytes(model: nn.Module, slots: SlotMap) -> int:
    shared = {slot.tensor.untyped_storage().data_ptr() for slot in slots.slots.values()}
    own = {}
    for value in [*model.parameters(), *model.buffers()]:
        storage = value.untyped_storage()
        own[storage.data_ptr()] = storage.nbytes()
    return sum(n for place, n in own.items() if place not in shared)


def _not_whole(repo: DeltaRepo, label: str, names: list[str]) -> DeltafoldError:
    return DeltafoldError(
        "coverage",
        f"{repo.folder}: a model of its own does not hold all of this variant either.",
        facts=[(label, name_some(names, len(repo.variant_names())))],
        fix="nothing is served below 100 %; check its config.json, or restore this variant and "
        "serve it by itself",
    )
