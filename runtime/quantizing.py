"""Quantising the linear layers of a loaded model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from deltafold.compress import Checkpoint, DeltafoldError
from deltafold.compress.manifest import Quantization
from deltafold.compress.quantized import quantization_of, quantize
from deltafold.runtime.layers import is_linear, is_transposed_linear
from deltafold.runtime.quantized import QuantizedLinear, need_bitsandbytes
from deltafold.runtime.slots import Slot, SlotMap


def check_quantization(base: Checkpoint, method: str, device: torch.device) -> None:
    """Refuse what cannot be quantised before the model is read.

    Raises:
        DeltafoldError: `bad-argument` for an unknown method and for a checkpoint that is quantised
            already, `missing-extra` where bitsandbytes is needed and cannot be used on this device.
    """
    quantization_of(base, method)
    if _says_quantised(base.folder):
        raise DeltafoldError(
            "bad-argument",
            f"the base {base.reference.name} is a quantised checkpoint already.",
            fix="leave --base-quantization out, or give the base in its 16-bit form",
        )
    if method == "nf4":
        need_bitsandbytes(device)


@torch.no_grad()
def quantize_base(model: nn.Module, base: Checkpoint, method: str) -> int:
    """Replace every linear layer whose weight `quantization_of` names; returns how many.

    The codes are made from the checkpoint's own tensor, not from what the model made of it. Tensors
    that the model keeps in another way than as the weight of a plain linear layer stay as they are.

    Args:
        model: the base on the CPU.
        base: its checkpoint.
        method: `nf4` or `int8`.

    Raises:
        DeltafoldError: `engine-unsupported` where nothing is left to quantise; `not-finite`.
    """
    slots, replaced = SlotMap(model), 0
    wanted = quantization_of(base, method)
    for tensor in wanted.tensors:
        name = slots.find(tensor)
        if name is None or not _is_plain(slots, slots.slots[name]):
            continue
        slot, stored = slots.slots[name], base.tensor(tensor)
        if slot.tensor.shape != stored.shape or not _equal(slot.tensor, stored):
            continue
        old, turned = slot.module, is_transposed_linear(slot.module)
        bias = old._parameters.get("bias")
        packed = quantize(tensor, stored, wanted.method)
        model.set_submodule(
            slot.module_name, QuantizedLinear(tensor, packed, bias, transposed=turned).eval()
        )
        replaced += 1
    if not replaced:
        raise DeltafoldError(
            "engine-unsupported",
            f"{type(model).__name__} has no linear layer that could be quantised.",
            facts=[("candidates by name and shape", len(wanted.tensors))],
            fix="leave --base-quantization out",
        )
    return replaced


def with_others(found: Quantization, base: Checkpoint, slots: SlotMap) -> Quantization:
    """A model's quantisation, and tensors of the base's that are none of the model's.

    Whoever applies those takes a variant's own values, whatever they are stored as differences to.
    """
    wanted = quantization_of(base, found.method).tensors
    others = [name for name in wanted if slots.find(name) is None]
    return found.model_copy(update={"tensors": tuple(sorted({*found.tensors, *others}))})


def _is_plain(slots: SlotMap, slot: Slot) -> bool:
    """Whether a weight belongs to one linear layer alone, and to no table or output layer."""
    module = slot.module
    return (
        (is_linear(module) or is_transposed_linear(module))
        and slot.attribute == "weight"
        and id(module) not in slots.vocabulary
        and slots.tied_to(slot.name) == [slot.name]
    )


def _equal(held: torch.Tensor, stored: torch.Tensor) -> bool:
    return torch.equal(held.detach(), stored.to(held.device, held.dtype))


def check_readers(slots: SlotMap) -> None:
    """Refuse models in which somebody else than the layer reads a quantised weight.

    Raises:
        DeltafoldError: `engine-unsupported`.
    """
    for slot in slots.slots.values():
        if not isinstance(slot.module, QuantizedLinear) or slot.attribute != "weight":
            continue
        others = [name for name in slots.reading(slot.name) if name != slot.module_name]
        if others:
            raise DeltafoldError(
                "engine-unsupported",
                f"the model reads {slot.name} outside of its layer, where codes mean nothing.",
                facts=[("read by", ", ".join(others))],
                fix="serve this base without --base-quantization",
            )


def _says_quantised(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("quantization_config"))
