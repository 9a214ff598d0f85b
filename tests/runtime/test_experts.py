"""Fused experts keep their deltas packed: products by expert, in every way that models multiply."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo_models

from deltafold.compress import parse_spec
from deltafold.compress.terms import Context
from deltafold.runtime import EmbeddedEngine, Request, Sampling, lent
from deltafold.runtime.kernels.experts import Piece, Stack, stack_of
from deltafold.runtime.kernels.forms import Target, product_form
from deltafold.runtime.kernels.reference import Dense, dense_delta
from deltafold.runtime.kernels.turned import turned_form
from deltafold.runtime.lent import Lent, lend

#: Kernels that are not interpreted need a GPU's tensors.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = Target(DEVICE, torch.float32)
E, A, B = 5, 24, 40
CODECS = [
    "bitdelta:bits=2",
    "bitdelta:scale=tensor",
    "bitdelta:group=32",
    "int:bits=3",
    "dare:drop=0.9",
    "svd:rank=4",
    "exact",
]
PACKED = ["deltafold.runtime.kernels.forms", "deltafold.runtime.kernels.experts"]


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coded(spec: str, shape: tuple[int, ...]) -> tuple[list[Any], Context, torch.Tensor]:
    base = torch.randn(shape, generator=noise(7))
    delta = torch.randn(shape, generator=noise(8)) * 0.1
    encoded = parse_spec(spec).encode(delta, Context("experts", base, base + delta))
    return encoded, Context("experts", base), dense_delta(encoded, shape, Context("experts", base))


def stacked(spec: str, *, turned: bool) -> tuple[Stack, torch.Tensor]:
    encoded, context, exact = coded(spec, (E, A, B))
    return stack_of(encoded, (E, A, B), context, HERE, turned=turned), exact


def by_expert(
    stack: Stack, y: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, turned: bool
) -> torch.Tensor:
    """What a stack makes of y, at half its scale."""
    out = y.to(DEVICE)
    stack.add_by_expert(out, x.to(DEVICE), experts.to(DEVICE), turned=turned, scale=0.5)
    return out.cpu()


@pytest.fixture
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """A use of a lent parameter that makes it dense is an error."""

    def refuse(value: Any) -> Any:
        assert not isinstance(value, Lent), "made dense"
        return value

    monkeypatch.setattr(lent, "_dense", refuse)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("spec", CODECS)
def test_each_expert_adds_its_own_delta(spec: str, turned: bool) -> None:
    stack, exact = stacked(spec, turned=turned)
    assert torch.allclose(stack.dense(DEVICE).cpu(), exact, atol=1e-6)
    experts = torch.tensor([4, 0, 0, 2, 5, -1, 4])
    x = torch.randn(len(experts), A if turned else B, generator=noise(1))
    y = torch.ones(len(experts), B if turned else A)
    y = by_expert(stack, y, x, experts, turned)
    for token, expert in enumerate(experts.tolist()):
        inside = 0 <= expert < E
        matrix = exact[expert] if inside else torch.zeros(A, B)
        expected = 1 + 0.5 * x[token].double() @ (matrix if turned else matrix.T).double()
        assert torch.allclose(y[token].double(), expected, atol=1e-5), token


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux alone")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("spec", ["bitdelta:bits=2", "int:bits=3", "dare:drop=0.9", "svd:rank=4"])
def test_a_launch_serves_all_experts(
    spec: str, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in PACKED:
        monkeypatch.setattr(f"{where}.applies_packed", lambda device: True)
    stack, exact = stacked(spec, turned=turned)
    alone: list[int] = []
    add = Stack.add

    def counted(*given: Any, **ways: Any) -> None:
        alone.append(1)
        add(*given, **ways)

    monkeypatch.setattr(Stack, "add", counted)
    experts = torch.tensor([4, 0, 0, 2, 5, -1, 4])
    x = torch.randn(len(experts), A if turned else B, generator=noise(1))
    y = torch.ones(len(experts), B if turned else A)
    y = by_expert(stack, y, x, experts, turned)
    for token, expert in enumerate(experts.tolist()):
        matrix = exact[expert] if 0 <= expert < E else torch.zeros(A, B)
        expected = 1 + 0.5 * x[token].double() @ (matrix if turned else matrix.T).double()
        # Lists hold float16.
        assert (y[token] - expected).abs().max() < 1e-3, token
    # Turned codes have no packed form: dense ones take their place, and share a launch as well.
    assert not alone


def test_parts_of_experts_stored_one_by_one() -> None:
    """Gate and up as they lie in a fused tensor: one below the other, in turn, and transposed."""
    encoded, context, exact = coded("bitdelta:bits=2", (12, B))
    form, over = (make(encoded, (12, B), context, HERE) for make in (product_form, turned_form))
    cases = [
        (Piece(False, 12, 1, 12, form), slice(12, 24), False),
        (Piece(False, 1, 2, 12, form), slice(1, 24, 2), False),
        (Piece(True, 2, 3, 12, form), slice(2, 36, 3), True),
    ]
    for piece, places, turned in cases:
        stack = Stack.empty((2, 24, B) if not turned else (2, B, 40))
        stack.pieces[1].append(piece)
        dense = torch.zeros(stack.shape)
        (dense[1].T if turned else dense[1])[places] = exact
        assert torch.allclose(stack.dense(DEVICE).cpu(), dense, atol=1e-6)
        for way in (False, True):
            x = torch.randn(3, stack.shape[1 if way else 2], generator=noise(2))
            y = torch.zeros(3, stack.shape[2 if way else 1], device=DEVICE)
            stack.add(y, x.to(DEVICE), 1, turned=way, scale=2.0)
            expected = 2 * x @ (dense[1] if way else dense[1].T)
            assert torch.allclose(y.cpu(), expected, atol=1e-4), (piece, way)
    x = torch.randn(3, 12, generator=noise(3))
    assert torch.allclose(over.matmul(x.to(DEVICE)).cpu(), x @ exact, atol=1e-5)


def test_other_uses_of_a_lent_parameter_see_its_values() -> None:
    stack, exact = stacked("bitdelta", turned=False)
    base = torch.randn(E, A, B, generator=noise(3)).to(DEVICE)
    whole, given = base + 0.5 * exact.to(DEVICE), lend(base, stack, 0.5)
    assert (given.shape, given.dtype, given.dim()) == (base.shape, base.dtype, 3)
    assert torch.allclose(given * 1, whole)
    assert torch.allclose(given[2] + 0, whole[2])
    assert torch.allclose(given.transpose(1, 2)[1:3].sum(0), whole.transpose(1, 2)[1:3].sum(0))
    assert torch.allclose(
        given[torch.tensor([3, 0, 3], device=DEVICE)].exp(), whole[[3, 0, 3]].exp()
    )
    assert torch.allclose(torch.cat([given[1].T, base[0].T]), torch.cat([whole[1].T, base[0].T]))
    x = torch.randn(4, B, generator=noise(4)).to(DEVICE)
    assert torch.allclose(
        torch.einsum("kb,eab->eka", x, given), torch.einsum("kb,eab->eka", x, whole)
    )


def module_of(family: str) -> torch.nn.Module:
    """The experts of a tiny model."""
    config = {"qwen": transformers.Qwen3MoeConfig, "oss": transformers.GptOssConfig}[family](
        hidden_size=B, moe_intermediate_size=12, intermediate_size=12, num_experts=E,
        num_local_experts=E, num_experts_per_tok=2, num_hidden_layers=1, vocab_size=16,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    module: torch.nn.Module = model.model.layers[0].mlp.experts
    for value in module.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return module.requires_grad_(False).to(DEVICE)


@pytest.mark.usefixtures("never_dense")
@pytest.mark.parametrize("family", ["qwen", "oss"])
@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("packed", [False, True])
def test_experts_of_transformers_multiply_lent_parameters(
    way: str, family: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed:
        for where in PACKED:
            monkeypatch.setattr(f"{where}.applies_packed", lambda device: sys.platform == "linux")
    module: Any = module_of(family)
    module.config._experts_implementation = way
    turned = module.is_transposed
    assert turned == (family == "oss")
    lent_, dense = {}, {}
    for name in ("gate_up_proj", "down_proj"):
        value = getattr(module, name)
        shape = tuple(value.shape)
        encoded, context, exact = coded("bitdelta:bits=2", shape)
        stack = stack_of(encoded, shape, context, HERE, turned=turned)  # type: ignore[arg-type]
        lent_[name], dense[name] = lend(value, stack, 0.5), value + 0.5 * exact.to(DEVICE)
    x = torch.randn(6, B, generator=noise(5)).to(DEVICE)
    chosen = torch.stack([torch.randperm(E, generator=noise(t))[:2] for t in range(6)]).to(DEVICE)
    weights = torch.rand(6, 2, generator=noise(6)).to(DEVICE)
    with torch.inference_mode():
        found = torch.func.functional_call(module, lent_, (x, chosen, weights))
        expected = torch.func.functional_call(module, dense, (x, chosen, weights))
        plain = module(x, chosen, weights)
    assert type(found) is torch.Tensor
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)


@pytest.mark.usefixtures("never_dense")
def test_a_model_of_experts_is_served_packed(tmp_path: Path) -> None:
    """Mixed batches, scales and mixtures; a variant's experts take less than a dense copy."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    made = zoo_models.make(
        tmp_path, "Qwen3Moe", codecs={"sign": "bitdelta", "thin": "svd:rank=4"}, step=0.1, **experts
    )
    asked = Sampling(max_tokens=2, logprobs=0, ignore_eos=True)
    names = ["base", "sign", "thin", "sign*0.5+thin*0.5"]
    with EmbeddedEngine.open(made.base, zoo=made.zoo, device="cpu", dtype="float32") as engine:
        outputs = list(engine.generate([Request(name, "fox", asked) for name in names]))
        loaded = engine._host.acquire("sign")  # type: ignore[attr-defined]
        stacks = loaded.loaded.stacks
        engine._host.release(loaded)  # type: ignore[attr-defined]
    assert len(stacks) == 2
    for own in stacks.values():
        assert set(own) == {"gate_up_proj", "down_proj"}
        for stack in own.values():
            assert stack.nbytes < 0.25 * 4 * torch.Size(stack.shape).numel()
            assert not any(isinstance(p.form, Dense) for pieces in stack.pieces for p in pieces)
    seen = [[token.logprob for token in out.logprobs] for out in outputs]
    for name, mixed in zip(names[:3], seen, strict=False):
        folder = made.base if name == "base" else made.dense / name
        with EmbeddedEngine.open(folder, device="cpu", dtype="float32") as engine:
            (alone,) = engine.generate([Request("base", "fox", asked)])
        plain = [token.logprob for token in alone.logprobs]
        assert max(abs(a - b) for a, b in zip(mixed, plain, strict=True)) < 1e-4, name
    assert len({tuple(s) for s in seen}) == 4
