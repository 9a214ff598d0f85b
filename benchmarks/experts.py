"""One layer of fused experts: the base alone, variants served packed, and variants made dense.

    python benchmarks/experts.py [--device cpu] [--experts 32] [--variants 8] [--json FILE]

Rows: the experts of transformers' Qwen3-MoE for all tokens (the base); the same, then each variant's
tokens once more with its delta kept packed (what the engine does); and with the delta added to the
whole parameter first, in every step. Round-robin in one run; printed are least times, their ratios to
the base's, and the memory that a variant's deltas take.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from linear import machine
from timing import time_in_turn

from deltafold.compress import parse_spec
from deltafold.compress.terms import Context
from deltafold.runtime.kernels.experts import Stack, stack_of
from deltafold.runtime.kernels.forms import Target
from deltafold.runtime.lent import lend

CODECS = ("bitdelta", "int:bits=2", "dare:drop=0.9", "svd:rank=16", "exact")
NAMES = ("gate_up_proj", "down_proj")
Call = Callable[[int], torch.Tensor]


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.manual_seed(0)
    device = torch.device(options.device)
    rows = []
    for tokens in options.tokens:
        rows += _measure(options, tokens, device)
    facts = machine(options.device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{options.experts} experts, {options.variants} variants, {options.implementation}")
    print(f"{'tokens each':<12} {'case':<36} {'min ms':>9} {'x base':>7} {'MiB each':>9}")
    for row in rows:
        print(
            f"{row['tokens']:<12} {row['case']:<36} {row['min_ms']:>9.2f} {row['over_base']:>7.2f} "
            f"{row['bytes'] / 2**20:>9.1f}"
        )
    if options.json:
        result = {"machine": facts, "options": vars(options), "rows": rows}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=384)
    parser.add_argument("--variants", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32], help="of each variant")
    parser.add_argument("--implementation", default="grouped_mm")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json")
    return parser.parse_args()


def _measure(
    options: argparse.Namespace, tokens: int, device: torch.device
) -> list[dict[str, object]]:
    config = transformers.Qwen3MoeConfig(
        hidden_size=options.hidden, moe_intermediate_size=options.inner, num_experts=options.experts,
        num_experts_per_tok=4, num_hidden_layers=1, vocab_size=16, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    module = model.model.layers[0].mlp.experts.to(device).requires_grad_(False)
    module.config._experts_implementation = options.implementation
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for value in module.parameters():
        value.data = torch.randn_like(value, dtype=dtype) * 0.02
    count = options.variants * tokens
    x = torch.randn(count, options.hidden, device=device, dtype=dtype)
    chosen = torch.stack([torch.randperm(options.experts)[:4] for _ in range(count)]).to(device)
    weights = torch.rand(count, 4, device=device, dtype=dtype)

    def base(_: int) -> torch.Tensor:
        return module(x, chosen, weights)

    def again(own: Callable[[str], torch.Tensor]) -> Call:
        def call(_: int) -> torch.Tensor:
            y = module(x, chosen, weights)
            for v in range(options.variants):
                part = slice(v * tokens, (v + 1) * tokens)
                given = (x[part], chosen[part], weights[part])
                lent = {name: own(name) for name in NAMES}
                y[part] = torch.func.functional_call(module, lent, given)
            return y

        return call

    cases, sizes = {"base": base}, {"base": 0}
    for spec in CODECS:
        stacks = {name: _stack(spec, getattr(module, name), device, dtype) for name in NAMES}
        case = f"packed, {spec}"
        cases[case] = again(lambda name, s=stacks: lend(getattr(module, name), s[name], 1.0))
        sizes[case] = sum(stack.nbytes for stack in stacks.values())
    dense = {name: torch.randn_like(getattr(module, name)) * 1e-3 for name in NAMES}

    def rebuilt(name: str) -> torch.Tensor:
        value = getattr(module, name)
        return (value.to(torch.float32) + dense[name]).to(value.dtype)

    cases["dense delta added in every step"] = again(rebuilt)
    sizes["dense delta added in every step"] = sum(d.nbytes for d in dense.values())
    found = time_in_turn(
        cases, torch.device("cpu") if device.type == "cpu" else device, options.rounds
    )
    rows: list[dict[str, object]] = []
    for case, times in found.items():
        assert not isinstance(times, str), (case, times)
        ratio = times[0] / found["base"][0]  # type: ignore[operator]
        row = {"tokens": tokens, "case": case, "min_ms": times[0], "median_ms": times[1]}
        rows.append(row | {"over_base": ratio, "bytes": sizes[case]})
    return rows


def _stack(spec: str, value: torch.Tensor, device: torch.device, dtype: torch.dtype) -> Stack:
    shape = (value.shape[0], value.shape[1], value.shape[2])
    delta = torch.randn(shape) * 1e-3
    context = Context("experts.weight", torch.zeros(shape), delta)
    encoded = parse_spec(spec).encode(delta, context)
    return stack_of(encoded, shape, context, Target(device, dtype), turned=False)


if __name__ == "__main__":
    main()
