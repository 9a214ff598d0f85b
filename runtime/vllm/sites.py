"""The hooks of one loaded model: which parameters they cover, and whether they are really called."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltafold.runtime.vllm.experts import DOWN, GATE_UP, ExpertsHook, why_not
from deltafold.runtime.vllm.hooks import LayerHook, NormHook
from deltafold.runtime.vllm.ops import wrap_experts, wrap_layer, wrap_norm
from deltafold.runtime.vllm.routes import Routes
from deltafold.runtime.vllm.rows import StepRows

Hook = LayerHook | NormHook | ExpertsHook


@dataclass(frozen=True)
class Site:
    """One place where a parameter is read through a hook.

    Attributes:
        hook: of the module.
        attribute: of the parameter in the module.
        multiplies: whether the module multiplies by it.
        looks_up: whether the module looks rows of it up.
        experts: whether it holds the matrices of many experts.
    """

    hook: Hook
    attribute: str
    multiplies: bool = False
    looks_up: bool = False
    experts: bool = False


@dataclass
class Sites:
    """Where variants may change parameters.

    Attributes:
        places: the sites of each parameter, by its name.
        bare: modules that hold a parameter without a hook, and why.
        hooks: all of them, by the module's name.
        later_rank: whether this is a rank of a pipeline after the first.
    """

    places: dict[str, list[Site]] = field(default_factory=dict)
    bare: dict[str, list[str]] = field(default_factory=dict)
    hooks: dict[str, Hook] = field(default_factory=dict)
    later_rank: bool = False
    _rows: dict[str, int] = field(default_factory=dict)

    def _read(self, parameter: str) -> bool:
        return any(site.hook.calls.total for site in self.places[parameter])

    def called(self) -> bool:
        """Whether the model ran at all since it was wrapped."""
        return any(hook.calls.total for hook in self.hooks.values())

    def note(self) -> None:
        """Remember with how many rows each hook was called last.

        Between steps only: within one, some hooks have been called for it and others not yet.
        """
        self._rows = {n: h.calls.rows for n, h in self.hooks.items() if h.calls.total}

    def bypassed(self, parameter: str) -> list[str]:
        """Names of modules that hold a parameter and whose hook was never called, or was called with
        rows that were not the step's tokens when they were noted. Any thread may ask.
        """
        layers = [h for h in self.hooks.values() if not (isinstance(h, LayerHook) and h.is_head)]
        rows = Counter(self._rows[h.name] for h in layers if h.name in self._rows)
        usual = rows.most_common(1)[0][0] if rows else -1
        odd = []
        for site in self.places[parameter]:
            hook = site.hook
            if self.later_rank and not hook.calls.total and site.looks_up and self._read(parameter):
                continue  # a tied table is there for the head; tokens were looked up on the first rank
            strange = hook in layers and self._rows.get(hook.name, usual) != usual
            if not hook.calls.total or strange:
                odd.append(hook.name)
        return odd


def find_sites(
    model: nn.Module, routes: Routes, rows: StepRows, slots: int, *, fixed: bool
) -> Sites:
    """A hook for every module that a checkpoint's tensor can reach.

    Args:
        model: as vLLM made it, or its instance without storage.
        routes: where tensors go.
        rows: of the running step.
        slots: most variants in one step.
        fixed: whether the layout has fixed shapes.
    """
    from vllm.distributed import get_pp_group

    sites = Sites(later_rank=not get_pp_group().is_first_rank)
    modules = dict(model.named_modules(remove_duplicate=False))
    absorbed = _absorbed(model)
    hooks: dict[int, Hook | str] = {}
    shapes = {m.parameter: m.shape for moves in routes.moves.values() for m in moves}
    for parameter in sorted(shapes):
        for module_name, attribute in routes.owners[parameter]:
            module = modules[module_name]
            if id(module) not in hooks:
                why = "its weights are folded into attention" if id(module) in absorbed else ""
                hooks[id(module)] = why or _hook(module_name, module, rows, slots, fixed)
            hook = hooks[id(module)]
            site = hook if isinstance(hook, str) else _site(hook, module, attribute)
            if isinstance(site, str):
                sites.bare.setdefault(parameter, []).append(f"{module_name} ({site})")
                continue
            mine = sites.places.setdefault(parameter, [])
            if site not in mine:  # a module may be there under two names
                mine.append(site)
            sites.hooks[site.hook.name] = site.hook
    return sites


def install(model: nn.Module, sites: Sites) -> None:
    """Have a model's modules call their hooks."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for hook in sites.hooks.values():
        module = modules[hook.name]
        if isinstance(hook, ExpertsHook):
            wrap_experts(module, hook)
        elif isinstance(hook, LayerHook):
            wrap_layer(module, hook)
        else:
            wrap_norm(module, hook)


def _absorbed(model: nn.Module) -> set[int]:
    """Projections whose weights multi-head latent attention reads around their layer."""
    found = set()
    for module in model.modules():
        if "MLA" in type(module).__name__:
            layer = getattr(module, "kv_b_proj", None)
            found |= {id(layer)} if layer is not None else set()
    return found


def _hook(name: str, module: Any, rows: StepRows, slots: int, fixed: bool) -> Hook | str:
    """The hook for a module's kind, or why there is none."""
    from vllm.model_executor.layers import layernorm, linear, vocab_parallel_embedding
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear

    kind = type(module)
    if isinstance(module, RoutedExperts):
        return why_not(module, fixed=fixed) or ExpertsHook(name, module, rows, slots)
    if isinstance(module, linear.LinearBase):
        known = (
            linear.ReplicatedLinear.forward,
            linear.ColumnParallelLinear.forward,
            linear.RowParallelLinear.forward,
            GateLinear.forward,
        )
        if kind.forward not in known:
            return f"{kind.__name__} multiplies in its own way"
        return LayerHook(name, rows, slots, is_head=False)
    if isinstance(module, vocab_parallel_embedding.VocabParallelEmbedding):
        if kind.forward not in (
            vocab_parallel_embedding.VocabParallelEmbedding.forward,
            vocab_parallel_embedding.ParallelLMHead.forward,
        ):
            return f"{kind.__name__} looks rows up in its own way"
        return LayerHook(name, rows, slots, is_head=True)
    if kind in (layernorm.RMSNorm, layernorm.LayerNorm, nn.LayerNorm):
        return NormHook(name, module, rows, slots, 1.0)
    if kind is layernorm.GemmaRMSNorm:
        return NormHook(name, module, rows, slots, 0.0)
    return f"{kind.__name__} has no hook"


def _site(hook: Hook, module: Any, attribute: str) -> Site | str:
    if isinstance(hook, NormHook):
        return Site(hook, attribute)
    if isinstance(hook, ExpertsHook):
        known = attribute in (GATE_UP, DOWN)
        return Site(hook, attribute, experts=True) if known else "experts' biases have no hook"
    if attribute == "bias":
        if getattr(module, "skip_bias_add", False):
            return "its bias is added elsewhere"
        return Site(hook, attribute)
    if attribute != "weight":
        return f"{attribute} is not a plain weight"
    table = hook.is_head and type(module).__name__ != "ParallelLMHead"  # which looks nothing up
    return Site(hook, attribute, multiplies=True, looks_up=table)
