"""Parts of the vLLM plugin that need no vLLM: windows of forms, rows of a step, settings, commands."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import wide_pair

from deltafold.compress import Checkpoint, DeltafoldError, compress_checkpoint
from deltafold.compress.methods import parse_spec
from deltafold.compress.terms import Context, Encoded
from deltafold.runtime.kernels.forms import Target
from deltafold.runtime.kernels.reference import Dense, dense_delta
from deltafold.runtime.vllm.checks import check_config
from deltafold.runtime.vllm.hooks import Content, LayerHook, NormHook
from deltafold.runtime.vllm.routes import Move, Region, Window
from deltafold.runtime.vllm.rows import StepRows, segments_of
from deltafold.runtime.vllm.settings import Settings, settings_of
from deltafold.runtime.vllm.sites import Site, Sites
from deltafold.runtime.vllm.source import Source, tagged, untagged
from deltafold.runtime.vllm.windows import Piece, TablePiece, windowed_form
from deltafold.server.vllm.command import VllmServer

CPU = Target(torch.device("cpu"), torch.float32)
SPECS = [
    "bitdelta",
    "bitdelta:bits=2,group=32",
    "int:bits=4,group=32",
    "dare:drop=0.9",
    "svd:rank=4",
    "exact",
]
#: The whole, on the packing's borders, off them, and both ends.
WINDOWS = [
    Window(0, 96, 0, 128),
    Window(32, 64, 0, 128),
    Window(0, 96, 64, 64),
    Window(5, 40, 0, 128),
    Window(32, 32, 3, 50),
    Window(95, 1, 127, 1),
]


def encoded(spec: str, base: torch.Tensor, variant: torch.Tensor) -> list[Encoded]:
    delta = variant - base
    return parse_spec(spec).encode(delta, Context("w", base, variant))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_window_of_a_form_is_the_form_of_the_window(spec, window):
    noise = torch.Generator().manual_seed(1)
    base = torch.randn(96, 128, generator=noise)
    variant = base + torch.randn(96, 128, generator=noise) * 0.1
    terms = encoded(spec, base, variant)
    context = Context("w", base)
    form = windowed_form(terms, (96, 128), context, CPU, window)
    x = torch.randn(5, window.columns, generator=noise)
    expected = x @ window.of(dense_delta(terms, (96, 128), context)).T
    torch.testing.assert_close(form.matmul(x), expected, atol=1e-4, rtol=1e-4)


def test_only_whole_rows_in_their_order_are_packed():
    shape = (64, 32)
    plain = Move("p", Region((16, 32), (32, 1), 32 * 8), Region((16, 32), (32, 1), 0), (80, 32))
    assert plain.as_rows(shape) == (Window(8, 16, 0, 32), 0)
    columns = Move("p", Region((64, 8), (32, 1), 24), Region((64, 8), (8, 1), 0), (64, 8))
    assert columns.as_rows(shape) == (Window(0, 64, 24, 8), 0)
    turned = Move("p", Region((32, 64), (1, 32), 0), Region((32, 64), (64, 1), 0), (32, 64))
    assert turned.as_rows(shape) is None
    part = Move("p", Region((64, 8), (32, 1), 0), Region((64, 8), (32, 1), 8), (64, 32))
    assert part.as_rows(shape) is None


def test_segments_hold_each_row_once_and_no_row_of_the_base():
    slots = np.array([-1, 0, 0, 2, -1, 0, 2, 2])
    found = {}
    for segment in segments_of(slots):
        rows = torch.arange(len(slots))
        found[segment.slot] = segment.take(rows).tolist()
    assert found == {0: [1, 2, 5], 2: [3, 6, 7]}
    assert segments_of(np.full(4, -1)) == []


def hooks_with(dense: bool) -> tuple[StepRows, LayerHook, torch.Tensor]:
    """A layer `[6, 4]` of two slots, with a delta of its own and a bias in each."""
    noise = torch.Generator().manual_seed(2)
    rows = StepRows.make(8, 8, torch.device("cpu"))
    hook = LayerHook("layer", rows, 2, is_head=True)
    if dense:
        cpu = torch.device("cpu")
        hook.allocate((6, 4), torch.float32, cpu, biased=True, dense=True, packed=None, tiles=None)
    deltas = torch.randn(2, 6, 4, generator=noise)
    for slot in range(2):
        form = Dense(deltas[slot])
        vectors = {"bias": torch.full((6,), float(slot + 1))}
        hook.put(
            slot,
            Content([Piece(0, 6, form)], [TablePiece(6, 0, form)], vectors, deltas[slot]),
        )
    return rows, hook, deltas


@pytest.mark.parametrize("dense", [False, True])
def test_both_layouts_add_each_row_its_own_delta(dense):
    rows, hook, deltas = hooks_with(dense)
    rows.set([1, -1, 0, 1, -1], [0, -1, 1])
    x, ids = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 5])
    y, found = torch.zeros(3, 6), torch.zeros(5, 4)
    hook.add_products(y, x[:3], biased=True)
    hook.add_rows(found, ids)
    for row, slot in enumerate([0, None, 1]):
        own = torch.zeros(6) if slot is None else deltas[slot] @ x[row] + slot + 1
        torch.testing.assert_close(y[row], own)
    for row, slot in enumerate([1, None, 0, 1, None]):
        own = torch.zeros(4) if slot is None else deltas[slot][ids[row]]
        torch.testing.assert_close(found[row], own)
    hook.put(1, None)
    y.zero_()
    hook.add_products(y, x[:3], biased=True)
    assert not y[1:].any()


@pytest.mark.parametrize("dense", [False, True])
def test_rows_of_logits_are_found_by_index_and_by_slice(dense):
    rows, hook, deltas = hooks_with(dense)
    rows.set([0, 0, -1, 1, 1], [0, 1])
    hidden = torch.randn(5, 4)
    y = torch.zeros(3, 6)
    with rows.reading_logits(torch.tensor([4, 2, 0])):
        hook.add_products(y, hidden[[4, 2, 0]], biased=False)
    expected = torch.stack([deltas[1] @ hidden[4], torch.zeros(6), deltas[0] @ hidden[0]])
    torch.testing.assert_close(y, expected)
    y = torch.zeros(2, 6)
    with rows.around(hidden):
        hook.add_products(y, hidden[2:4], biased=False)
    torch.testing.assert_close(y, torch.stack([torch.zeros(6), deltas[1] @ hidden[3]]))


@pytest.mark.parametrize("dense", [False, True])
def test_norms_norm_the_variants_rows_again(dense):
    norm = torch.nn.LayerNorm(4)
    torch.nn.init.normal_(norm.weight)
    rows = StepRows.make(8, 8, torch.device("cpu"))
    hook = NormHook("norm", norm, rows, 2, 1.0)
    if dense:
        hook.allocate()
    moved = {"weight": torch.randn(4), "bias": torch.randn(4)}
    hook.put(1, Content(vectors=moved))
    rows.set([-1, 1, 1], [])
    x = torch.randn(3, 4)
    with torch.no_grad():
        plain = norm(x)
        y = plain.clone()
        hook.renorm(y, x)
        own = torch.nn.functional.layer_norm(
            x, (4,), norm.weight + moved["weight"], norm.bias + moved["bias"]
        )
    assert torch.equal(y[0], plain[0])
    torch.testing.assert_close(y[1:], own[1:])


def test_settings_are_refused_by_name():
    assert settings_of({}) is None
    assert settings_of({"deltafold": {}}) == Settings()
    for wrong in ({"slots": "many"}, {"zo": "x"}, [], {"any_path": 1}):
        with pytest.raises(DeltafoldError, match="bad-argument"):
            settings_of({"deltafold": wrong})


@pytest.mark.parametrize(
    ("part", "name", "value", "named"),
    [
        ("model_config", "head_dtype", torch.float32, "head_dtype"),
        ("parallel_config", "prefill_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "use_sequence_parallel_moe", True, "sequence-parallel experts"),
        ("pass_config", "enable_sp", True, "enable_sp"),
        ("parallel_config", "enable_batch_sharded_sampling", True, "batch-sharded"),
        ("parallel_config", "use_ubatching", True, "enable_dbo"),
    ],
)
def test_what_would_answer_wrongly_is_refused_at_the_start(part, name, value, named):
    parts = {
        "model_config": SimpleNamespace(dtype=torch.bfloat16, head_dtype=torch.bfloat16),
        "parallel_config": SimpleNamespace(prefill_context_parallel_size=1, use_ubatching=False),
        "pass_config": SimpleNamespace(enable_sp=False),
    }
    compilation = SimpleNamespace(pass_config=parts["pass_config"])
    config = SimpleNamespace(**parts, compilation_config=compilation)
    check_config(config)
    setattr(parts[part], name, value)
    with pytest.raises(DeltafoldError, match=named) as caught:
        check_config(config)
    assert caught.value.code == "engine-unsupported"


def test_a_path_carries_its_digest():
    assert untagged(tagged("/zoo/a", "sha256:12")) == ("/zoo/a", "sha256:12")
    assert untagged("/zoo/a#b") == ("/zoo/a#b", None)


def test_a_delta_for_a_dequantised_base_is_refused(tmp_path):
    """vLLM quantises in other ways, and an unquantised base is not it either."""
    pair = wide_pair(tmp_path)
    for method, name in ((None, "plain"), ("nf4", "repaired")):
        out = tmp_path / "zoo" / name
        compress_checkpoint(pair.base, pair.variant, out, base_quantization=method)
    source = Source(Checkpoint.open(pair.base))
    assert source.open(str(tmp_path / "zoo" / "plain")).reference.name == "plain"
    with pytest.raises(DeltafoldError, match="dequantised base") as caught:
        source.open(str(tmp_path / "zoo" / "repaired"))
    assert caught.value.code == "base-mismatch"


def test_the_command_is_vllms_own(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    options = {"dtype": "auto", "max-num-seqs": None}
    flags = ["--tensor-parallel-size", "2", "--max_loras=8"]
    server = VllmServer("org/base", str(tmp_path), "::1", 1, ["k"], None, options, flags)
    words = server.words()
    assert words[words.index("--served-model-name") + 1 :][:2] == ["base", "--host"]
    assert words[-3:] == flags
    assert "--max-loras" not in words
    assert "--max-num-seqs" not in words
    assert "k" not in words, "other users can read command lines"
    own = json.loads(words[words.index("--additional-config") + 1])
    assert settings_of(own) == Settings(zoo=str(tmp_path.resolve()), any_path=False)
    environment = server.environment()
    assert environment["VLLM_API_KEY"] == "k"
    assert environment["VLLM_PLUGINS"] == "mine,deltafold,deltafold_names"
    with pytest.raises(DeltafoldError, match="additional-config"):
        VllmServer("b", "z", "h", 1, flags=["--additional-config={}"]).words()


def test_as_many_variants_stay_in_memory_as_fit(tmp_path, monkeypatch):
    def kept(*flags: str, **options: int) -> str:
        server = VllmServer("b", str(tmp_path), "h", 1, options=options, flags=flags)
        words = server.words()
        return words[words.index("--max-cpu-loras") + 1]

    assert kept() == "4", "not below the slots"
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "delta").write_bytes(bytes(1000))
    monkeypatch.setattr("deltafold.server.vllm.command.room", lambda device: 2 * 5500)
    assert kept() == "5"
    assert kept("--max-loras", "7") == kept("--max_loras=7") == "7"
    assert kept(**{"max-cpu-loras": 3}) == "3"
    with pytest.raises(ValueError, match="--max-cpu-loras"):
        kept("--max-cpu-loras=9")  # vLLM's own flag is left to it


def run_serve(tmp_path, *words: str):
    from click.testing import CliRunner

    from deltafold.server.cli.main import cli

    (tmp_path / "zoo").mkdir(exist_ok=True)
    given = ["serve", str(tmp_path), "--zoo", str(tmp_path / "zoo"), "--no-strict", *words]
    return CliRunner().invoke(cli, given)


def test_engines_refuse_each_others_options(tmp_path):
    found = run_serve(tmp_path, "--engine", "vllm", "--device", "cpu")
    assert (found.exit_code, "--device is an option" in found.stderr) == (2, True)
    found = run_serve(tmp_path, "--", "--max-loras", "2")
    assert (found.exit_code, "for --engine vllm" in found.stderr) == (2, True)
    found = run_serve(tmp_path, "--engine", "vllm", "--host", "0.0.0.0")
    assert (found.exit_code, "no API key" in found.stderr) == (2, True)


@pytest.mark.skipif(
    getattr(importlib.util.find_spec("vllm"), "origin", None) is not None,
    reason="vLLM is installed here",
)
def test_without_vllm_the_extra_is_named(tmp_path):
    found = run_serve(tmp_path, "--engine", "vllm")
    assert (found.exit_code, "deltafold[vllm]" in found.stderr) == (4, True)


def test_a_step_that_is_half_done_makes_no_hook_look_bypassed():
    """Variants are read beside running steps, whose rows some hooks have seen and others not yet."""
    rows = StepRows.make(16, 16, torch.device("cpu"))
    hooks = {name: LayerHook(name, rows, 2, is_head=False) for name in ("a", "b", "odd", "never")}
    sites = Sites(
        places={name: [Site(hook, "weight")] for name, hook in hooks.items()}, hooks=hooks
    )
    for name, seen in (("a", 5), ("b", 5), ("odd", 2)):
        hooks[name].calls.products, hooks[name].calls.rows = 1, seen
    sites.note()
    hooks["a"].calls.products, hooks["a"].calls.rows = 2, 9
    found = {name: sites.bypassed(name) for name in hooks}
    assert found == {"a": [], "b": [], "odd": ["odd"], "never": ["never"]}
