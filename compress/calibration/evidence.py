"""Evidence from running a fine-tune: second moments of layer inputs, gradients, and other checkpoints.

A model's second moments, or its gradients, can be many times its size. So tensors are put in groups
of bounded size, in the order of their names, and one pass over the data is made for a group when the
first of it is asked for; only the last group is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import torch

from deltafold.compress.calibration.batches import Batch
from deltafold.compress.calibration.data import CalibrationSet
from deltafold.compress.calibration.model import ParameterMap, load_source
from deltafold.compress.calibration.quality import batch_logits, predictions
from deltafold.compress.calibration.sequence import first_tensor, stages
from deltafold.compress.checkpoint import TensorSource
from deltafold.compress.evidence import NEEDS, Evidence, Need
from deltafold.compress.model_memory import (
    GROUP_BYTES,
    SAMPLE,
    evidence_bytes,
    gradient_bytes,
    model_bytes,
    moment_bytes,
    on_cpu,
)
from deltafold.compress.naming import NamedBase
from deltafold.compress.references import Reference, names_of, tensors_of

_ROWS: Final = 8
#: What is learnt of the fine-tune as it is, whatever becomes of it.
AT_THE_FINE_TUNE: Final[tuple[Need, ...]] = tuple(n for n in NEEDS if n != "sequential")


class Moment(NamedTuple):
    """What was seen of one layer's inputs.

    Attributes:
        second: float32 `[in, in]`, mean of `x x^T`.
        inputs: float32 `[n, in]`.
        turned: whether the layer computes `x W` in place of `x W^T`.
    """

    second: torch.Tensor
    inputs: torch.Tensor
    turned: bool


class SafeExamples(NamedTuple):
    """What an aligned model is to keep.

    Attributes:
        data: harmful prompts with safe answers.
        aligned: the model that gives them: the base, or another checkpoint, by the fine-tune's names.
    """

    data: CalibrationSet
    aligned: Reference


class Gradient(NamedTuple):
    """Of one tensor, both float32 of its shape.

    Attributes:
        mean: of the mean loss over all asked tokens.
        fisher: mean over rows of the squared gradient of the row's own mean loss.
    """

    mean: torch.Tensor
    fisher: torch.Tensor


class CalibratedEvidence:
    """An `EvidenceSource` that runs the fine-tune on a calibration set.

    Tensors that the model fuses, splits or never multiplies by (tables, norms, fused experts) have no
    moments; `of` then leaves those fields None. A table that is tied to the output layer has that
    layer's. Experts that are modules of their own have the moments of the tokens sent to them.

    Where `sequential` is wanted, moments are those of the compressed model so far. Tensors must be
    asked for in `order`, and `settle` puts each one's compressed form into the model before the next.
    That takes a pass over the data for every few layers. What the model fuses or splits stays the
    fine-tune's there. Gradients stay those at the fine-tune;
    together with them, `sequential` takes a model of its own.

    Args:
        source: the fine-tune.
        data: what it is run on.
        wanted: the needs to meet; others are not provided. All but `sequential` if left out.
        references: other checkpoints by role.
        safe: for `safe-activations` and `safe-gradients`, which are those of the aligned model.
        device: where the models run.
        group_bytes: most memory for the moments, or the gradients, of one pass.
        model: the loaded fine-tune, if the caller has it.
    """

    def __init__(
        self,
        source: TensorSource,
        data: CalibrationSet,
        *,
        wanted: Iterable[Need] = AT_THE_FINE_TUNE,
        references: Mapping[str, Reference] | None = None,
        safe: SafeExamples | None = None,
        device: str = "cpu",
        group_bytes: int = GROUP_BYTES,
        model: Any = None,
    ) -> None:
        self.source, self.data, self.references = source, data, dict(references or {})
        possible: set[Need] = {"activations", "gradients", "logits", "sequential"}
        possible |= {"labels"} if data.answers else set()
        possible |= {"reference"} if self.references else set()
        possible |= {"safe-activations", "safe-gradients"} if safe else set()
        self.safe = safe
        self.provides = tuple(n for n in NEEDS if n in possible & set(wanted))
        self.device, self._group_bytes, self._given = device, group_bytes, model
        self._run: _Run | None = None
        self._following: _Run | None = None

    def of(self, name: str) -> Evidence:
        """What is known of one tensor; runs the model when nothing is known of it yet."""
        moment = self._moments.moment(name) if "activations" in self.provides else None
        gradient = self._loaded.gradient(name) if "gradients" in self.provides else None
        return Evidence(
            second_moment=moment.second if moment and not moment.turned else None,
            row_moment=moment.second if moment and moment.turned else None,
            inputs=moment.inputs if moment and not moment.turned else None,
            gradient=gradient.mean if gradient else None,
            fisher=gradient.fisher if gradient else None,
            references=tensors_of(self.references, name),
            safe=self._safe(name),
        )

    def _safe(self, name: str) -> Evidence | None:
        if self.safe is None or self._aligned is None:
            return None
        source = self.safe.aligned.source
        own = source.own(name) if isinstance(source, NamedBase) else name
        return None if own is None else self._aligned.of(own)

    @cached_property
    def _aligned(self) -> CalibratedEvidence | None:
        """Evidence of the aligned model, by its own names; None where nobody wants any."""
        wanted: list[Need] = []
        wanted += ["activations"] if "safe-activations" in self.provides else []
        wanted += ["gradients"] if "safe-gradients" in self.provides else []
        if self.safe is None or not wanted:
            return None
        source = self.safe.aligned.source
        return CalibratedEvidence(
            source.checkpoint if isinstance(source, NamedBase) else source,
            self.safe.data,
            wanted=wanted,
            device=self.device,
            group_bytes=self._group_bytes,
        )

    def order(self, names: Sequence[str]) -> list[str]:
        """Tables, norms and the like first, then layers as a forward pass calls them."""
        return self._moments.order(names)

    def settle(self, name: str, value: torch.Tensor) -> None:
        """From here on the model holds a compressed tensor."""
        assert "sequential" in self.provides
        self._moments.settle(name, value)

    def restart(self) -> None:
        """Forget what was settled; the fine-tune is loaded again when it is next asked for."""
        self._following = None

    def upcoming_bytes(self) -> int:
        """Memory of the CPU that the run will take beyond what it holds now, activations left out."""
        if not on_cpu(self.device):
            return 0
        whole = evidence_bytes(self.source, self.provides, self._group_bytes)
        loaded = [run for run in (self._run, self._following) if run is not None]
        if self._given is not None and self._run is None:
            return max(whole - model_bytes(self.source), 0)
        return max(whole - len(loaded) * model_bytes(self.source), 0)

    def record(self) -> dict[str, Any]:
        """What a manifest says about the run."""
        used: dict[str, Any] = {"data": self.data.record(), "provides": list(self.provides)}
        if self.references:
            used["references"] = names_of(self.references)
        if self.safe is not None:
            used["safe"] = {"data": self.safe.data.record(), "aligned": self.safe.aligned.name}
        return used

    @property
    def model(self) -> Any:
        """The loaded fine-tune."""
        return self._loaded.model

    @property
    def _loaded(self) -> _Run:
        if self._run is None:
            model = self._given or load_source(self.source, device=self.device)
            self._run = _Run(model, self.source, self.data, self._group_bytes)
        return self._run

    @property
    def _moments(self) -> _Run:
        if "sequential" not in self.provides:
            return self._loaded
        if self._following is None:
            # What the caller gave, and what gradients are taken of, stays the fine-tune.
            model = load_source(self.source, device=self.device)
            self._following = _Run(model, self.source, self.data, self._group_bytes)
            self._following.follow()
        return self._following


class _Run:
    """A loaded model with the results of the last pass of each kind."""

    def __init__(
        self, model: Any, source: TensorSource, data: CalibrationSet, group_bytes: int
    ) -> None:
        self.model, self.data = model, data
        self.names = ParameterMap(model, source)
        layers = _layers_by_weight(model)
        self._layers = {
            name: layers[id(parameter)]
            for name in source.names()
            if (parameter := self.names.parameter(name)) is not None and id(parameter) in layers
        }
        found = [n for n in source.names() if self.names.parameter(n) is not None]
        self._moment_groups = grouped(self._layers, self._moment_bytes, group_bytes)
        self._gradient_groups = grouped(found, self._gradient_bytes, group_bytes)
        self._moments: dict[str, Moment] = {}
        self._gradients: dict[str, Gradient] = {}

    def follow(self) -> None:
        """Group layers by the order of their calls in place of their names."""
        batch = next(self.data.unpadded(1)).to(next(self.model.parameters()).device)
        self._moment_groups = {
            name: stage for stage in stages(self.model, self._layers, batch) for name in stage
        }

    def order(self, names: Sequence[str]) -> list[str]:
        wanted = set(names)
        first = [name for name in names if name not in self._moment_groups]
        return first + [name for name in self._moment_groups if name in wanted]

    @torch.no_grad()
    def settle(self, name: str, value: torch.Tensor) -> None:
        parameter = self.names.parameter(name)
        if parameter is not None:
            parameter.copy_(value)

    def moment(self, name: str) -> Moment | None:
        if name in self._moment_groups and name not in self._moments:
            group = {n: self._layers[n] for n in self._moment_groups[name]}
            self._moments = {}
            self._moments = second_moments(self.model, group, self.data)
        return self._moments.get(name)

    def gradient(self, name: str) -> Gradient | None:
        if name in self._gradient_groups and name not in self._gradients:
            group = {n: self.names.parameter(n) for n in self._gradient_groups[name]}
            self._gradients = {}
            self._gradients = gradients(
                self.model, {n: p for n, p in group.items() if p is not None}, self.data
            )
        return self._gradients.get(name)

    def _moment_bytes(self, name: str) -> int:
        return moment_bytes(_width(self._layers[name][0]))

    def _gradient_bytes(self, name: str) -> int:
        parameter = self.names.parameter(name)
        assert parameter is not None
        return gradient_bytes(parameter.numel())


@dataclass
class _Watch:
    """Sums over the inputs of the layers that multiply by one tensor."""

    total: torch.Tensor
    stride: int
    turned: bool
    seen: int = 0
    kept: list[torch.Tensor] | None = None

    def add(self, inputs: torch.Tensor) -> None:
        """Take up the inputs of one call, `[..., in]`."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)
        self.total.addmm_(x.T, x)
        self.kept = self.kept or []
        # Every `stride`th token over all calls, so that the sample spans the whole set.
        self.kept.append(x[-self.seen % self.stride :: self.stride].cpu())
        self.seen += x.shape[0]

    def moment(self) -> Moment | None:
        """None where the layer was never called."""
        if not self.seen:
            return None
        inputs = torch.cat(self.kept or [])[:SAMPLE]
        return Moment((self.total / self.seen).cpu(), inputs, self.turned)


@torch.no_grad()
def second_moments(
    model: Any, layers: Mapping[str, list[torch.nn.Module]], data: CalibrationSet
) -> dict[str, Moment]:
    """One pass over the data, watching what goes into some layers.

    Args:
        model: in evaluation mode.
        layers: the modules that multiply by each tensor, by the tensor's name.
        data: run in batches of rows of one length, so that no padding is counted.

    Returns:
        Moments of the layers that were called.
    """
    device = next(model.parameters()).device
    stride = max(1, math.ceil(data.tokens / SAMPLE))
    watches: dict[str, _Watch] = {}
    handles = []
    for name, modules in layers.items():
        width = _width(modules[0])
        total = torch.zeros(width, width, device=device)
        watches[name] = _Watch(total, stride, not isinstance(modules[0], torch.nn.Linear))
        for module in modules:
            hook = _hook(watches[name])
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        for batch in data.unpadded(_ROWS):
            moved = batch.to(device)
            model(input_ids=moved.ids, attention_mask=moved.mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: watch.moment() for name, watch in watches.items()}
    return {name: moment for name, moment in found.items() if moment is not None}


def gradients(
    model: Any, parameters: Mapping[str, torch.nn.Parameter], data: CalibrationSet
) -> dict[str, Gradient]:
    """Gradients of the loss by some parameters, row by row; others are not differentiated.

    Parameters that have no part in the loss get zeros.
    """
    wanted = {id(p) for p in parameters.values()}
    device = next(model.parameters()).device
    sums = {
        n: (torch.zeros(p.shape, device=device), torch.zeros(p.shape, device=device))
        for n, p in parameters.items()
    }
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        for batch in data.batches(1):
            moved = batch.to(device)
            loss, tokens = _row_loss(model, moved)
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for (mean, fisher), gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    gradient = gradient.float()
                    mean.add_(gradient, alpha=tokens / data.predicted)
                    fisher.addcmul_(gradient, gradient, value=1 / len(data.rows))
    finally:
        for parameter, wants in before:
            parameter.requires_grad_(wants)
    return {n: Gradient(mean.cpu(), fisher.cpu()) for n, (mean, fisher) in sums.items()}


def grouped(
    names: Iterable[str], cost: Callable[[str], int], most: int
) -> dict[str, tuple[str, ...]]:
    """Each name's group: neighbours in sorted order whose cost together stays within `most`."""
    groups: list[list[str]] = []
    room = 0
    for name in sorted(names):
        room -= cost(name)
        if not groups or room < 0:
            groups.append([])
            room = most - cost(name)
        groups[-1].append(name)
    return {name: tuple(group) for group in groups for name in group}


def _row_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
    found = predictions(batch_logits(model, batch), batch)
    return torch.nn.functional.cross_entropy(found.logits, found.targets), len(found.targets)


def _hook(watch: _Watch) -> Callable[..., None]:
    def look(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = first_tensor(args, kwargs)
        if value is not None:
            watch.add(value)

    return look


def _layers_by_weight(model: torch.nn.Module) -> dict[int, list[torch.nn.Module]]:
    """The modules that multiply by a parameter, by its `id`."""
    layers: dict[int, list[torch.nn.Module]] = {}
    for module in model.modules():
        # Conv1D by its name: this file need not import transformers.
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            weight = module.weight
            assert isinstance(weight, torch.nn.Parameter)
            layers.setdefault(id(weight), []).append(module)
    return layers


def _width(module: torch.nn.Module) -> int:
    """Features of a layer's inputs."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[1] if isinstance(module, torch.nn.Linear) else weight.shape[0])
