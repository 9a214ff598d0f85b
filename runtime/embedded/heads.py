"""A variant's own class on the shared trunk: classification heads, poolers of labels, reward heads.

The trunk (`BertModel`, `ViTModel`, `LlamaModel`, ...) runs once for a mixed batch. Each variant's
configuration names its own class of transformers; that class is built without its trunk, and in the
trunk's place stands what the shared one said about the variant's requests. So pooling, activation and
every odd way of reading hidden states are the class's own. A class that asks its trunk for more than
the shared one gives is found out by trying it, before any of its values are read.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from deltafold.compress import Checkpoint, DeltafoldError, DeltaRepo
from deltafold.compress.memory import ran_out
from deltafold.runtime.embedded.own import own_model
from deltafold.runtime.embedded.plans import (
    FAILURES,
    Plan,
    named_class,
    plan_of,
    refused_input,
)
from deltafold.runtime.misfit import NotAppliableError
from deltafold.runtime.rebuilding import Blueprint

#: Heads kept ready; they are small beside their variants, and made again on use.
_KEPT: Final = 256


class Head:
    """One variant's class, ready to run on the shared trunk's output. For one thread at a time.

    Attributes:
        config: its configuration.
    """

    def __init__(self, plan: Plan, values: Mapping[str, torch.Tensor]) -> None:
        """A head with these values.

        Raises:
            NotAppliableError: `engine-unsupported` where the class cannot do without its trunk.
        """
        self._plan = plan
        self.config: Any = plan.model.config
        plan.model.load_state_dict(dict(values), strict=True, assign=True)
        left = [
            n for n, t in (*plan.model.named_parameters(), *plan.model.named_buffers()) if t.is_meta
        ]
        if left:
            raise plan.unsupported("cannot be built without its trunk", names=left)
        self._inputs = set(inspect.signature(plan.model.forward).parameters)

    def run(self, inputs: Mapping[str, Any], trunk: Any) -> Mapping[str, Any]:
        """The class's own output for some requests.

        Args:
            inputs: what the trunk was given for them.
            trunk: what it returned for them.

        Raises:
            DeltafoldError: `bad-argument` where the class refuses them.
        """
        self._plan.place.output = trunk
        try:
            kept = {n: v for n, v in inputs.items() if n in self._inputs}
            output = self._plan.model(**kept, return_dict=True)
        except ValueError as error:
            raise refused_input(self._plan.model, error) from error
        finally:
            self._plan.place.output = None
        assert isinstance(output, Mapping), type(output)
        return output

    @torch.inference_mode()
    def attempt(self, trunk: Trunk) -> None:
        """Run on what the trunk said in the warm-up.

        Raises:
            NotAppliableError: `engine-unsupported` where the class needs more than a trunk can give to
                some requests of a batch, such as the hidden states of all layers.
        """
        failure = ""
        try:
            self.run(*trunk.sample)
        except (*FAILURES, NotImplementedError, AssertionError) as error:
            if ran_out(error):
                raise
            failure = (str(error) or repr(error)).splitlines()[0]
        asked = sorted(self._plan.place.asked)
        if failure or asked:
            raise self._plan.unsupported(
                "cannot be run on the shared model's output",
                says=f"it asks for {', '.join(asked)}" if asked else failure,
            )

    @property
    def folder(self) -> Path:
        """Whose head it is."""
        return self._plan.folder

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(p.numel() * p.element_size() for p in self._plan.model.parameters())


@dataclass(frozen=True)
class Trunk:
    """What heads need to know of the shared model.

    Attributes:
        kind: its class.
        tensors: its tensors, and the names under which each of them is known.
        lacking: those that the base's checkpoint does not bring.
        dispensable: those that have no say in its hidden states, such as a pooler's.
        device: where it is.
        dtype: what it computes in.
        sample: inputs of one request, and what it returned for them. Each head is tried on it.
    """

    kind: type[nn.Module]
    tensors: Mapping[str, frozenset[str]]
    lacking: frozenset[str]
    dispensable: frozenset[str]
    device: torch.device
    dtype: torch.dtype
    sample: tuple[Mapping[str, Any], Any]


@dataclass(frozen=True)
class _Part:
    """A variant as its manifest and configuration tell of it.

    Attributes:
        tensors: those of its delta that its head takes, or that its class can do without.
        without: the trunk's tensors for which it has no value.
        problem: why it cannot be run on the shared trunk; None where it can.
    """

    tensors: frozenset[str]
    without: frozenset[str]
    problem: NotAppliableError | None


class Heads:
    """Heads by the digest of their delta, made on first use. Thread-safe."""

    def __init__(self, base: Checkpoint, trunk: Trunk) -> None:
        self._base, self._trunk = base, trunk
        self._heads: OrderedDict[str, Head] = OrderedDict()
        self._parts: dict[str, _Part] = {}
        self._lock = threading.Lock()

    def tensors(self, repo: DeltaRepo) -> frozenset[str]:
        """Tensors of a delta that its head takes, or that its class can do without."""
        return self._part(repo).tensors

    def problem(self, repo: DeltaRepo) -> NotAppliableError | None:
        """Why a variant's class cannot be run on the shared trunk; None where it can."""
        return self._part(repo).problem

    def blueprint(self, repo: DeltaRepo) -> Blueprint:
        """A variant's own class, or the trunk's where its configuration names none."""
        _, cls = named_class(repo.folder)
        plan = plan_of(repo.folder)
        bare = plan is None or not plan.own
        spare = self._trunk.dispensable if bare else frozenset[str]()
        return Blueprint(cls or self._trunk.kind, spare, own_model)

    def resident(self) -> dict[str, int]:
        """Bytes in memory by name of the folder that a head was loaded from."""
        with self._lock:
            return {head.folder.name: head.nbytes for head in self._heads.values()}

    def without(self, digest: str, folder: Path | None) -> frozenset[str]:
        """The trunk's tensors for which a variant (None: the base) has no value of its own."""
        if folder is None:
            return self._trunk.lacking
        known = self._parts.get(digest)
        return (known or self._part(_opened(digest, folder))).without

    def get(self, digest: str, folder: Path | None) -> Head:
        """The head of a variant, or of the base (None).

        Raises:
            DeltafoldError: `bad-argument` where the model has no head; `engine-unsupported` where
                it cannot be run on the shared trunk; and what reading a delta gives.
        """
        with self._lock:
            if digest not in self._heads:
                self._heads[digest] = self._make(
                    None if folder is None else _opened(digest, folder)
                )
                while len(self._heads) > _KEPT:
                    self._heads.popitem(last=False)
            self._heads.move_to_end(digest)
            return self._heads[digest]

    def _part(self, repo: DeltaRepo) -> _Part:
        with self._lock:
            if repo.digest not in self._parts:
                plan = plan_of(repo.folder)
                without = self._without(repo, plan)
                tensors, problem = frozenset[str](), None
                if plan is not None:
                    tensors = _beside(repo, plan, without)
                    problem = self._problem(plan, without)
                self._parts[repo.digest] = _Part(tensors, without, problem)
            return self._parts[repo.digest]

    def _problem(self, plan: Plan, without: frozenset[str]) -> NotAppliableError | None:
        # A head may read any part of its trunk's output; of a bare model that is the caller's choice.
        own = {plan.within(n) for n in plan.trunk} if plan.own else set()
        needed = sorted(without & own | without - self._trunk.dispensable)
        if needed:
            what = "does not bring tensors that the shared model needs"
            return plan.unsupported(what, names=needed)
        if not plan.own:
            return None
        if plan.trunk_class is not self._trunk.kind:
            assert plan.trunk_class is not None
            there = f"it reads a {plan.trunk_class.__name__}, not a {self._trunk.kind.__name__}"
            return plan.unsupported("reads another model than the shared one", says=there)
        try:
            Head(plan, self._nothing(plan)).attempt(self._trunk)
        except NotAppliableError as error:
            return error.with_traceback(None)
        return None

    def _nothing(self, plan: Plan) -> dict[str, torch.Tensor]:
        """Zeros for all of a head's parameters, in no more memory than one number takes."""
        values = {}
        for name, tensor in plan.model.state_dict().items():
            dtype = self._trunk.dtype if tensor.is_floating_point() else tensor.dtype
            values[name] = torch.zeros((), dtype=dtype, device=self._trunk.device).expand(
                tensor.shape
            )
        return values

    def _make(self, repo: DeltaRepo | None) -> Head:
        folder = self._base.folder if repo is None else repo.folder
        plan = plan_of(folder)
        if plan is None or not plan.own:
            raise no_head(folder)
        head = Head(plan, self._values(plan, repo))
        head.attempt(self._trunk)
        return head

    def _values(self, plan: Plan, repo: DeltaRepo | None) -> dict[str, torch.Tensor]:
        known = self._base.names() if repo is None else repo.variant_names()
        stored = {plan.rename(name): name for name in known}
        values, lost = {}, []
        for name in sorted(plan.own):
            source = stored.get(name, stored.get(plan.tied.get(name, "")))
            if source is None:
                lost.append(name)
                continue
            value = self._value(source, repo)
            dtype = self._trunk.dtype if value.is_floating_point() else value.dtype
            values[name] = value.to(self._trunk.device, dtype)
        if lost:
            raise plan.unsupported("does not have all tensors of its class", names=lost)
        return values

    def _value(self, name: str, repo: DeltaRepo | None) -> torch.Tensor:
        """A checkpoint's tensor as the variant has it."""
        if repo is None:
            return self._base.tensor(name)
        base = repo.base_tensor(self._base, name)
        if name in repo.manifest.tensors:
            return repo.restored(name, base)
        assert base is not None
        return base

    def _without(self, repo: DeltaRepo, plan: Plan | None) -> frozenset[str]:
        manifest, known = repo.manifest, self._trunk.tensors

        def bare(name: str) -> str:
            return name if plan is None else plan.bare(name)

        brought: set[str] = set()
        for name in (*manifest.tensors, *manifest.unchanged):
            brought |= known.get(bare(name), frozenset())
        gone = {bare(n) for n in manifest.absent} & set(known)
        return (self._trunk.lacking | gone) - brought


def _beside(repo: DeltaRepo, plan: Plan, without: frozenset[str]) -> frozenset[str]:
    manifest = repo.manifest
    head = {n for n in manifest.tensors if plan.rename(n) in plan.own}
    return frozenset(head | {n for n in manifest.absent if plan.bare(n) in without})


def _opened(digest: str, folder: Path) -> DeltaRepo:
    repo = DeltaRepo.open(folder)
    if repo.digest != digest:
        raise DeltafoldError(
            "busy", f"{folder} was replaced while a request for it came in.", fix="ask again"
        )
    return repo


def no_head(folder: Path) -> DeltafoldError:
    """The error for a model that ends where the shared one does."""
    return DeltafoldError(
        "bad-argument",
        f"{folder.name} has no head: its class ends where the shared model does.",
        fix="ask it for embeddings, or name a variant that classifies",
    )
