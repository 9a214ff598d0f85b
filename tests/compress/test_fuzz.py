"""Damage of any kind ends in a `DeltafoldError`, or in the very same tensors."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from checkpoints import Pair, bits, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deltafold.compress import (
    Checkpoint,
    DeltafoldError,
    DeltaRepo,
    Manifest,
    Recipe,
    compress_checkpoint,
    parse_spec,
)
from deltafold.compress.fingerprint import digest_source
from deltafold.compress.verify import check_coverage


class Target:
    """A small delta whose files are changed and put back, and what must come of it."""

    def __init__(self, root):
        draw = torch.Generator().manual_seed(0)
        base = {
            name: torch.randn(6, 10, generator=draw).to(torch.bfloat16)
            for name in ("planes", "codes", "stream", "few", "rows", "sparse")
        }
        base["norm"] = torch.ones(5, dtype=torch.bfloat16)
        variant = {n: t + torch.randn(t.shape, generator=draw).to(t.dtype) for n, t in base.items()}
        variant["rows"] = base["rows"].clone()
        variant["rows"][2] += 1
        self.pair = Pair(
            root,
            write_checkpoint(root / "base", base),
            write_checkpoint(root / "variant", variant),
            base,
            variant,
        )
        recipe = Recipe(
            default=parse_spec("int"),
            overrides=(
                ("planes", parse_spec("bitdelta:bits=2")),
                ("stream", parse_spec("lossless")),
                ("few", parse_spec("svd:rank=2")),
                ("sparse", parse_spec("dare:drop=0.5")),
            ),
        )
        compress_checkpoint(self.pair.base, self.pair.variant, self.pair.out, recipe=recipe)
        self.base = Checkpoint.open(self.pair.base)
        self.digests = digest_source(self.base)
        self.expected = self.tensors()

    def tensors(self) -> dict[str, bytes]:
        """Every tensor of the fine-tune, all checks made that a loader makes."""
        repo = DeltaRepo.open(self.pair.out)
        repo.check_base(self.digests, given="base")
        check_coverage(repo, self.digests)
        found = {}
        for name in repo.variant_names():
            value = self.base.tensor(name)
            found[name] = bits(
                repo.restored(name, value) if name in repo.manifest.tensors else value
            )
        return found

    def check(self, name: str, damaged: bytes) -> None:
        path = self.pair.out / name
        whole = path.read_bytes()
        try:
            path.write_bytes(damaged)
            assert self.tensors() == self.expected
        except DeltafoldError:
            pass
        finally:
            path.write_bytes(whole)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return Target(tmp_path_factory.mktemp("fuzz"))


NAMES = ("delta.safetensors", "delta_config.json", "base_tensors.json")
places = st.integers(min_value=0, max_value=2**24)
#: Bytes that mean something in JSON come up more often than by chance.
some_bytes = st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789-eE.,:"[]{}\\ntf '))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=250)
@given(changes=st.lists(st.tuples(places, some_bytes), min_size=1, max_size=4))
def test_changed_bytes(target, name, changes):
    data = bytearray((target.pair.out / name).read_bytes())
    for place, byte in changes:
        data[place % len(data)] = byte
    target.check(name, bytes(data))


@settings(max_examples=800)
@given(place=places, byte=some_bytes)
def test_changed_bytes_of_the_header(target, place, byte):
    data = bytearray((target.pair.out / "delta.safetensors").read_bytes())
    data[place % (8 + int.from_bytes(data[:8], "little"))] = byte
    target.check("delta.safetensors", bytes(data))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80)
@given(start=places, length=st.integers(1, 64), more=st.binary(max_size=8))
def test_removed_and_added_bytes(target, name, start, length, more):
    data = (target.pair.out / name).read_bytes()
    start %= len(data)
    target.check(name, data[:start] + more + data[start + length :])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80)
@given(keep=places)
def test_truncated(target, name, keep):
    data = (target.pair.out / name).read_bytes()
    target.check(name, data[: keep % len(data)])


ODD = st.one_of(
    st.sampled_from([None, True, -1, 0, 1, 2, 7, 2**31, 2**63, 2**70, 1.5, 1e300, "", "x", "F32"]),
    st.sampled_from([[], [0], [1, 10], [2**62, 4], [6, 10, 1], {}, {"id": "exact", "v": 1}]),
    st.sampled_from(["xor", "raw", "seed", "bitmap", "tensor", "row", "group", "float16"]),
)


def leaves(value, path=()):
    """Every place of a JSON document, inner ones too."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))


@settings(max_examples=600)
@given(place=places, odd=ODD)
def test_forged_manifests_never_crash(target, place, odd):
    """A forger signs what he changed: other tensors may come of it, but no other exception."""
    path = target.pair.out / "delta_config.json"
    whole = path.read_text("utf-8")
    data = json.loads(whole)
    where = list(leaves({"tensors": data["tensors"], "files": data["files"], "base": data["base"]}))
    *way, last = where[place % len(where)]
    holder = data
    for key in way:
        holder = holder[key]
    holder[last] = odd
    with contextlib.suppress(ValidationError):
        data["delta_id"] = Manifest.model_validate(data).content_digest()
    try:
        path.write_text(json.dumps(data), "utf-8")
        target.tensors()
    except DeltafoldError:
        pass
    finally:
        path.write_text(whole, "utf-8")
