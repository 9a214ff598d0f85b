"""Model cards and reports: what they say, and that a page needs nothing but itself."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import pytest
import yaml
from checkpoints import write_checkpoint
from packing import pack

from deltafold.compress import DeltafoldError, DeltaRepo, Recipe, compress_checkpoint, parse_spec
from deltafold.compress.card import card_text
from deltafold.compress.delta_files import read_manifest
from deltafold.compress.licences import licence_of
from deltafold.compress.memory import Timeline, peak_memory
from deltafold.compress.pictures import Point, bars, bytes_by_kind, error_map, kind_of, scatter
from deltafold.compress.report import memory_samples, write_report
from deltafold.compress.svg import ticks
from deltafold.compress.zoo_aliases import set_alias
from deltafold.compress.zoo_map import cosines


def measured(folder: Path, **quality: object) -> None:
    path = folder / "delta_config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "quality": quality}))


def drawings(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg .*?</svg>", page, re.DOTALL)]


def words(drawing: ElementTree.Element) -> list[str]:
    return [e.text or "" for e in drawing.iter() if e.tag.endswith("text")]


@pytest.mark.parametrize(
    ("name", "dimensions", "kind"),
    [
        ("model.layers.3.mlp.experts.down_proj", 3, "experts"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", 2, "experts"),
        ("model.embed_tokens.weight", 2, "embeddings"),
        ("transformer.wte.weight", 2, "embeddings"),
        ("lm_head.weight", 2, "head"),
        ("model.layers.0.input_layernorm.weight", 1, "norms"),
        ("transformer.h.0.ln_1.bias", 1, "norms"),
        ("model.layers.0.self_attn.q_proj.weight", 2, "q_proj"),
        ("model.layers.0.self_attn.q_proj.bias", 1, "biases and vectors"),
    ],
)
def test_kinds(name, dimensions, kind):
    assert kind_of(name, dimensions) == kind


def test_every_byte_is_told(pair):
    manifest = pack(pair, Recipe(default=parse_spec("int:bits=4"))).manifest
    kinds = bytes_by_kind(manifest)
    assert sum(kinds.values()) == manifest.totals.delta_bytes
    assert min(kinds.values()) > 0
    assert kinds["experts"] == 3 * 24 * 40 // 2
    drawn = ElementTree.fromstring(bars({"a": kinds, "b": {"experts": 1}}, title="<both>"))
    heights = [e.attrib["height"] for e in drawn.iter() if e.tag.endswith("rect")]
    assert heights.count("22.0") == len(kinds) + 1


def test_the_page_of_a_delta(pair):
    pack(pair, Recipe(default=parse_spec("bitdelta:bits=1")))
    frontier = [{"bytes": b, "error": 1 / b} for b in (1000, 2000, 4000)]
    measured(pair.out, kl_mean=0.25, plan={"frontier": frontier, "error_unit": "u"})
    rows = [f"{t},{t * 1000}" for t in range(5)]
    (pair.out / "report" / "memory.csv").write_text("\n".join(["seconds,bytes", *rows]))
    page, pictures = write_report(pair.out, pair.root / "r.html", svg_dir=pair.root / "svg")
    text = page.read_text()
    assert [p.name for p in pictures] == ["bytes.svg", "error.svg", "frontier.svg", "memory.svg"]
    assert all(p.read_text() in text for p in pictures)
    assert len(drawings(text)) == 4
    assert "0.25" in text
    assert DeltaRepo.open(pair.out).digest in text
    # Nothing is fetched and nothing runs.
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script|<link|<img|@import|url\(", text)
    assert str(pair.root) not in text


def test_memory_of_a_real_run_is_drawn(pair, monkeypatch):
    """Short runs have no such file: here one that is looked at every millisecond has."""
    monkeypatch.setattr("deltafold.compress.assembly._WORTH_DRAWING", 2)
    monkeypatch.setattr("deltafold.compress.assembly.Timeline", partial(Timeline, every=1e-3))
    pack(pair, Recipe(default=parse_spec("bitdelta:bits=1")))
    samples = memory_samples(pair.out / "report" / "memory.csv")
    assert samples
    # The system keeps both by batches of pages for each thread, and raises the peak later.
    most = peak_memory() + 2**26
    assert all(2**20 < nbytes <= most for _, nbytes in samples)
    assert [seconds for seconds, _ in samples] == sorted(seconds for seconds, _ in samples)
    _, pictures = write_report(pair.out, pair.root / "r.html", svg_dir=pair.root / "svg")
    assert "memory.svg" in [p.name for p in pictures]


def test_the_page_of_a_lossless_delta_and_of_a_zoo(pair):
    for name, codec, kl in (("one", "bitdelta:bits=1", 0.5), ("<all>", "lossless", 0.0)):
        out = pair.root / "zoo" / name
        compress_checkpoint(pair.base, pair.variant, out, recipe=Recipe(default=parse_spec(codec)))
        measured(out, kl_mean=kl, top1_agreement=math.nan)
    set_alias(pair.root / "zoo", "prod", "one")
    page, _ = write_report(pair.root / "zoo" / "<all>", pair.root / "r.html")
    assert error_map(read_manifest(pair.root / "zoo" / "<all>")) is None
    assert "bit for bit" in page.read_text()
    page, _ = write_report(pair.root / "zoo", pair.root / "z.html")
    text = page.read_text()
    assert "prod" in text
    assert "<all>" not in text
    bytes_, quality = drawings(text)
    assert {"one", "<all>"} < set(words(bytes_))
    assert {"one", "<all>"} < set(words(quality))
    with pytest.raises(DeltafoldError) as caught:
        write_report(pair.base, pair.root / "b.html")
    assert caught.value.code == "not-a-delta"


def test_deltas_that_are_alike(pair):
    repos = {}
    for name, codec in (("a", "bitdelta:bits=4"), ("b", "int:bits=8"), ("exact", "lossless")):
        recipe = Recipe(default=parse_spec(codec))
        compress_checkpoint(pair.base, pair.variant, pair.root / "zoo" / name, recipe=recipe)
        repos[name] = DeltaRepo.open(pair.root / "zoo" / name)
    moved = {n: 2 * pair.base_tensors[n] - t for n, t in pair.variant_tensors.items()}
    write_checkpoint(pair.root / "back", moved)
    compress_checkpoint(pair.base, pair.root / "back", pair.root / "zoo" / "c")
    repos["c"] = DeltaRepo.open(pair.root / "zoo" / "c")
    names, values, tensors = cosines(repos)
    assert names == ["a", "b", "c"]
    assert 3 < len(tensors) <= 8
    assert [values[i][i] for i in range(3)] == pytest.approx([1, 1, 1])
    assert values[0][1] > 0.98
    assert values[0][2] < -0.9
    assert cosines({"exact": repos["exact"], "a": repos["a"]}) == ([], [], [])
    text = write_report(pair.root / "zoo", pair.root / "z.html")[0].read_text()
    assert f"{values[0][2]:.2f}" in words(drawings(text)[1])


def test_axes():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 3) == [3]
    same = [Point("a", 0.1, 5.0), Point("b", 0.1, 5.0, chosen=True)]
    assert "NaN" not in scatter(same, title="t", unit="u").replace("nan", "NaN")


@pytest.mark.parametrize("values", [(0.99,), (1.0,), (0.2, 1.0)])
def test_shares_have_an_axis_that_ends_at_one(values):
    points = [Point(f"v{i}", 0.1 + i, value) for i, value in enumerate(values)]
    drawn = scatter(points, title="t", unit="u", ceiling=1.0)
    ends = [w for w in words(ElementTree.fromstring(drawn)) if re.fullmatch(r"[0-9.]+", w)]
    assert ends
    assert max(map(float, ends)) <= 1.0
    heights = [float(y) for y in re.findall(r'cy="([0-9.]+)"', drawn)]
    assert all(54 <= y <= 320 - 46 for y in heights)


def test_memory_that_was_not_recorded(tmp_path):
    assert memory_samples(tmp_path / "none.csv") == []
    (tmp_path / "odd.csv").write_text("seconds,bytes\n1,x\n")
    assert memory_samples(tmp_path / "odd.csv") == []


def test_the_card_says_what_matters(pair):
    (pair.variant / "LICENSE").write_text("  Apache License\n Version 2.0, January 2004\n")
    report = compress_checkpoint(
        pair.base,
        pair.variant,
        pair.out,
        recipe=Recipe(default=parse_spec("bitdelta:bits=1")),
        command="deltafold compress base variant -o delta",
    )
    text = (pair.out / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    for part in (
        "deltafold zoo add ZOO",
        "deltafold serve base --zoo ZOO",
        "| experts |",
        "(report/error.svg)",
        "was not measured",
        "deltafold compress base variant -o delta",
        "default: bitdelta",
    ):
        assert part in text, part
    quality = {"kl_mean": 0.125, "tokens": 64, "data": {"name": "prompts.jsonl"}}
    text = card_text(report.manifest.model_copy(update={"quality": quality}), pair.out)
    assert "| 0.125 |" in text
    assert "prompts.jsonl, 64 tokens" in text
    assert "was not measured" not in text
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"


def test_licences(tmp_path):
    assert licence_of(tmp_path) == {}
    (tmp_path / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT")
    assert licence_of(tmp_path) == {"license": "other", "license_link": "LICENSE"}
    stated = {"license": "other", "license_name": "llama3.1", "license_link": "LICENSE"}
    head = yaml.safe_dump({**stated, "tags": ["x"]})
    (tmp_path / "README.md").write_text(f"---\n{head}---\n\n# A model\n\n---\nlicense: mit\n---\n")
    assert licence_of(tmp_path) == stated
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence_of(tmp_path)["license"] == "other"


def test_sizes_that_are_close_have_an_axis_too():
    one = scatter([Point("sql", ratio=0.2985, value=0.013)], title="t", unit="u")
    assert "29.8%" in one or "29.9%" in one
