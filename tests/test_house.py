"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltafold.compress.errors import CODES

ROOT = Path(__file__).parents[1]
#: Each room, and what it may import. The short public API in `runtime/_api` may name all of them.
ROOMS = {
    "compress": {"compress"},
    "runtime": {"compress", "runtime"},
    "server": {"compress", "runtime", "server"},
}
LONGEST = 450


def sources(room: str) -> list[Path]:
    return sorted(p for p in (ROOT / room).rglob("*.py") if "__pycache__" not in p.parts)


every_source = [path for room in ROOMS for path in sources(room)]


def imports(path: Path) -> Iterator[str]:
    """Every absolute name that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    for path in sources(room):
        if (ROOT / "runtime" / "_api") in path.parents:
            continue
        for name in imports(path):
            where = f"{path.relative_to(ROOT)} imports {name}"
            assert name.partition(".")[0] not in ROOMS, f"{where}: write deltafold.*"
            if name.startswith("deltafold."):
                assert name.split(".")[1] in ROOMS[room], where


def test_compress_knows_no_transformers_and_no_web():
    known = {"transformers", "fastapi", "starlette", "uvicorn", "httpx", "requests", "click"}
    for path in sources("compress"):
        # Where models are run for calibration; `test_importing_compress_is_light` holds that
        # nothing is imported before.
        forgiven = {"transformers"} if path.parent.name == "calibration" else set()
        assert not {name.partition(".")[0] for name in imports(path)} & (known - forgiven), path


#: Kinds of layers in configurations of transformers that are names of architectures as well.
LAYERS = {"mamba"}


def test_no_architecture_is_known_by_name():
    """Names, shapes and module types decide. The demo makes the one model that it trains."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kinds = set(CONFIG_MAPPING_NAMES) - LAYERS
    ends = ("Model", "ForCausalLM", "ForConditionalGeneration", "Classification", "Config")
    general = {"GenerationConfig", "AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    general |= {"AutoModelForSeq2SeqLM"}
    classes = {name for name in dir(transformers) if name.endswith(ends)} - general
    assert len(kinds) > 300
    assert len(classes) > 1000
    for path in every_source:
        if (ROOT / "server" / "demo") in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant):
                named = isinstance(node.value, str) and node.value in kinds | classes
            else:
                named = getattr(node, "attr", getattr(node, "id", None)) in classes
            assert not named, f"{path}:{node.lineno} names an architecture"


def test_the_package_list_is_the_folders():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in every_source} - {ROOT / "runtime" / "_api"}
    expected = {f"deltafold.{'.'.join(f.relative_to(ROOT).parts)}" for f in folders}
    assert set(settings["packages"]) == expected | {"deltafold"}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_importing_compress_is_light():
    code = """
import sys
import deltafold.compress
import deltafold.compress.calibration
import torch
heavy = {"transformers", "fastapi", "huggingface_hub", "click"} & set(sys.modules)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_importing_deltafold_is_instant():
    code = "import sys, deltafold; assert 'torch' not in sys.modules; deltafold.Recipe"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("room", ROOMS)
def test_files_stay_short(room):
    lengths = {p.relative_to(ROOT): len(p.read_text("utf-8").splitlines()) for p in sources(room)}
    assert {path: n for path, n in lengths.items() if n >= LONGEST} == {}


def test_every_code_is_used():
    # The tables of codes and statuses are both called errors.py; what counts is who raises.
    text = "".join(p.read_text("utf-8") for p in every_source if p.name != "errors.py")
    assert [code for code in CODES if f'"{code}"' not in text] == []


def test_every_code_has_its_section():
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    assert re.findall(r"^## (\S+)$", text, re.MULTILINE) == list(CODES)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", other.read_text("utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
            assert anchor in anchors, target
