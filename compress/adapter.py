"""A PEFT LoRA folder: `adapter_config.json` and `adapter_model.safetensors`, read and checked.

An option that is not known here may change what the adapter computes, so it is refused unless it is
switched off.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.hub import Reference, resolve
from deltafold.compress.safetensors_file import SafetensorsFile

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

_PARTS: Final = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
#: Path segments that PEFT's wrappers add around a plain tensor.
_WRAPPERS: Final = ("modules_to_save", "base_layer")
#: Options that are read here, or say nothing about what a trained adapter computes.
_READ: Final = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("fan_in_fan_out", "modules_to_save", "use_dora", "init_lora_weights", "bias"),
        *("task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"),
        *("peft_version", "lora_dropout", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "runtime_config", "qalora_group_size"),
        *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_core"),
        *("ensure_weight_tying", "low_cpu_mem_usage"),
    )
)
#: Ways to begin training that leave the base's weights as they are.
_STARTS: Final = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass
class LoraModule:
    """One adapted module: the payload keys of its factors, and its scale."""

    rank: int = 0
    scale: float = 1.0
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def embedding(self) -> bool:
        """Whether the factors are those of a table: their product is its transpose."""
        return "embedding_a" in self.keys

    @property
    def a(self) -> str:
        """Key of `A [r, in]`."""
        return self.keys["embedding_a" if self.embedding else "a"]

    @property
    def b(self) -> str:
        """Key of `B [out, r]`."""
        return self.keys["embedding_b" if self.embedding else "b"]

    @property
    def magnitude(self) -> str | None:
        """Key of DoRA's magnitudes `[out]`."""
        return self.keys.get("magnitude")


class Adapter:
    """A LoRA folder whose every key and option is understood.

    Attributes:
        reference: where it is.
        file: its tensors.
        config: `adapter_config.json`.
        loras: adapted modules by PEFT's path, without the prefix.
        plain: keys of tensors that are stored whole, by the tensor's path without the prefix.

    Raises:
        DeltafoldError: `not-a-checkpoint`, `truncated`; `engine-unsupported` for other kinds of
            adapters and options; `unexpected-tensor` and `coverage` for keys too many or too few;
            `shape-mismatch` where a rank is not the configuration's.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.folder = reference.folder
        self.config = self._read_config()
        self._check_config()
        self.file = self._open()
        self.loras: dict[str, LoraModule] = {}
        self.plain: dict[str, str] = {}
        for key in sorted(self.file.entries):
            self._sort(key)
        self._check_loras()

    @classmethod
    def open(cls, reference: str | Path | Reference) -> Adapter:
        """Open a folder or hub id."""
        return cls(reference if isinstance(reference, Reference) else resolve(reference))

    @property
    def transposed(self) -> bool:
        """Whether weights of linear layers are stored as `[in, out]` (`Conv1D`)."""
        return bool(self.config.get("fan_in_fan_out"))

    @property
    def ties_weights(self) -> bool:
        """Whether what is tied in the base stays tied."""
        return bool(self.config.get("ensure_weight_tying"))

    def saved_module(self, module: str) -> bool:
        """Whether `modules_to_save` names this module or one around it, as PEFT matches names."""
        wanted = [str(name) for name in self.config.get("modules_to_save") or ()]
        return any(m.endswith(name) for m in _modules([f"{module}."]) for name in wanted)

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / CONFIG_NAME
        try:
            data = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise DeltafoldError(
                "not-a-checkpoint",
                f"{self.folder} is not a LoRA folder: it has no {CONFIG_NAME}.",
                fix="give a folder that PEFT saved; full checkpoints go to `deltafold compress`",
            ) from error
        except (ValueError, RecursionError) as error:
            raise _broken(path, f"is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise _broken(path, "holds no JSON object")
        return data

    def _check_config(self) -> None:
        config = self.config
        kind = config.get("peft_type")
        if kind != "LORA":
            raise self._unsupported(f"its peft_type is {kind!r}, not 'LORA'")
        start = config.get("init_lora_weights")
        if not any(start is known or start == known for known in _STARTS):
            raise self._unsupported(
                f"init_lora_weights={start!r} changes the base's weights before training",
                fix="save it with PEFT's path_initial_model_for_weight_conversion, which makes it an "
                "ordinary LoRA",
            )
        if config.get("bias") not in (None, "none", "all", "lora_only"):
            raise self._unsupported(f"bias={config['bias']!r} is not known")
        for name, value in config.items():
            if name not in _READ and value not in (None, False, 0, "", [], {}):
                raise self._unsupported(f"it uses {name}={json.dumps(value)[:60]}")
        _check_types(config, self.folder / CONFIG_NAME)

    def _open(self) -> SafetensorsFile:
        path = self.folder / WEIGHTS_NAME
        if not path.is_file():
            pickled = (self.folder / "adapter_model.bin").is_file()
            raise DeltafoldError(
                "not-a-checkpoint",
                f"{self.folder} has no {WEIGHTS_NAME}.",
                fix="load the pickled adapter with PEFT and save it again: save_pretrained(FOLDER)"
                if pickled
                else "copy or download the adapter again",
            )
        return SafetensorsFile(path)

    def _sort(self, key: str) -> None:
        rest = key.removeprefix(PREFIX)
        if rest == key:
            raise self._unexpected(key, f"its name does not begin with {PREFIX}")
        for suffix, part in _PARTS.items():
            if rest.endswith(suffix):
                module = self.loras.setdefault(rest.removesuffix(suffix), LoraModule())
                if part in module.keys:
                    raise self._unexpected(key, "its module has two of them")
                module.keys[part] = key
                return
        segments = rest.split(".")
        if any(s.startswith(("lora_", "trainable_tokens", "token_adapter")) for s in segments):
            raise self._unexpected(key, "this part of an adapter is not known")
        name = ".".join(s for s in segments if s not in _WRAPPERS)
        if name in self.plain:
            raise self._unexpected(key, f"{self.plain[name]} stands for the same tensor")
        self.plain[name] = key

    def _check_loras(self) -> None:
        torn = [
            name
            for name, lora in self.loras.items()
            if set(lora.keys) - {"magnitude"} not in ({"a", "b"}, {"embedding_a", "embedding_b"})
            or bool(self.config.get("use_dora")) != (lora.magnitude is not None)
        ]
        if torn:
            raise DeltafoldError(
                "coverage",
                f"{self.folder}: not every module has the factors that it needs.",
                facts=[("incomplete", name_some(torn, len(self.loras)))],
                fix="copy, download or save the adapter again",
            )
        for name, lora in self.loras.items():
            lora.rank, lora.scale = self._rank_and_scale(name)
            found = self.file.entries[lora.a].shape[:1], self.file.entries[lora.b].shape[1:2]
            if found != ((lora.rank,), (lora.rank,)):
                raise DeltafoldError(
                    "shape-mismatch",
                    f"{self.folder}: the factors of {name} have another rank than {CONFIG_NAME} says.",
                    facts=[("expected", lora.rank), ("found", f"A {found[0]}, B {found[1]}")],
                    fix="take both files from the same training run",
                )

    def _rank_and_scale(self, module: str) -> tuple[int, float]:
        config = self.config
        rank = int(_pattern(config.get("rank_pattern") or {}, module, config.get("r", 8)))
        alpha = float(
            _pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
        )
        if rank < 1 or not math.isfinite(alpha):
            raise _broken(self.folder / CONFIG_NAME, f"says rank {rank}, alpha {alpha}")
        return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def check_saved(self, base: Iterable[str]) -> None:
        """Refuse an adapter that lacks a module which it says it saves.

        PEFT takes `modules_to_save` as ends of names, and writes down all that it was told, among them
        names that the model has not: what counts is what the base has.

        Args:
            base: names of the base's tensors.

        Raises:
            DeltafoldError: `coverage`.
        """
        wanted = [str(name) for name in self.config.get("modules_to_save") or ()]
        saved, known = _modules(self.plain), _modules(base)
        gone = [name for name in wanted if not any(m.endswith(name) for m in saved)]
        lost = [name for name in gone if any(m.endswith(name) for m in known)]
        if lost or (wanted and gone == wanted):
            raise DeltafoldError(
                "coverage",
                f"{self.folder}: {CONFIG_NAME} names modules_to_save that {WEIGHTS_NAME} lacks.",
                facts=[("missing", name_some(lost or wanted, len(wanted)))],
                fix="save the adapter again",
            )

    def _unsupported(self, why: str, fix: str = "") -> DeltafoldError:
        return DeltafoldError(
            "engine-unsupported",
            f"{self.folder} cannot be imported: {why}.",
            fix=fix or "merge it into its base with PEFT, and pack the result: deltafold compress",
        )

    def _unexpected(self, key: str, why: str) -> DeltafoldError:
        return DeltafoldError(
            "unexpected-tensor",
            f"{self.folder} has a tensor that an import would lose.",
            facts=[("unexpected", key), ("reason", why)],
            fix="merge it into its base with PEFT, and pack the result: deltafold compress",
        )


def _modules(names: Iterable[str]) -> set[str]:
    """The modules that hold these tensors, and all around them."""
    return {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """As PEFT looks a module up: the first regular expression that ends the module's path."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_types(config: Mapping[str, Any], path: Path) -> None:
    """The options that are computed with have the types that PEFT writes."""
    try:
        _numbers(config.get(name, 8) for name in ("r", "lora_alpha"))
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = config.get(name) or {}
            _numbers(patterns.values())
            for pattern in patterns:
                re.compile(pattern)
        if isinstance(config.get("modules_to_save"), str):
            raise TypeError("modules_to_save is not a list")
        list(config.get("modules_to_save") or ())
    except (TypeError, AttributeError, re.error) as error:
        raise _broken(path, f"is not as PEFT writes it: {error}") from error


def _broken(path: Path, why: str) -> DeltafoldError:
    fix = "copy, download or save the adapter again"
    return DeltafoldError("not-a-checkpoint", f"{path} {why}.", fix=fix)


def _numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{value!r} is not a number")
