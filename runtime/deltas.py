"""The deltas' host for one wrapped model: zoo, residency, hooks and the running batch together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from deltafold.compress import Checkpoint, DeltafoldError
from deltafold.compress.fingerprint import Digests, digest_source, fingerprint
from deltafold.compress.lora import cached_lora
from deltafold.runtime.batch import BatchState, loaded_rows
from deltafold.runtime.engine import VariantInfo
from deltafold.runtime.host import Row, Variant
from deltafold.runtime.kernels.forms import Target
from deltafold.runtime.layers import unwrap, wrap
from deltafold.runtime.loading import Handle, LoadedVariant, load_variant
from deltafold.runtime.quantized import quantization_in
from deltafold.runtime.quantizing import check_readers
from deltafold.runtime.residency import Residency
from deltafold.runtime.slots import SlotMap, warm_up_shape
from deltafold.runtime.zoo import Zoo, ZooEntry


class Deltas:
    """Implements `host.DeltaHost` on a torch model.

    Args:
        model: the base, on its device, in eval mode.
        base: its checkpoint, from which exact deltas are taken.
        zoo: folder of delta repos, or None.
        name: what the base is served as; it answers to "base" as well.
        max_deltas: most variants in memory; None keeps all that were ever used.
        strict: refuse to start while a delta of the zoo is broken or for another base.
        digests: the base's digests, where they are already known.

    Raises:
        DeltafoldError: `not-found`; with `strict`, the first broken delta's own error.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Checkpoint,
        zoo: str | Path | None = None,
        *,
        name: str = "base",
        max_deltas: int | None = None,
        strict: bool = True,
        digests: Digests | None = None,
    ) -> None:
        self.base_name = name
        self.base_folder = base.folder
        self._base = base
        self._digests = digests if digests is not None else digest_source(base)
        self.base_digest = fingerprint(self._digests)
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        self._target = Target(parameter.device, parameter.dtype)
        self._state = BatchState(parameter.device)
        self._slots = SlotMap(model)
        self._slots.observe(model, _warm_up_inputs(model, parameter.device))
        self._quantization = quantization_in(model)
        check_readers(self._slots)
        self._wrapped: set[str] = set()
        self._wrapping = threading.Lock()
        self._residency = Residency(max_deltas)
        folder = Path(zoo) if zoo is not None else None
        self._zoo = Zoo(
            folder,
            self._digests,
            name,
            reserved={name, "base"},
            import_lora=partial(cached_lora, base),
            quantization=self._quantization,
        )
        if strict:
            for entry in self._zoo.entries():
                entry.opened()

    def is_base(self, name: str) -> bool:
        """Whether a name stands for the base."""
        return name in (self.base_name, "base")

    def variants(self) -> list[VariantInfo]:
        """The base first, then every servable variant by name."""
        self._zoo.rescan()
        served = [self._describe(e) for e in self._zoo.entries() if e.error is None]
        return [self._describe_base(), *served]

    def broken(self) -> list[ZooEntry]:
        """Deltas of the zoo that are not served, with their errors."""
        return [entry for entry in self._zoo.entries() if entry.error is not None]

    def resolve(self, name: str) -> VariantInfo:
        """Describe the variant behind a name. Raises `variant-not-found`, or what is wrong with it."""
        return self._describe_base() if self.is_base(name) else self._describe(self._zoo.find(name))

    def acquire(self, name: str) -> Variant | None:
        """Load a variant if need be; None for the base."""
        if self.is_base(name):
            return None
        repo = self._zoo.find(name).opened()

        def load() -> LoadedVariant:
            loaded = load_variant(repo, self._base, self._slots, self._target)
            self._wrap(loaded)
            return loaded

        return Handle(name, self._residency.acquire(repo.digest, load))

    def release(self, variant: Variant | None) -> None:
        """Undo one `acquire`."""
        if variant is not None:
            self._residency.release(variant.digest)

    def batch(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """Within it, row i of every forward pass runs `rows[i]`."""
        return self._state.running(loaded_rows(rows))

    def resident(self) -> dict[str, int]:
        """Bytes in memory by name of the folder that a variant was loaded from."""
        return {v.folder.name: v.nbytes for v in self._residency.resident().values()}

    def close(self) -> None:
        """Give every module its own forward back."""
        with self._wrapping:
            for name in self._wrapped:
                unwrap(self._slots.module(name))
            self._wrapped.clear()

    def _wrap(self, loaded: LoadedVariant) -> None:
        with self._wrapping:
            for name, home in loaded.homes.items():
                if name not in self._wrapped:
                    wrap(name, home.module, self._state, home.layout)
                    self._wrapped.add(name)

    def _describe_base(self) -> VariantInfo:
        return VariantInfo(
            name=self.base_name,
            digest=self.base_digest,
            parent=None,
            codec="" if self._quantization is None else self._quantization.method,
            variant_bytes=self._base.nbytes(),
            tier=_tier(self._target),
        )

    def _describe(self, entry: ZooEntry) -> VariantInfo:
        manifest = entry.opened().manifest
        resident = manifest.delta_id in self._residency.resident()
        return VariantInfo(
            name=entry.name,
            digest=manifest.delta_id,
            parent=self.base_name,
            codec=manifest.codec_summary(),
            delta_bytes=manifest.totals.delta_bytes,
            variant_bytes=manifest.totals.variant_bytes,
            coverage=manifest.totals.coverage,
            tier=_tier(self._target) if resident else "disk",
            created=entry.stamp[0] // 10**9,
            quality=manifest.quality,
            root=entry.root,
        )


def _tier(target: Target) -> Any:
    return "host" if target.device.type == "cpu" else "device"


def _warm_up_inputs(model: nn.Module, device: torch.device) -> dict[str, Any]:
    rows, tokens = warm_up_shape()
    config = cast(Any, model).config
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        raise DeltafoldError(
            "engine-unsupported",
            f"{type(model).__name__} has no vocabulary; it is not a text model.",
        )
    ids = torch.arange(rows * tokens, device=device).reshape(rows, tokens) % int(vocabulary)
    # With a cache, so that modules which keep one are seen to do so.
    return {"input_ids": ids, "use_cache": True}
