"""From a reference to a running engine: checkpoint, model, deltas."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltafold.compress import Checkpoint, DeltafoldError
from deltafold.compress.fingerprint import digest_source
from deltafold.runtime.deltas import Deltas, Rebuild
from deltafold.runtime.embedded.products import quicken
from deltafold.runtime.gate import GATE
from deltafold.runtime.quantizing import check_quantization, quantize_base
from deltafold.runtime.quiet import quiet
from deltafold.runtime.zoo import check_folder

#: On a CPU, models up to this size in float32 run in float32: most CPUs are no slower at it, and
#: answers are then exact to the last printed digit.
_FLOAT32_BYTES = 2 * 2**30
#: Smaller checkpoints are loaded before anybody could read transformers' progress bar.
_WORTH_A_BAR = 2**30


@dataclass(frozen=True)
class Opened:
    """A loaded base model and the deltas' host that wraps it."""

    model: Any
    deltas: Deltas


def open_model(
    base: str | Path,
    zoo: str | Path | None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    name: str | None = None,
    max_deltas: int | None = None,
    strict: bool = True,
    base_quantization: str | None = None,
    rebuild: Rebuild = "auto",
) -> Opened:
    """Load a base checkpoint with transformers and wrap it.

    Args:
        base: folder or hub id.
        zoo: folder of delta repos, or None for the base alone.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: "auto" or None for the checkpoint's own (float32 for small models on a CPU), else a
            torch dtype or its name.
        name: what the base is served as; its folder or hub name by default.
        max_deltas: most variants in memory.
        strict: refuse to start while a delta of the zoo is broken.
        base_quantization: `nf4` or `int8`: keep the weights of linear layers so; see `quantizing`.
        rebuild: see `Deltas`.

    Raises:
        DeltafoldError: `not-found`, `not-a-checkpoint`, `bad-argument`, `missing-extra`,
            `engine-unsupported`, and what is wrong with a delta.
    """
    need_transformers()
    check_folder(zoo)
    checkpoint = Checkpoint.open(base)
    where = _device(device)
    if base_quantization is not None:
        check_quantization(checkpoint, base_quantization, where)
    with GATE.loading(), quiet(checkpoint.nbytes() < _WORTH_A_BAR):
        model = _generating_class(checkpoint.folder).from_pretrained(
            checkpoint.folder, dtype=_dtype(dtype, checkpoint, where), local_files_only=True
        )
    if base_quantization is not None:
        quantize_base(model, checkpoint, base_quantization)
    model = model.to(where).eval()
    quicken(model)
    deltas = Deltas(
        model,
        checkpoint,
        zoo,
        name=name or checkpoint.reference.name,
        max_deltas=max_deltas,
        strict=strict,
        rebuild=rebuild,
        digests=digest_source(checkpoint),
    )
    return Opened(model, deltas)


def generates(base: str | Path) -> bool:
    """Whether a base was saved as a model that text can be generated with here; True where it does
    not say.
    """
    need_transformers()
    from deltafold.runtime.embedded.plans import named_class
    from deltafold.runtime.embedded.runner import cache_argument

    config, cls = named_class(Checkpoint.open(base).folder)
    if cls is None:
        return True
    pairs = bool(getattr(config, "is_encoder_decoder", False))
    return bool(cls.can_generate()) and (pairs or bool(cache_argument(cls)))


def load_bare(
    checkpoint: Checkpoint,
    cls: Any,
    *,
    device: str,
    dtype: str | torch.dtype | None,
    base_quantization: str | None = None,
) -> tuple[Any, list[str]]:
    """Load a checkpoint as a class that may leave its head out, or have more than it.

    Raises:
        DeltafoldError: as `open_model`.

    Returns:
        The model, in eval mode, and the names of its tensors that the checkpoint does not bring.
    """
    where = _device(device)
    if base_quantization is not None:
        check_quantization(checkpoint, base_quantization, where)
    with GATE.loading(), quiet(checkpoint.nbytes() < _WORTH_A_BAR), _no_report():
        model, info = cls.from_pretrained(
            checkpoint.folder,
            dtype=_dtype(dtype, checkpoint, where),
            local_files_only=True,
            output_loading_info=True,
        )
    if base_quantization is not None:
        quantize_base(model, checkpoint, base_quantization)
    model = model.to(where).eval()
    quicken(model)
    return model, sorted(info["missing_keys"])


def _generating_class(folder: Path) -> Any:
    """What to load a checkpoint as: decoders by the automatic class, models that read something else
    first by the class that they were saved as.
    """
    import transformers as hf

    config = hf.AutoConfig.from_pretrained(folder, local_files_only=True)
    pairs = getattr(config, "is_encoder_decoder", False)
    if not pairs and not any(hasattr(config, n) for n in ("vision_config", "audio_config")):
        return hf.AutoModelForCausalLM
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(hf, name, None)
        if cls is not None and issubclass(cls, hf.GenerationMixin):
            return cls
    return hf.AutoModelForSeq2SeqLM if pairs else hf.AutoModelForCausalLM


def need_transformers() -> None:
    """Raises `missing-extra` where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise DeltafoldError(
            "missing-extra",
            "the embedded engine needs transformers.",
            fix="pip install 'deltafold[hf]'",
        )


@contextmanager
def _no_report() -> Iterator[None]:
    """Without transformers' table of what a checkpoint has too many or too few of."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise DeltafoldError("bad-argument", f"there is no device {device!r}.") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise DeltafoldError(
            "bad-argument", "no CUDA device was found.", fix="--device cpu, or install a CUDA torch"
        )
    return found


def _dtype(
    dtype: str | torch.dtype | None, checkpoint: Checkpoint, device: torch.device
) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        numbers = sum(math.prod(checkpoint.spec(name).shape) for name in checkpoint.names())
        small = device.type == "cpu" and 4 * numbers <= _FLOAT32_BYTES
        return torch.float32 if small else "auto"
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise DeltafoldError("bad-argument", f"there is no dtype {dtype!r} to run a model in.")
    return named
