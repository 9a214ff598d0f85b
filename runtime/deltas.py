"""The deltas' host for one wrapped model: zoo, residency, hooks and the running batch together."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import nn

from deltafold.compress import Checkpoint, DeltafoldError, DeltaRepo
from deltafold.compress.family import FOLDER
from deltafold.compress.fingerprint import Digests, digest_source, fingerprint
from deltafold.compress.lora import cached_lora
from deltafold.runtime.batch import BatchState, loaded_rows
from deltafold.runtime.blending import Blends, blend
from deltafold.runtime.engine import VariantInfo
from deltafold.runtime.gate import GATE
from deltafold.runtime.host import Row, Variant
from deltafold.runtime.kernels.forms import Target
from deltafold.runtime.kernels.shared import shared_bytes
from deltafold.runtime.layers import unwrap, wrap
from deltafold.runtime.loading import Handle, LoadedVariant, load_variant
from deltafold.runtime.misfit import NotAppliableError, misfit
from deltafold.runtime.mixtures import Mixture, is_mixture, parse_mixture
from deltafold.runtime.quantized import quantization_in
from deltafold.runtime.quantizing import check_readers, with_others
from deltafold.runtime.rebuilding import Blueprint, rebuild_variant
from deltafold.runtime.residency import Residency, Resident
from deltafold.runtime.room import within_memory
from deltafold.runtime.siblings import siblings_of
from deltafold.runtime.slots import SlotMap
from deltafold.runtime.warm_up import warm_up_inputs
from deltafold.runtime.zoo import Zoo, ZooEntry

#: Whether variants that cannot be applied get a dense model of their own, or are refused.
Rebuild: TypeAlias = Literal["auto", "never"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beside:
    """What belongs to variants and not to the wrapped model, such as heads: somebody else's part.

    Attributes:
        tensors: names those tensors of a delta that he applies.
        problem: why he cannot apply a variant's part; None where he can.
        blueprint: what a variant is to be where it is rebuilt.
    """

    tensors: Callable[[DeltaRepo], Collection[str]]
    problem: Callable[[DeltaRepo], NotAppliableError | None]
    blueprint: Callable[[DeltaRepo], Blueprint]


class Deltas:
    """Implements `host.DeltaHost` on a torch model.

    Args:
        model: the base, on its device, in eval mode.
        base: its checkpoint, from which exact deltas are taken.
        zoo: folder of delta repos, or None.
        name: what the base is served as; it answers to "base" as well.
        max_deltas: most variants in memory; None keeps all that were ever used.
        strict: refuse to start while a delta of the zoo is broken or for another base.
        rebuild: "auto" gives a variant whose delta cannot be applied a dense model of its own,
            which `Variant.model` holds; "never" refuses it.
        digests: the base's digests, where they are already known.
        inputs: keyword arguments of a forward pass like those that will come, and no others will
            come: parameters that have no say in the answers to them are then free to differ. None
            makes them up, and takes nothing for granted.
        beside: who applies those tensors of a delta that are not the model's, such as heads.

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
        rebuild: Rebuild = "never",
        digests: Digests | None = None,
        inputs: dict[str, Any] | None = None,
        beside: Beside | None = None,
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
        if rebuild not in ("auto", "never"):
            raise DeltafoldError("bad-argument", f"rebuild is 'auto' or 'never', not {rebuild!r}.")
        given = warm_up_inputs(model) if inputs is None else inputs
        self._slots.observe(model, given, find_idle=inputs is not None)
        # One launch for several layers is what the GPU kernels are for.
        together = self._slots.siblings(model, given) if self._state.packed else []
        self._siblings = siblings_of(together, self._state)
        self._beside = beside
        self._quantization = quantization_in(model)
        if self._quantization is not None and beside is not None:
            self._quantization = with_others(self._quantization, base, self._slots)
        check_readers(self._slots)
        self._model, self._rebuild = model, rebuild == "auto"
        self._misfits: dict[str, NotAppliableError | None] = {}
        self._wrapped: set[str] = set()
        self._wrapping = threading.Lock()
        self._residency = Residency(max_deltas)
        self._blends = Blends()
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
        """Describe what a name stands for: the base, a variant, or a mixture.

        Raises:
            DeltafoldError: `variant-not-found`, or what is wrong with it.
        """
        if self.is_base(name):
            return self._describe_base()
        mixture = self._mixture(name)
        if mixture is not None:
            return self._describe_mixture(mixture, self._entries(mixture))
        return self._describe(self._zoo.find(name))

    def acquire(self, name: str) -> Variant | None:
        """Load a variant, or the components of a mixture, if need be; None for the base."""
        if self.is_base(name):
            return None
        mixture = self._mixture(name)
        if mixture is not None:
            return self._acquire_mixture(name, mixture)
        return Handle(name, self._seated(self._zoo.find(name).opened()))

    def release(self, variant: Variant | None) -> None:
        """Undo one `acquire`."""
        if variant is None:
            return
        assert isinstance(variant, Handle)
        if variant.components:
            self._blends.release(variant.digest)
        for digest in variant.components or (variant.digest,):
            self._residency.release(digest)

    def batch(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """Within it, row i of every forward pass runs `rows[i]`."""
        return self._state.running(loaded_rows(rows))

    def resident(self) -> dict[str, int]:
        """Bytes in memory by name of the folder that a variant was loaded from, or of a mixture.

        What a mixture shares with its components is counted once, with these. What variants of a
        family share is there once, under `.families`, a name that no variant can have.
        """
        held = self._residency.resident().values()
        loaded = {v.folder.name: v.nbytes for v in held}
        families = {f for v in held if isinstance(v, LoadedVariant) for f in v.families}
        common = {FOLDER: size} if (size := shared_bytes(families)) else {}
        return self._blends.resident() | loaded | common

    def close(self) -> None:
        """Give every module its own forward back."""
        with self._wrapping:
            for name in self._wrapped:
                unwrap(self._slots.module(name))
            self._wrapped.clear()

    def _seated(self, repo: DeltaRepo) -> Resident:
        """A variant in memory, to be released later."""
        return self._residency.acquire(repo.digest, lambda: self._load(repo))

    def _mixture(self, name: str) -> Mixture | None:
        """A mixture, unless a folder of the zoo has that very name."""
        return parse_mixture(name) if is_mixture(name) and not self._zoo.holds(name) else None

    def _entries(self, mixture: Mixture) -> list[ZooEntry]:
        """The components' entries, checked to go together."""
        for name, _ in mixture.components:
            if self.is_base(name):
                raise DeltafoldError(
                    "bad-argument",
                    f"{name!r} is the base, which has no delta to mix.",
                    fix="leave it out: the weights of the others say how much of it is left",
                )
        entries = [self._zoo.find(name) for name, _ in mixture.components]
        self._blends.check([entry.opened() for entry in entries])
        for entry in entries:
            self._refuse_rebuilt(entry.opened())
        return entries

    def _refuse_rebuilt(self, repo: DeltaRepo) -> None:
        problem = self._misfit(repo)
        if problem is not None:
            raise DeltafoldError(
                "engine-unsupported",
                f"{repo.folder.name} cannot be part of a mixture: it has a model of its own.",
                facts=[("because of", problem.tensor)],
                fix="merge it with the others: deltafold merge",
            )

    def _acquire_mixture(self, name: str, mixture: Mixture) -> Handle:
        repos = [entry.opened() for entry in self._entries(mixture)]
        held: list[LoadedVariant] = []
        try:
            for repo in repos:
                seated = self._seated(repo)
                if not isinstance(seated, LoadedVariant):
                    # Only loading it told that it cannot be applied.
                    self._residency.release(seated.digest)
                    self._refuse_rebuilt(repo)
                assert isinstance(seated, LoadedVariant)
                held.append(seated)
            weights = [weight for _, weight in mixture.components]
            digest, folder = mixture.digest([v.digest for v in held]), repos[0].folder
            parts = list(zip(held, weights, strict=True))
            mixed = self._blends.acquire(digest, mixture.name, lambda: blend(digest, folder, parts))
        except BaseException:
            for variant in held:
                self._residency.release(variant.digest)
            raise
        return Handle(name, mixed, tuple(v.digest for v in held))

    def _load(self, repo: DeltaRepo) -> Resident:
        """Read a variant; where memory runs out, once more without those that nobody uses."""
        what = f"{repo.folder} cannot be loaded"
        try:
            return within_memory(what, lambda: self._read(repo))
        except DeltafoldError as error:
            if error.code != "not-enough-memory" or not self._residency.drop_idle():
                raise
            _log.warning("%s; idle variants were dropped to make room", error.message)
        # What a model holds may hold the model.
        gc.collect()
        return within_memory(what, lambda: self._read(repo))

    def _read(self, repo: DeltaRepo) -> Resident:
        problem = self._misfit(repo)
        if problem is None:
            try:
                loaded = self._applied(repo)
            except NotAppliableError as found:
                # It is kept, and must not keep alive what its last reader was doing.
                problem = self._misfits[repo.digest] = found.with_traceback(None)
            else:
                self._wrap(loaded)
                return loaded
        if not self._rebuild:
            raise problem.with_traceback(None)
        _log.info("%s is rebuilt, since it cannot be applied: %s", repo.folder, problem.message)
        blueprint = None if self._beside is None else self._beside.blueprint(repo)
        return rebuild_variant(
            repo, self._base, self._model, self._slots, self._target, problem.tensor, blueprint
        )

    def _applied(self, repo: DeltaRepo) -> LoadedVariant:
        beside = None if self._beside is None else self._beside.tensors(repo)
        # Decoding is arithmetic, of which none may go on while transformers loads another variant.
        with GATE.computing():
            return load_variant(
                repo, self._base, self._slots, self._target, self.base_folder, beside
            )

    def _misfit(self, repo: DeltaRepo) -> NotAppliableError | None:
        """Why a variant cannot be applied, by loading it or by its manifest; None if it can."""
        if repo.digest not in self._misfits:
            whole = self._beside is None
            found = misfit(repo, self._base, self._slots, self.base_folder, whole=whole)
            if found is None and self._beside is not None:
                found = self._beside.problem(repo)
            self._misfits[repo.digest] = found
        return self._misfits[repo.digest]

    def _how(self, problem: NotAppliableError | None) -> Literal["delta", "rebuilt", "refused"]:
        if problem is None:
            return "delta"
        return "rebuilt" if self._rebuild else "refused"

    def _wrap(self, loaded: LoadedVariant) -> None:
        with self._wrapping:
            for name, home in loaded.homes.items():
                if name not in self._wrapped:
                    siblings = self._siblings.get(name)
                    wrap(name, home.module, self._state, home.layout, siblings)
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

    def _describe_mixture(self, mixture: Mixture, entries: Sequence[ZooEntry]) -> VariantInfo:
        infos = [self._describe(entry) for entry in entries]
        return VariantInfo(
            name=mixture.name,
            digest=mixture.digest([info.digest for info in infos]),
            parent=self.base_name,
            codec="mixture",
            delta_bytes=sum(info.delta_bytes for info in infos),
            variant_bytes=max(info.variant_bytes for info in infos),
            coverage=min(info.coverage for info in infos),
            tier="disk" if any(i.tier == "disk" for i in infos) else infos[0].tier,
            created=max(info.created for info in infos),
        )

    def _describe(self, entry: ZooEntry) -> VariantInfo:
        repo = entry.opened()
        manifest = repo.manifest
        problem = self._misfit(repo)
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
            applied=self._how(problem),
            obstacle="" if problem is None else problem.tensor,
            root=entry.root,
        )


def _tier(target: Target) -> Any:
    return "host" if target.device.type == "cpu" else "device"
