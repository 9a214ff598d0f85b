"""A packing run may be cut short at any moment, and may take as much of the machine as it is given:
what comes out is the same, byte for byte."""

from __future__ import annotations

import errno
import math
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import make_pair, write_checkpoint
from killing import killed_at
from packing import tree

from deltafold.compress import (
    DeltafoldError,
    Recipe,
    assembly,
    compress_checkpoint,
    parse_spec,
    predict_checkpoint,
    shards,
    staging,
)
from deltafold.compress.budget.goal import Budget
from deltafold.compress.journal import Journal
from deltafold.compress.limits import Limits
from deltafold.compress.memory import MemoryBudget
from deltafold.compress.predict import Speed
from deltafold.compress.safetensors_file import SafetensorsFile, file_head
from deltafold.compress.sizes import parse_size

LAYERS, ROWS, COLUMNS = 12, 40, 48


@pytest.fixture
def models(tmp_path):
    """A base and a fine-tune of a dozen matrices and vectors, some of them equal."""
    draw = torch.Generator().manual_seed(8)
    base, variant = {}, {}
    for layer in range(LAYERS):
        for name, shape in (("weight", (ROWS, COLUMNS)), ("norm", (COLUMNS,))):
            value = torch.randn(shape, generator=draw).mul(0.1).to(torch.bfloat16)
            step = 0 if layer % 4 == 3 else torch.randn(shape, generator=draw) * 0.01
            base[f"layers.{layer}.{name}"] = value
            variant[f"layers.{layer}.{name}"] = (value.float() + step).to(torch.bfloat16)
    return write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "ft", variant)


RECIPE = Recipe(overrides=(("*.1.weight", parse_spec("lossless")), ("*.2.*", parse_spec("int"))))


def pack(models, out: Path, **options):
    return compress_checkpoint(*models, out, recipe=RECIPE, **options)


@pytest.fixture
def whole(models, tmp_path):
    pack(models, tmp_path / "whole")
    return tree(tmp_path / "whole")


@pytest.mark.parametrize("jobs", [2, 5])
def test_jobs_change_no_byte(models, whole, tmp_path, jobs):
    pack(models, tmp_path / "out", jobs=jobs)
    assert tree(tmp_path / "out") == whole


THREADS = """
import os, sys
from pathlib import Path
import torch
from deltafold.compress import Recipe, compress_checkpoint, parse_spec

torch.set_num_threads(int(sys.argv[3]))
specs = ("svd:rank=8", "ultradelta", "dct", "d-qrelo", "impart", "svd", "bitdelta:scale=tensor")
overrides = tuple((f"{n}.w", parse_spec(spec)) for n, spec in enumerate(specs))
recipe = Recipe(overrides=overrides)
compress_checkpoint(*sys.argv[1:3], sys.argv[4], recipe=recipe, jobs=int(sys.argv[5]))
assert torch.get_num_threads() == int(sys.argv[3])
"""


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """Matrices that are large enough for linear algebra to be shared among threads."""
    folder, draw = tmp_path_factory.mktemp("square"), torch.Generator().manual_seed(2)
    shapes = {f"{n}.w": (512, 448) for n in range(5)} | {"5.w": (1030, 1040), "6.w": (512, 448)}
    base = {n: torch.randn(s, generator=draw).mul(0.02) for n, s in shapes.items()}
    tuned = {n: v + 1e-3 * torch.randn(v.shape, generator=draw) for n, v in base.items()}
    return write_checkpoint(folder / "base", base), write_checkpoint(folder / "ft", tuned)


@pytest.mark.parametrize(("threads", "jobs"), [(2, 1), (2, 2), (1, 2)])
def test_threads_of_linear_algebra_change_no_byte(square, tmp_path_factory, threads, jobs):
    """Sums that are split among threads round otherwise: what is coded must not see how many."""
    folder = tmp_path_factory.getbasetemp() / "threads"
    for count, several in {(1, 1), (threads, jobs)}:
        out = folder / f"{count}-{several}"
        if not out.exists():
            arguments = [*map(str, square), str(count), str(out), str(several)]
            subprocess.run([sys.executable, "-c", THREADS, *arguments], check=True)
    assert tree(folder / f"{threads}-{jobs}") == tree(folder / "1-1")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_disk_that_fills_again_and_again(models, whole, tmp_path, monkeypatch, jobs):
    """What was finished before is not done again, and in the end every byte is right."""
    out, keep, finished = tmp_path / "out", Journal.add, 0
    for room in (0, 5, 10):
        left = [room]

        def full(journal, record, left=left):
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
            keep(journal, record)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "add", full)
            with pytest.raises(DeltafoldError) as caught:
                pack(models, out, jobs=jobs)
        assert caught.value.code == "not-enough-disk"
        assert not out.exists()
        finished += room
    assert pack(models, out, jobs=jobs).resumed == finished == 15
    assert tree(out) == whole
    assert not list(tmp_path.glob("*.partial"))


def test_a_torn_last_write(models, whole, tmp_path):
    """As a power cut may leave it: half a line of the journal, parts that never reached the disk."""
    out = tmp_path / "out"

    def stop(event):
        if event.phase == "pack" and event.done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(models, out, progress=stop)
    partial = tmp_path / "out.partial"
    journal, spool = partial / ".journal", partial / ".spool"
    journal.write_bytes(journal.read_bytes()[:-11])
    spool.write_bytes(spool.read_bytes()[: -spool.stat().st_size // 3])
    report = pack(models, out)
    assert 0 < report.resumed < 9
    assert tree(out) == whole


KILLED = """
import sys, time
from deltafold.compress import Recipe, compress_checkpoint, parse_spec
recipe = Recipe(overrides=(("*.1.weight", parse_spec("lossless")), ("*.2.*", parse_spec("int"))))
def slowly(event):
    print(event.done, flush=True)
    time.sleep(0.02)
compress_checkpoint(*sys.argv[1:4], recipe=recipe, progress=slowly)
"""


def test_killed_outright(models, whole, tmp_path):
    out = tmp_path / "out"
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, models), str(out)], stdout=subprocess.PIPE
    )
    assert run.stdout is not None
    for _ in range(7):
        assert run.stdout.readline()
    time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait(30)
    run.stdout.close()
    assert not out.exists()
    assert pack(models, out).resumed >= 6
    assert tree(out) == whole


#: Changes of the disk beside renames and removals: parts, lines of the journal, files of the delta.
CHANGES = ((Journal, "put"), (Journal, "add"), (shards, "write_file"), (assembly, "write_card"),
           (assembly, "_write_json"), (staging, "sync"))  # fmt: skip


@pytest.fixture
def few(tmp_path):
    """A base and a fine-tune of three tensors."""
    draw = torch.Generator().manual_seed(5)
    base = {f"layers.{n}.weight": torch.randn(8, 16, generator=draw) for n in (1, 2)}
    base["norm"] = torch.ones(9)
    tuned = {n: v + 0.1 * torch.randn(v.shape, generator=draw) for n, v in base.items()}
    return write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "ft", tuned)


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_step(few, tmp_path, overwrite):
    """The output is the old delta, none, or the new one; what was finished is not done again."""
    pack(few, tmp_path / "whole")
    whole, out = tree(tmp_path / "whole"), tmp_path / "there" / "out"
    compress_checkpoint(*few, tmp_path / "old", recipe=Recipe(default=parse_spec("exact")))
    old, seen = tree(tmp_path / "old"), set()
    for step in range(200):
        shutil.rmtree(out.parent, ignore_errors=True)
        if overwrite:
            shutil.copytree(tmp_path / "old", out)
        changes: list[str] = []
        with killed_at(step, *CHANGES, counted=changes) as killed:
            pack(few, out, overwrite=overwrite)
        if not killed:
            break
        found = {n: raw for n, raw in tree(out).items() if n not in (".journal", ".spool")}
        assert found in ([old, {}, whole] if overwrite else [{}, whole])
        seen.add("none" if not found else "new" if found == whole else "old")
        if overwrite and not found:
            # The next run puts the old one back, whatever becomes of itself.
            with pytest.raises(DeltafoldError) as caught:
                pack(few, out)
            assert caught.value.code == "exists"
            assert tree(out) == old
        if found == whole and not overwrite:
            continue
        report = pack(few, out, overwrite=overwrite)
        assert report.resumed == (0 if found == whole else changes.count("add"))
        assert tree(out) == whole
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    else:
        raise AssertionError("it never ended")
    assert step > 20
    assert seen == ({"old", "none", "new"} if overwrite else {"none", "new"})


def interrupted(models, out):
    def stop(event):
        if event.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(models, out, progress=stop)


def test_fresh_starts_over(models, whole, tmp_path):
    interrupted(models, tmp_path / "out")
    assert pack(models, tmp_path / "out", fresh=True).resumed == 0
    assert tree(tmp_path / "out") == whole


def test_other_settings_start_over(models, tmp_path):
    interrupted(models, tmp_path / "out")
    report = compress_checkpoint(*models, tmp_path / "out", recipe=Recipe())
    assert report.resumed == 0


@pytest.mark.parametrize(("name", "changed"), [("layers.0.weight", 1), ("layers.9.norm", 0)])
def test_a_changed_input_costs_what_changed(models, tmp_path, name, changed):
    interrupted(models, tmp_path / "out")
    weights = models[1] / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[SafetensorsFile(weights).entries[name].start] ^= 1
    weights.write_bytes(raw)
    compress_checkpoint(*models, tmp_path / "alone", recipe=RECIPE)
    assert pack(models, tmp_path / "out").resumed == 5 - changed
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")


@pytest.mark.parametrize("base", [False, True])
def test_a_copy_is_the_same_input(models, whole, tmp_path, base):
    """Another inode, another date: its tensors are hashed, not coded again."""
    interrupted(models, tmp_path / "out")
    weights, hashed = models[not base] / "model.safetensors", []
    raw = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(raw)
    report = pack(models, tmp_path / "out", progress=hashed.append)
    assert report.resumed == 5
    assert len([event for event in hashed if event.phase == "hash"]) == 5
    assert tree(tmp_path / "out") == whole


def test_a_file_that_did_not_change_is_not_hashed_again(models, tmp_path):
    interrupted(models, tmp_path / "out")
    events = []
    assert pack(models, tmp_path / "out", progress=events.append).resumed == 5
    assert {event.phase for event in events} == {"pack", "verify"}


def test_an_input_that_vanishes(models, whole, tmp_path):
    weights, away = models[1] / "model.safetensors", models[1] / "away"

    def vanish(event):
        if event.done == 4 and weights.exists():
            weights.rename(away)

    with pytest.raises(DeltafoldError) as caught:
        pack(models, tmp_path / "out", progress=vanish)
    assert caught.value.code == "not-found"
    assert "out.partial" in str(caught.value)
    away.rename(weights)
    assert pack(models, tmp_path / "out").resumed == 4
    assert tree(tmp_path / "out") == whole


def test_two_runs_into_one_folder(models, tmp_path):
    tried = []

    def second(event):
        if event.done == 2:
            with pytest.raises(DeltafoldError) as caught:
                pack(models, tmp_path / "out")
            tried.append(caught.value.code)

    pack(models, tmp_path / "out", progress=second)
    assert tried[0] == "busy"


def test_large_tensors_are_the_same_on_every_way(tmp_path, monkeypatch):
    """From a checkpoint in blocks, and from a lossless delta as a whole."""
    monkeypatch.setattr("deltafold.compress.terms.blocks.BLOCK", 200)
    pair = make_pair(tmp_path)
    archive = tmp_path / "archive"
    lossless = Recipe(default=parse_spec("lossless"))
    compress_checkpoint(pair.base, pair.variant, archive, recipe=lossless)
    compress_checkpoint(pair.base, pair.variant, tmp_path / "direct", jobs=2)
    compress_checkpoint(pair.base, archive, tmp_path / "again")
    payload = "delta.safetensors"
    direct, again = (tmp_path / name / payload for name in ("direct", "again"))
    assert direct.read_bytes() == again.read_bytes()


BOUNDED = """
import sys
from deltafold.compress import Recipe, compress_checkpoint, parse_spec
from deltafold.compress.memory import peak_memory
options = {} if sys.argv[5] == "-" else {"max_memory": sys.argv[5]}
recipe = Recipe(default=parse_spec(sys.argv[4]))
compress_checkpoint(*sys.argv[1:4], recipe=recipe, jobs=int(sys.argv[6]), **options)
print(peak_memory())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A matrix of 46 million entries beside its fine-tune: 92 MB each."""
    folder = tmp_path_factory.mktemp("large")
    block = torch.randn(1250, 4096, generator=torch.Generator().manual_seed(1)).mul(0.02)
    base = block.repeat(9, 1).to(torch.bfloat16)
    variant = (block.mul(1.01).repeat(9, 1)).to(torch.bfloat16)
    first = write_checkpoint(folder / "base", {"w": base})
    return first, write_checkpoint(folder / "ft", {"w": variant})


@pytest.mark.parametrize("codec", ["bitdelta:bits=2", "lossless"])
def test_the_bound_of_memory_holds(large, tmp_path, codec):
    """The peak of a process of its own, against its bound and against what it would take as a whole."""
    bound = 900 * 2**20
    arguments = [*map(str, large), str(tmp_path / "out"), codec, "900MiB", "2"]
    run = subprocess.run(
        [sys.executable, "-c", BOUNDED, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= bound


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Five tensors of 2^24 entries and one that is twice as large, against a base of holes."""
    folder = tmp_path_factory.mktemp("many")
    shapes = {f"layers.{n}.w": (4096, 4096) for n in range(5)} | {"layers.9.w": (8192, 4096)}
    specs = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    head, order = file_head(specs, {})
    row = torch.randn(2**20, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    raw = row.view(torch.uint8).numpy().tobytes()
    for name in ("base", "ft"):
        folder.joinpath(name).mkdir()
        folder.joinpath(name, "config.json").write_text("{}")
        with folder.joinpath(name, "model.safetensors").open("wb") as file:
            file.write(head)
            size = 2 * sum(math.prod(shapes[n]) for n in order)
            if name == "ft":
                for _ in range(size // len(raw)):
                    file.write(raw)
            file.truncate(len(head) + size)
    return folder / "base", folder / "ft"


@pytest.mark.parametrize("codec", ["lossless", "dare"])
def test_the_bound_of_memory_holds_for_many_threads(many, tmp_path, codec):
    """Room for two tensors and eight threads that each keep what they were lent."""
    bound = {"lossless": 760, "dare": 1400}[codec]
    arguments = [*map(str, many), str(tmp_path / "out"), codec, f"{bound}MiB", "8"]
    run = subprocess.run(
        [sys.executable, "-c", BOUNDED, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= bound * 2**20


TOO_TIGHT = [
    ("int", "200MiB"),
    ("svd:rank=1", "1300MiB"),
    # These go through the model before anything is coded.
    ("trim:keep=0.5+bitdelta", "1300MiB"),
    ("ultradelta", "1300MiB"),
]


@pytest.mark.parametrize(("codec", "bound"), TOO_TIGHT)
def test_a_bound_that_is_too_tight(large, tmp_path, codec, bound):
    """Is refused before any work, and by a dry run as well."""
    recipe, worked = Recipe(default=parse_spec(codec)), []
    with pytest.raises(DeltafoldError) as caught:
        compress_checkpoint(
            *large, tmp_path / "out", recipe=recipe, max_memory=bound, progress=worked.append
        )
    assert caught.value.code == "not-enough-memory"
    assert not worked
    assert not list(tmp_path.iterdir())
    limits = Limits(1, parse_size(bound, "?"))
    with pytest.raises(DeltafoldError) as caught:
        predict_checkpoint(*large, recipe=recipe, limits=limits)
    assert caught.value.code == "not-enough-memory"


def test_a_size_to_meet_needs_room_for_whole_tensors(large, tmp_path):
    """Every candidate is tried on them, whatever is chosen in the end."""
    budget = Budget(target_size="10MB", candidates=(parse_spec("int"), parse_spec("bitdelta")))
    recipe = Recipe(budget=budget)
    with pytest.raises(DeltafoldError) as caught:
        compress_checkpoint(*large, tmp_path / "out", recipe=recipe, max_memory="1300MiB")
    assert caught.value.code == "not-enough-memory"
    assert "tried whole" in str(caught.value)


def test_a_dry_run_stays_within_its_bound(large):
    recipe = Recipe(default=parse_spec("int"))
    free = predict_checkpoint(*large, recipe=recipe)
    bound = free.memory + 2**20
    assert predict_checkpoint(*large, recipe=recipe, limits=Limits(1, bound)).memory <= bound


def test_sizes_as_people_write_them():
    size = partial(parse_size, fix="write 4GiB")
    assert size("4GiB") == size("4g") == 4 * 2**30
    assert size("1.5 MiB") == 3 * 2**19
    assert size("1.5 MB") == 1_500_000
    assert size("77") == size("77B") == 77
    for wrong in ("much", "", "4iB", "-1", "4GiBB", "1.2.3"):
        with pytest.raises(DeltafoldError, match="not a size"):
            size(wrong)


def test_a_budget_of_memory_never_goes_over():
    budget, held = MemoryBudget(10), []
    with budget.hold(6):
        held.append(budget)
        with budget.hold(4):
            held.append(budget)
    with budget.hold(25):  # larger than the bound: runs alone
        held.append(budget)
    assert len(held) == 3


@pytest.mark.parametrize("codec", ["bitdelta:bits=4,group=16", "int:bits=3", "exact"])
def test_a_dry_run_knows_the_size_to_the_byte(models, tmp_path, codec):
    for name in ("a", "b"):
        models[1].joinpath(f"{name}.json").write_text("{}")
    recipe = Recipe(default=parse_spec(codec), vectors=parse_spec("int:bits=8"))
    draw = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (33, 70), "b.weight": (3, 4, 40), "c.norm": (50,), "d.scalar": ()}
    base = {n: torch.randn(s, generator=draw).to(torch.bfloat16) for n, s in shapes.items()}
    write_checkpoint(tmp_path / "one", base)
    write_checkpoint(tmp_path / "two", {n: v + 1 for n, v in base.items()})
    inputs = tmp_path / "one", tmp_path / "two"
    found = predict_checkpoint(*inputs, recipe=recipe)
    report = compress_checkpoint(*inputs, tmp_path / "out", recipe=recipe)
    assert found.fixed
    assert found.nbytes == report.manifest.totals.delta_bytes
    assert found.variant_bytes == report.manifest.totals.variant_bytes


def test_speed_is_scaled_as_the_codec_grows():
    plain, cubic = Speed.of(0.1, 0.4), Speed.of(0.1, 0.8)
    assert not plain.grows
    assert cubic.grows
    assert plain.seconds(4096, 1024) == pytest.approx(1.6)
    assert plain.seconds(4096, 4096) == pytest.approx(6.4)
    assert cubic.seconds(4096, 1024) == pytest.approx(3.2)
    assert cubic.seconds(4096, 4096) == pytest.approx(51.2)
    assert not Speed.of(0.0, 0.0).grows


def test_a_dry_run_of_a_codec_that_goes_by_data_is_an_estimate(models):
    """`axis-signs` chooses between scales a row and scales a column when it has seen the inputs."""
    recipe = Recipe(default=parse_spec("axis-signs"))
    assert not predict_checkpoint(*models, recipe=recipe).fixed


def test_a_dry_run_counts_the_model_that_calibration_runs(models):
    weights = LAYERS * COLUMNS * (ROWS + 1)
    plain = predict_checkpoint(*models)
    assert (plain.model, plain.timed) == (0, True)
    recipe = Recipe(default=parse_spec("int-hessian"))
    found = predict_checkpoint(*models, recipe=recipe)
    moments = LAYERS * 4 * COLUMNS * (COLUMNS + 256)
    assert found.model == 4 * weights + moments > 3 * 4 * weights
    assert found.memory >= plain.memory
    assert not found.timed
    assert predict_checkpoint(*models, recipe=recipe, device="cuda").model == 0
    fitting = predict_checkpoint(*models, fit=True)
    assert (fitting.model, fitting.timed) == (6 * 4 * weights, True)


def hollow(
    folder: Path,
    layers: int,
    width: int = 8192,
    inner: int = 28672,
    keys: int = 1024,
    words: int = 128256,
) -> Path:
    """A checkpoint with the shapes of a 70B model, all holes: its files take no room."""
    folder.mkdir()
    folder.joinpath("config.json").write_text("{}")
    shapes = {"model.embed_tokens": (words, width), "lm_head": (words, width)}
    shapes |= {"model.norm": (width,)}
    for layer in range(layers):
        for name, shape in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    specs = {f"{name}.weight": (torch.bfloat16, shape) for name, shape in shapes.items()}
    head, _ = file_head(specs, {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 2 * sum(math.prod(s) for _, s in specs.values()))
    return folder


def test_a_dry_run_of_7b_has_the_bytes_that_bitdelta_reports(tmp_path):
    """Its table prints 1.24 GiB: signs and a scale a matrix, tables and norms whole."""
    shapes = {"width": 4096, "inner": 11008, "keys": 4096, "words": 32000}
    base, tuned = (hollow(tmp_path / name, 32, **shapes) for name in ("base", "ft"))
    whole = tuple((pattern, parse_spec("exact")) for pattern in ("*embed*", "lm_head*"))
    recipe = Recipe(default=parse_spec("bitdelta:scale=tensor"), overrides=whole)
    found = predict_checkpoint(base, tuned, recipe=recipe)
    assert found.fixed
    assert found.variant_bytes == 13_476_831_232
    assert found.nbytes / 2**30 == pytest.approx(1.24, abs=0.005)


def test_a_dry_run_of_70b(tmp_path):
    base, tuned = hollow(tmp_path / "base", 80), hollow(tmp_path / "ft", 80)
    found = predict_checkpoint(base, tuned, recipe=Recipe(default=parse_spec("bitdelta")))
    assert found.variant_bytes > 140e9
    assert 0.062 < found.ratio < 0.065
    assert found.fixed
    assert found.memory < 2**31
    assert found.seconds > 1
