"""Families: several fine-tunes whose deltas share tensors."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import Tensors, base_tensors, fine_tuned, read_checkpoint, write_checkpoint
from packing import tree

from deltafold.compress import (
    DeltafoldError,
    DeltaRepo,
    Recipe,
    export_peft,
    parse_spec,
    restore_checkpoint,
    verify_delta,
)
from deltafold.compress.families import FAMILIES, parse_family
from deltafold.compress.families.pack import FamilyReport, compress_family
from deltafold.compress.families.row_groups import clusters
from deltafold.compress.family import FamilyManifest, families_in
from deltafold.compress.spec import spec_of
from deltafold.compress.terms import Context, Shared

MATRIX = "model.layers.0.mlp.up_proj.weight"
NAMES = ["a", "b", "c"]


@dataclass
class Models:
    """A base and three fine-tunes on disk."""

    root: Path
    base: Path
    full: list[Path]
    tensors: list[Tensors]
    base_tensors: Tensors

    def pack(self, method: str = "emr", out: str = "zoo", **options) -> FamilyReport:
        options = {"names": NAMES, **options}
        return compress_family(
            self.base, self.full, self.root / out, method=parse_family(method), **options
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    root = tmp_path_factory.mktemp("family")
    base = base_tensors()
    tuned = [fine_tuned(base, seed=i + 1) for i in range(3)]
    tuned[2]["lm_head.weight"] = base["lm_head.weight"].clone()
    return Models(
        root,
        write_checkpoint(root / "base", base),
        [write_checkpoint(root / f"full{i}", t) for i, t in enumerate(tuned)],
        tuned,
        base,
    )


@pytest.fixture(scope="module")
def packed(models) -> Path:
    models.pack(out="whole")
    return models.root / "whole"


@pytest.fixture
def zoo(packed, tmp_path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(packed, tmp_path / "zoo")


def code_of(action, *args, **options) -> str:
    with pytest.raises(DeltafoldError) as caught:
        action(*args, **options)
    return caught.value.code


def test_emr_by_hand():
    first = torch.tensor([[1.0, -2.0, 3.0, 0.0, 1.0]])
    second = torch.tensor([[2.0, 1.0, -1.0, 0.0, -1.0]])
    # Sums 3, -1, 2, 0, 0; a zero counts as minus. Largest of those that agree: 2, 2, 3, 0, 1.
    elected = parse_family("emr").share([first, second])
    assert elected.tolist() == [[2.0, -2.0, 3.0, 0.0, -1.0]]

    def of(delta):
        context = Context("w", shared=lambda family, key: elected)
        encoded = Shared().encode(delta, context)
        return encoded.term.decode(encoded.parts, (1, 5), context).tolist()

    assert of(first) == [[2.0, -2.0, 3.0, 0.0, 0.0]]
    assert of(second) == [[2.0, 0.0, 0.0, 0.0, -1.0]]


def test_emr_scales_are_ratios_over_all_tensors(models, packed):
    method, deltas = parse_family("emr"), {}
    shared = [n for n, v in models.base_tensors.items() if v.is_floating_point() and v.dim() > 1]
    for name in shared:
        base = models.base_tensors[name].float()
        deltas[name] = [t[name].float() - base for t in models.tensors]
    own = sum(d[1].abs().mean() for d in deltas.values())
    taken = 0.0
    for several in deltas.values():
        elected = method.share([d.reshape(len(d), -1) for d in several])
        agrees = several[1].reshape(elected.shape) * elected > 0
        taken += (elected * agrees).abs().mean()
    scales = {t.scale for n in shared for t in DeltaRepo.open(packed / "b").terms(n)}
    assert len(scales) == 1
    assert scales.pop() == pytest.approx(float(own / taken), rel=1e-3)


def test_rows_that_point_the_same_way_share_a_group():
    draw = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 4, 16, generator=draw)
    deltas = [one, 3 * one + 0.01, two, -two, two * 0.5]
    for group in clusters(deltas, 3).T.tolist():
        assert group[0] == group[1]
        assert group[2] == group[4]
        assert len({group[0], group[2], group[3]}) == 3


def test_as_many_groups_as_members_lose_nothing(models, tmp_path):
    report = models.pack("row-groups:groups=3", str(tmp_path / "zoo"), codec=parse_spec("exact"))
    for name, tensors in zip(NAMES, models.tensors, strict=True):
        assert report.packs[name].worst(1)[0][1] == 0.0
        restore_checkpoint(tmp_path / "zoo" / name, models.base, tmp_path / name)
        found = read_checkpoint(tmp_path / name)
        for key, value in tensors.items():
            # The float32 difference of two bfloat16 tensors need not be exact.
            torch.testing.assert_close(found[key], value, rtol=2**-8, atol=0)


def test_fewer_groups_are_closer_than_one(models, tmp_path):
    errors = []
    for groups in (1, 2, 3):
        report = models.pack(f"row-groups:groups={groups}", str(tmp_path / str(groups)))
        errors.append(sum(p.manifest.tensors[MATRIX].rel_error for p in report.packs.values()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_a_shared_shift_and_a_rest_for_each(models, tmp_path):
    """Fine-tunes that go one way from the base: the factors are least squares, the rest is small."""
    draw = torch.Generator().manual_seed(1)
    base = {f"w{i}": torch.randn(64, 96, generator=draw) for i in range(2)}
    way = {n: torch.randn(v.shape, generator=draw) * 0.01 for n, v in base.items()}
    factors, full, deltas = (0.5, 1.0, 2.0), [], []
    for number, factor in enumerate(factors):
        own = {n: torch.randn(v.shape, generator=draw) * 0.002 for n, v in base.items()}
        deltas.append({n: factor * way[n] + own[n] for n in base})
        moved = {n: base[n] + deltas[-1][n] for n in base}
        full.append(write_checkpoint(tmp_path / f"full{number}", moved))
    folder = write_checkpoint(tmp_path / "base", base)
    report = compress_family(
        folder,
        full,
        tmp_path / "zoo",
        method=parse_family("shift-scale:rest=(bitdelta:scale=tensor)"),
        codec=parse_spec("int:bits=8"),
    )
    mean = {n: sum(d[n] for d in deltas) / 3 for n in base}
    for name, own in zip(report.packs, deltas, strict=True):
        repo = DeltaRepo.open(tmp_path / "zoo" / name)
        product = sum(float((own[n] * mean[n]).sum()) for n in base)
        scale = product / sum(float(mean[n].square().sum()) for n in base)
        for n in base:
            shared, rest = repo.terms(n)
            assert shared.scale == pytest.approx(scale, rel=1e-3)
            assert rest.id == "planes"
            left = own[n] - scale * mean[n]
            expected = float((left.abs() - left.abs().mean()).norm() / own[n].norm())
            assert repo.manifest.tensors[n].rel_error == pytest.approx(expected, rel=0.02)
        again = tmp_path / "again" / name
        restore_checkpoint(tmp_path / "zoo" / name, folder, again)
        found = read_checkpoint(again)
        assert all((found[n] - base[n] - own[n]).norm() < 0.3 * own[n].norm() for n in base)


def test_bytes_are_told_apart(models, packed):
    (family,) = families_in(packed)
    manifest = FamilyManifest.model_validate_json((family / "family.json").read_text())
    payload = sum(p.stat().st_size for p in family.glob("*.safetensors"))
    assert manifest.bytes == payload
    repo = DeltaRepo.open(packed / "a")
    rows, columns = repo.entry(MATRIX).shape
    assert repo.entry(MATRIX).bytes == rows * columns // 8
    assert repo.manifest.recipe["family"]["bytes"] == payload
    assert manifest.tensors[MATRIX].bytes == 2 * rows * columns + 4
    card = (packed / "a" / "README.md").read_text()
    assert f"{payload:,} more bytes" in card
    assert family.name in card


def test_the_digest_is_what_the_format_says(packed):
    (folder,) = families_in(packed)
    family = json.loads((folder / "family.json").read_text())
    content = {
        "base": family["base"],
        "format": "deltafold-family",
        "major": "1",
        "tensors": {
            k: [t["shape"], t["terms"], t["payload_sha256"]] for k, t in family["tensors"].items()
        },
    }
    text = json.dumps(content, separators=(",", ":"), sort_keys=True)
    assert family["family_id"] == f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    assert folder.name == family["family_id"].removeprefix("sha256:")


def test_export_to_peft(models, packed, tmp_path):
    report = export_peft(
        packed / "a", models.base, tmp_path / "lora", rank=40, drop=["*experts*", "logit_scale"]
    )
    repo = DeltaRepo.open(packed / "a")
    full = [t for t in report.tensors if t.kind == "lora"]
    assert {t.tensor for t in full} >= {MATRIX}
    assert max(t.rel_error for t in full) < 1e-4
    assert repo.delta(MATRIX, models.base_tensors[MATRIX]).norm() == pytest.approx(
        next(t.norm for t in full if t.tensor == MATRIX)
    )


def test_what_is_not_shared(models, packed):
    assert "lm_head.weight" in DeltaRepo.open(packed / "c").manifest.unchanged
    repo = DeltaRepo.open(packed / "a")
    assert repo.terms("model.norm.weight")[0].id == "exact"
    (family,) = repo.families.values()
    kinds = {n for n, v in models.base_tensors.items() if v.is_floating_point() and v.dim() > 1}
    assert set(family.manifest.tensors) == kinds


def test_a_named_tensor_gets_its_own_codec(models, tmp_path):
    recipe = Recipe(overrides=(("*up_proj*", parse_spec("int:bits=8")),))
    models.pack(out=str(tmp_path / "zoo"), recipe=recipe)
    repo = DeltaRepo.open(tmp_path / "zoo" / "a")
    assert repo.terms(MATRIX)[0].id == "codes"
    assert MATRIX not in next(iter(repo.families.values())).manifest.tensors


def test_the_same_input_gives_the_same_zoo(models, packed, tmp_path):
    models.pack(out=str(tmp_path / "again"))
    assert tree(tmp_path / "again") == tree(packed)


def test_the_deltas_identity_depends_on_the_familys(models, packed, tmp_path):
    models.pack(out=str(tmp_path / "zoo"), codec=parse_spec("int:bits=8"))
    one, two = DeltaRepo.open(packed / "a"), DeltaRepo.open(tmp_path / "zoo" / "a")
    assert one.digest != two.digest
    assert set(one.families) != set(two.families)


def test_verify_and_restore(models, zoo, tmp_path):
    for name in NAMES:
        report = verify_delta(zoo / name, base=models.base, full=True)
        assert report.restored == 4
        restore_checkpoint(zoo / name, models.base, tmp_path / name)
        repo, found = DeltaRepo.open(zoo / name), read_checkpoint(tmp_path / name)
        base = models.base_tensors[MATRIX]
        expected = base.float() + repo.delta(MATRIX, base)
        assert torch.equal(found[MATRIX], expected.to(base.dtype))


def test_a_missing_family_is_named(models, zoo):
    (family,) = families_in(zoo)
    shutil.rmtree(family)
    with pytest.raises(DeltafoldError) as caught:
        verify_delta(zoo / "a", base=models.base)
    assert caught.value.code == "not-found"
    assert family.name in str(caught.value)
    assert f".families/{family.name}" in caught.value.fix


def test_a_delta_may_hold_its_family_itself(models, zoo, tmp_path):
    (family,) = families_in(zoo)
    alone = shutil.copytree(zoo / "a", tmp_path / "alone" / "a")
    shutil.copytree(family, alone / ".families" / family.name)
    verify_delta(alone, base=models.base, full=True)


@pytest.mark.parametrize("offset", [-1, -1000])
def test_a_flipped_bit_in_the_family(models, zoo, tmp_path, offset):
    (family,) = families_in(zoo)
    path = family / "family.safetensors"
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))
    assert code_of(verify_delta, zoo / "a") == "checksum"
    out = tmp_path / "there" / "restored"
    assert code_of(restore_checkpoint, zoo / "a", models.base, out) == "checksum"
    assert not out.exists()


def test_other_damage_of_the_family(models, zoo):
    (family,) = families_in(zoo)
    payload, text = family / "family.safetensors", (family / "family.json").read_text()
    data = payload.read_bytes()
    payload.write_bytes(data[:-1])
    assert code_of(DeltaRepo.open, zoo / "a") == "truncated"
    payload.write_bytes(data)

    def changed(change, *, sign: bool) -> str:
        content = json.loads(text)
        change(content)
        if sign:
            signed = FamilyManifest.model_validate(content)
            content["family_id"] = signed.content_digest()
        (family / "family.json").write_text(json.dumps(content))
        return code_of(DeltaRepo.open, zoo / "a")

    assert changed(lambda c: c["tensors"].pop(MATRIX), sign=False) == "checksum"
    # A forger's digest is not the one that the delta names.
    assert changed(lambda c: c.update(base="sha256:" + "1" * 64), sign=True) == "checksum"
    assert changed(lambda c: c.update(colour="red"), sign=False) == "bad-manifest"
    assert changed(lambda c: c.update(format="other"), sign=False) == "bad-manifest"
    assert changed(lambda c: c.update(format_version="2.0"), sign=False) == "newer-format"
    (family / "family.json").write_text(text)
    DeltaRepo.open(zoo / "a")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"names": ["a", "b"]}, "bad-argument"),
        ({"names": ["a", "a", "b"]}, "bad-argument"),
        ({"names": ["a", "../b", "c"]}, "bad-argument"),
        ({"names": ["a", ".b", "c"]}, "bad-argument"),
        ({"recipe": Recipe(overrides=(("nothing*", parse_spec("int")),))}, "bad-recipe"),
        ({"accept": ["everything"]}, "bad-argument"),
    ],
)
def test_refusals_leave_nothing(models, tmp_path, options, code):
    assert code_of(models.pack, "emr", str(tmp_path / "zoo"), **options) == code
    assert not (tmp_path / "zoo").exists()


def test_one_fine_tune_is_no_family(models, tmp_path):
    code = code_of(
        compress_family, models.base, models.full[:1], tmp_path / "z", method=parse_family("emr")
    )
    assert code == "bad-argument"


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_fine_tune_leaves_nothing(models, tmp_path, method, value):
    broken = {n: v.clone() for n, v in models.tensors[0].items()}
    broken[MATRIX][0, 0] = value
    full = write_checkpoint(tmp_path / "broken", broken)
    zoo = tmp_path / "zoo"
    several = [models.full[0], full]
    code = code_of(compress_family, models.base, several, zoo, method=parse_family(method))
    assert code == "not-finite"
    assert not any(zoo.iterdir())


def test_names_that_are_taken(models, zoo):
    before = tree(zoo)
    assert code_of(models.pack, "emr", str(zoo)) == "exists"
    assert tree(zoo) == before
    models.pack("row-groups", str(zoo), overwrite=True)
    assert len(families_in(zoo)) == 2
    verify_delta(zoo / "a", base=models.base)


def test_family_methods_are_looked_up():
    assert parse_family("row-groups:groups=5").groups == 5
    assert code_of(parse_family, "row-groups:groups=0") == "bad-recipe"
    assert code_of(parse_family, "magic") == "unknown-codec"
    assert code_of(parse_family, "shift-scale:rest=lossless") == "bad-recipe"
    assert code_of(parse_family, "shift-scale:rest=svd-act") == "bad-recipe"
    assert code_of(parse_family, "shift-scale:scale=0") == "bad-recipe"
    chosen = parse_family("shift-scale:rest=(int:bits=2,group=8)")
    assert parse_family(spec_of(chosen)) == chosen
