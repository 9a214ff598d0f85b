"""Models for calibration: from a folder, from tensors, or from a base and a delta.

All go through transformers' own loading, so that tensors which a model renames or fuses arrive where
they belong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deltafold.compress.calibration.data import needs_transformers
from deltafold.compress.checkpoint import Checkpoint, TensorSource
from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.placing import device_named
from deltafold.compress.repo import DeltaRepo, pad_rows


def load_model(
    folder: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """A causal language model from a checkpoint folder, in evaluation mode.

    Raises:
        DeltafoldError: `missing-extra`, `missing-tensor`, or `engine-unsupported` where transformers
            cannot load it.
    """
    return _load(folder, folder, None, device, dtype)


def load_tensors(
    folder: str | Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The same from a configuration folder and all tensors, named as a checkpoint names them."""
    return _load(folder, None, dict(tensors), device, dtype)


def load_source(
    source: TensorSource, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The same from a fine-tune: a checkpoint, or a lossless delta that stands for one."""
    folder = source.reference.folder
    if isinstance(source, Checkpoint):
        return load_model(folder, device=device, dtype=dtype)
    tensors = {name: source.tensor(name) for name in source.names()}
    return load_tensors(folder, tensors, device=device, dtype=dtype)


def load_delta(
    base: Checkpoint,
    repo: DeltaRepo,
    *,
    scale: float = 1.0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The model that a delta stands for; its differences multiplied by `scale`."""
    tensors = decoded_tensors(base, repo, scale=scale)
    return load_tensors(repo.folder, tensors, device=device, dtype=dtype)


def decoded_tensors(
    base: Checkpoint, repo: DeltaRepo, *, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Every tensor of a delta's model: base plus decoded difference in float32, others as stored."""
    tensors, named = {}, repo.named(base)
    for name in repo.variant_names():
        if name not in repo.manifest.tensors:
            tensors[name] = named.tensor(name)
            continue
        # A delta to the dequantised base makes its model on that base alone.
        stored = repo.base_tensor(base, name)
        if stored is not None and not stored.is_floating_point():
            tensors[name] = repo.restored(name, stored)
        else:
            delta = repo.delta(name, stored).mul_(scale)
            padded = pad_rows(stored, tuple(delta.shape))
            tensors[name] = delta if padded is None else delta.add_(padded.to(torch.float32))
    return tensors


def _load(
    config: str | Path,
    folder: str | Path | None,
    tensors: dict[str, torch.Tensor] | None,
    device: str,
    dtype: torch.dtype,
) -> Any:
    where = device_named(device)
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise needs_transformers() from error
    with _quiet():
        try:
            settings = AutoConfig.from_pretrained(config, local_files_only=True)
            loader: Any = AutoModelForCausalLM
            if folder is None:
                # Only the model's own class takes tensors in place of a folder.
                with torch.device("meta"):
                    loader = type(AutoModelForCausalLM.from_config(settings))
            model, info = loader.from_pretrained(
                folder,
                config=settings,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                **({} if tensors is None else {"state_dict": tensors}),
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise DeltafoldError(
                "engine-unsupported",
                f"{config} cannot be loaded as a causal language model.",
                facts=[("reason", str(error).splitlines()[0])],
                fix="calibration needs a text model that transformers knows",
            ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise DeltafoldError(
            "missing-tensor",
            f"{config}: the checkpoint lacks tensors of its model.",
            facts=[("missing", name_some(missing))],
            fix="check that the checkpoint is of a causal language model",
        )
    return model.to(where).eval()


class ParameterMap:
    """Which parameter of a model each tensor of a checkpoint is.

    Args:
        model: as transformers loaded it.
        source: the tensors that it was loaded from.
    """

    def __init__(self, model: torch.nn.Module, source: TensorSource) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._prefix = str(getattr(model, "base_model_prefix", "") or "")
        self._source = source
        self._found: dict[str, str | None] = {}

    def find(self, name: str) -> str | None:
        """The parameter that is this tensor as it stands, or None: fused, split, or no parameter.

        By name, with or without the prefix that transformers puts before a bare model, else by value.
        """
        if name not in self._found:
            self._found[name] = self._by_name(name) or self._by_value(name)
        return self._found[name]

    def parameter(self, name: str) -> torch.nn.Parameter | None:
        """The parameter itself."""
        found = self.find(name)
        return None if found is None else self._parameters[found]

    def _by_name(self, name: str) -> str | None:
        candidates = [name]
        if self._prefix:
            candidates += [f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")]
        shape = self._source.spec(name).shape
        fitting = (c for c in candidates if c in self._parameters)
        return next((c for c in fitting if tuple(self._parameters[c].shape) == shape), None)

    def _by_value(self, name: str) -> str | None:
        shape = self._source.spec(name).shape
        free = self._unnamed.get(shape, []) if shape else []
        if not free:
            return None
        value = self._source.tensor(name)
        equal = [n for n in free if torch.equal(_as(value, self._parameters[n]), self._values(n))]
        return equal[0] if len(equal) == 1 else None

    @cached_property
    def _unnamed(self) -> dict[tuple[int, ...], list[str]]:
        """Parameters that no tensor is called like, by shape."""
        taken = {self._by_name(name) for name in self._source.names()}
        found: dict[tuple[int, ...], list[str]] = {}
        for name, parameter in self._parameters.items():
            if name not in taken:
                found.setdefault(tuple(parameter.shape), []).append(name)
        return found

    def _values(self, name: str) -> torch.Tensor:
        return self._parameters[name].detach()


def _as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.to(like.device, like.dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
