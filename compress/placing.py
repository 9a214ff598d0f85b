"""Codecs whose cost is arithmetic, run on a device: a tensor goes there, its parts come back.

Everything else stays on the CPU: reading and hashing, masks, edits, and reading back what was coded,
which is what every reader will do. Loops in C wait for memory, and gain nothing from a device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.compress.evidence import Evidence, Need
from deltafold.compress.methods import Chain, Method
from deltafold.compress.methods.chain import codec_of
from deltafold.compress.terms import Context, Encoded, Term

#: One tensor at a time: two together take twice the memory, and neither is done sooner.
_turn = threading.Lock()


def parsed_device(name: str) -> torch.device:
    """A device by torch's name of it, on whatever machine; raises `bad-argument`."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise DeltafoldError(
            "bad-argument", f"there is no device {name!r}.", fix="--device cpu, or cuda"
        ) from error


def device_named(name: str) -> torch.device:
    """The same on this machine; raises `bad-argument` where it has none such."""
    found = parsed_device(name)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise DeltafoldError("bad-argument", "no CUDA device was found.", fix="--device cpu")
    return found


def description(device: torch.device) -> str:
    """What the bits of its arithmetic depend on, as far as that can be told."""
    if device.type != "cuda":
        return f"{device.type}, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"


def runs_on_devices(method: Method) -> bool:
    """Whether a method's codec says that its cost is arithmetic (`on_device`)."""
    return bool(getattr(codec_of(method), "on_device", False))


def placed(method: Method, device: torch.device) -> Method:
    """The method with its codec at work on a device, where that codec can be."""
    if device.type == "cpu" or not runs_on_devices(method):
        return method
    if isinstance(method, Chain):
        return Chain(method.edits, placed(method.codec, device))
    return OnDevice(method, device)


@dataclass(frozen=True)
class OnDevice:
    """A codec that is given its tensors on a device, and whose parts come back to the CPU."""

    id: ClassVar[str] = "on-device"
    summary: ClassVar[str] = "a codec at work on a device"
    paper: ClassVar[str] = "-"
    applied: ClassVar[str] = "as its codec"

    codec: Method
    device: torch.device

    @property
    def needs(self) -> tuple[Need, ...]:
        """The codec's."""
        return self.codec.needs

    def encode(self, delta: torch.Tensor, context: Context) -> list[Encoded]:
        """The codec's terms, their parts on the CPU.

        Raises:
            DeltafoldError: `not-enough-memory` where the device cannot hold the tensor's work.
        """

        def there(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.device)

        with _turn:
            try:
                coded = self.codec.encode(there(delta), _moved(context, there))
                return [Encoded(t, {k: part.cpu() for k, part in p.items()}) for t, p in coded]
            except torch.OutOfMemoryError as error:
                raise DeltafoldError(
                    "not-enough-memory",
                    f"{context.name} does not fit the memory of {self.device} while it is coded.",
                    fix="--device cpu, or another codec for this tensor (--set)",
                ) from error

    def plan(self, shape: tuple[int, ...], dtype: str) -> list[Term]:
        """The codec's."""
        return self.codec.plan(shape, dtype)


def _moved(context: Context, there: Callable[[torch.Tensor], torch.Tensor]) -> Context:
    def maybe(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else there(tensor)

    known = context.evidence
    if known is not None:
        known = Evidence(
            second_moment=maybe(known.second_moment),
            gradient=maybe(known.gradient),
            fisher=maybe(known.fisher),
            references={role: there(tensor) for role, tensor in known.references.items()},
            inputs=maybe(known.inputs),
            row_moment=maybe(known.row_moment),
        )
    return replace(
        context, base=maybe(context.base), variant=maybe(context.variant), evidence=known
    )
