"""A PEFT LoRA as a delta: its factors become `lowrank` terms, all else is stored bit for bit."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from deltafold.compress import dtypes
from deltafold.compress.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, LoraModule
from deltafold.compress.checkpoint import Checkpoint, Spec
from deltafold.compress.companions import vocabulary
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.fingerprint import cache_folder, digest_source, fingerprint
from deltafold.compress.lora_folder import (
    adapted_names,
    companions_of,
    own_class,
    own_companions,
    spellings,
)
from deltafold.compress.methods import LosslessMethod
from deltafold.compress.naming import NamedBase
from deltafold.compress.pipeline import Job, PackReport, pack
from deltafold.compress.progress import OnProgress, ignore
from deltafold.compress.recipe import Recipe
from deltafold.compress.terms import Codes, Context, Encoded, LowRank, rows_and_columns

#: What DoRA's rescaling adds is coded in stages until it is right to this share of the tensor's
#: largest weight; two are usual.
_FINE_ENOUGH: Final = 2.0**-20
_MOST_STAGES: Final = 4
_STAGE: Final = Codes(bits=8, group=128, scale_format="float32")
#: What the manifest records as its recipe.
_RECORD: Final = {"default": "lora", "vectors": "lossless", "tensors": {}}


def import_lora(
    base: str | Path,
    lora: str | Path,
    out: str | Path,
    *,
    accept: Collection[str] = (),
    overwrite: bool = False,
    command: str = "",
    progress: OnProgress = ignore,
) -> PackReport:
    """Write a PEFT LoRA as a delta repo.

    The factors are kept in float32 with the scale folded into one of them, so nothing is lost.
    `modules_to_save` and biases are stored bit for bit. DoRA also rescales the base's own rows: what
    that adds is stored in 16 bits a weight, finer than float32 can tell beside the weight itself.

    Args:
        base: folder or hub id of the base checkpoint.
        lora: folder or hub id of the adapter. A `config.json` in it that names another class than the
            base's is the fine-tune's own: it says what a head in `modules_to_save` belongs to.
        out: the delta repo to write; nothing stands there until it is whole and verified.
        accept: `new-tensors` (meant where there is such a `config.json`) and `tokenizer`, as in
            `structure.ACCEPTABLE`.
        overwrite: replace an existing `out`.
        command: recorded in the manifest and card.
        progress: called after every tensor.

    Raises:
        DeltafoldError: whatever is wrong, before anything stands under `out`.
    """
    adapter, checkpoint = Adapter.open(lora), Checkpoint.open(base)
    source = NamedBase(checkpoint, adapted_names(adapter, checkpoint))
    target = LoraSource(adapter, source)
    head = ["new-tensors"] if own_class(source.folder, adapter.folder) else []
    job = Job(
        source,
        target,
        companions_of(source.folder, adapter.folder),
        Recipe(default=LosslessMethod()),
        frozenset([*accept, *head]),
        command,
        progress,
        given=target.given,
        record=_RECORD,
    )
    return pack(job, out, overwrite=overwrite)


def cached_lora(base: Checkpoint, lora: Path) -> Path:
    """The delta repo of a LoRA folder, imported into the cache folder on first sight.

    Its place depends on the content of the base and of the whole adapter, so a LoRA that is replaced
    is imported anew. Its folder has the LoRA's name.

    Raises:
        DeltafoldError: what `import_lora` raises.
    """
    key = hashlib.sha256(fingerprint(digest_source(base)).encode())
    for name in (CONFIG_NAME, WEIGHTS_NAME, "config.json", *sorted(own_companions(lora))):
        if (lora / name).is_file():
            with (lora / name).open("rb") as file:
                key.update(f"\n{name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    out = cache_folder() / "lora" / key.hexdigest() / lora.name
    while not out.is_dir():
        try:
            import_lora(base.folder, lora, out)
        except DeltafoldError as error:
            if error.code not in ("busy", "exists"):
                raise
            # Another server is at it, or has just been: what it writes is what is wanted.
            time.sleep(0.1)
    return out


@dataclass(frozen=True, slots=True)
class _Change:
    """What the adapter does to one tensor: a new value, a low-rank step, or the step on the value."""

    lora: LoraModule | None = None
    whole: str | None = None


class LoraSource:
    """The fine-tune that a LoRA and its base make, merged tensor by tensor when asked for.

    Merged tensors have the base's dtype; tensors that the adapter stores whole keep their own.

    Raises:
        DeltafoldError: `unexpected-tensor` where a LoRA's module has no tensor in the base;
            `shape-mismatch`; `engine-unsupported` where the base's tensor is not floating point, or
            is tied to another that the adapter leaves alone.
    """

    def __init__(self, adapter: Adapter, base: NamedBase) -> None:
        self.reference = adapter.reference
        self._adapter, self._base = adapter, base
        self._digests = digest_source(base)
        self._changes: dict[str, _Change] = {}
        adapter.check_saved(base.names())
        for path, key in adapter.plain.items():
            name = self._find(path)
            if self._is_second_copy(name, key):
                continue
            self._refuse_resized(name, key)
            if not self._same_as_base(name, key):
                self._refuse_tied(name, adapter.saved_module(path.rpartition(".")[0]))
                self._add(name, whole=key)
        for path, lora in adapter.loras.items():
            name = self._find(f"{path}.weight")
            if name not in base:
                raise self._no_such_module(path)
            self._refuse_tied(name, lora.embedding)
            self._add(name, lora=lora)
            self._check_shapes(name, lora)

    def names(self) -> list[str]:
        """Sorted tensor names: the base's, and what the adapter adds."""
        return sorted({*self._base.names(), *self._changes})

    def spec(self, name: str) -> Spec:
        """Dtype and shape."""
        change = self._changes.get(name)
        if change is None or change.whole is None:
            return self._base.spec(name)
        entry = self._adapter.file.entries[change.whole]
        return Spec(entry.dtype, entry.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """The merged tensor in its own dtype."""
        change = self._changes.get(name)
        if change is None:
            return self._base.tensor(name)
        file = self._adapter.file
        start = self._base.tensor(name) if change.whole is None else file.tensor(change.whole)
        if change.lora is None:
            return start
        a, b = self._factors(name, change.lora)
        merged = start.to(torch.float32) + (b @ a).reshape(start.shape)
        if change.lora.magnitude is not None:
            merged = merged * self._rescaling(merged, change.lora)
        return merged.to(start.dtype)

    def sha256(self, name: str) -> str:
        """Hex digest of the merged tensor's bytes."""
        if name not in self._changes:
            return self._digests[name].sha256
        return dtypes.sha256(self.tensor(name))

    def given(self, name: str) -> tuple[list[Encoded], torch.Tensor] | None:
        """The terms of a tensor's low-rank step and its float32 delta; None where there is none."""
        change = self._changes.get(name)
        if change is None or change.lora is None or change.whole is not None:
            return None
        a, b = self._factors(name, change.lora)
        if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
            raise DeltafoldError(
                "not-finite",
                f"{self.reference.folder}: the factors of {name} have NaN or infinite entries.",
                fix="check the adapter's training",
            )
        if change.lora.magnitude is not None:
            return self._rescaled(name, change.lora, a, b)
        delta = _product(a, b).reshape(self.spec(name).shape)
        return ([_lowrank(a, b)], delta) if bool(delta.any()) else None

    def _rescaled(
        self, name: str, lora: LoraModule, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[list[Encoded], torch.Tensor]:
        """DoRA: `s (W + b a)` is `W` plus the factors scaled by s, plus `(s - 1) W` in codes.

        Each stage of codes holds what those before it missed, to eight bits more.
        """
        base = self._base.tensor(name).to(torch.float32)
        merged = base + (b @ a).reshape(base.shape)
        rescaling = self._rescaling(merged, lora)
        delta = merged * rescaling - base
        if not bool(torch.isfinite(delta).all()):
            raise DeltafoldError(
                "not-finite",
                f"{self.reference.folder}: the magnitudes of {name} give NaN or infinite weights.",
                fix="check the adapter's training",
            )
        if self._transposed(lora):
            a = (a * rescaling).contiguous()
        else:
            b = (b * rescaling.reshape(-1, 1)).contiguous()
        encoded, context = [_lowrank(a, b)], Context(name, base)
        rest = delta - _product(a, b).reshape(base.shape)
        limit = _FINE_ENOUGH * (merged * rescaling).abs().max()
        while len(encoded) <= _MOST_STAGES and bool(rest.abs().max() > limit):
            stage = _STAGE.encode(rest, context)
            rest = rest - stage.term.decode(stage.parts, tuple(base.shape), context)
            encoded.append(stage)
        return encoded, delta

    def _rescaling(self, merged: torch.Tensor, lora: LoraModule) -> torch.Tensor:
        """DoRA's `m / ||W||`, shaped to multiply `merged` (float32).

        The norm goes over all inputs of an output (Liu et al., arXiv 2402.09353, section 4.1).
        """
        assert lora.magnitude is not None
        magnitude = self._adapter.file.tensor(lora.magnitude).to(torch.float32).reshape(-1)
        norm: torch.Tensor
        if self._transposed(lora):
            norm = torch.linalg.vector_norm(merged, dim=0)
            return magnitude / norm
        norm = torch.linalg.vector_norm(merged.flatten(1), dim=1)
        return (magnitude / norm).reshape(-1, *[1] * (merged.dim() - 1))

    def _factors(self, name: str, lora: LoraModule) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 `a [r, M]` and `b [N, r]` with `b a` the step of the tensor as it is stored."""
        file = self._adapter.file
        a = file.tensor(lora.a).to(torch.float32).flatten(1)
        b = file.tensor(lora.b).to(torch.float32).flatten(1) * lora.scale
        if self._transposed(lora):
            a, b = b.T, a.T
        rows, columns = rows_and_columns(self.spec(name).shape)
        if lora.rank > min(rows, columns):
            # The format stores no more factors than the matrix has rows or columns.
            product = (b.double() @ a.double()).to(torch.float32)
            narrow = rows <= columns
            a, b = (product, torch.eye(rows)) if narrow else (torch.eye(columns), product)
        return a.contiguous(), b.contiguous()

    def _transposed(self, lora: LoraModule) -> bool:
        return lora.embedding or self._adapter.transposed

    def _find(self, path: str) -> str:
        """The base's name of a tensor: the path, or the path with `model.` added or taken away."""
        return next((name for name in spellings(path) if name in self._base), path)

    def _add(self, name: str, lora: LoraModule | None = None, whole: str | None = None) -> None:
        before = self._changes.get(name, _Change())
        if (lora and before.lora) or (whole and before.whole):
            raise DeltafoldError(
                "unexpected-tensor",
                f"{self.reference.folder} changes {name} twice.",
                fix="save the adapter again",
            )
        self._changes[name] = _Change(lora or before.lora, whole or before.whole)

    def _same_as_base(self, name: str, key: str) -> bool:
        file = self._adapter.file
        if name not in self._base or self._base.spec(name) != (
            file.entries[key].dtype,
            file.entries[key].shape,
        ):
            return False
        return file.sha256(key) == self._digests[name].sha256

    def _is_second_copy(self, name: str, key: str) -> bool:
        """Whether PEFT has saved a table that it kept tied once more, under its output layer's name."""
        file, plain = self._adapter.file, self._adapter.plain
        if name in self._base or not self._adapter.ties_weights:
            return False
        tables = [k for p, k in plain.items() if _is_tied_table(self._base, self._find(p))]
        return any(file.sha256(k) == file.sha256(key) for k in tables)

    def _check_shapes(self, name: str, lora: LoraModule) -> None:
        spec, entries = self.spec(name), self._adapter.file.entries
        if spec.dtype not in dtypes.FLOATS or len(spec.shape) < 2:
            raise DeltafoldError(
                "engine-unsupported",
                f"{name} is {spec.dtype} {list(spec.shape)}: no low-rank step can be added to it.",
                fix="import against the base in its 16-bit or 32-bit form",
            )
        rows, columns = rows_and_columns(spec.shape)
        into, out = (rows, columns) if self._transposed(lora) else (columns, rows)
        a, b = entries[lora.a].shape, entries[lora.b].shape
        sound = min(len(a), len(b)) >= 2
        sound = sound and (math.prod(a[1:]), math.prod(b[1:]), b[0]) == (into, lora.rank, out)
        sound = sound and not (self._transposed(lora) and len(spec.shape) != 2)
        if lora.magnitude is not None:
            sound = sound and math.prod(entries[lora.magnitude].shape) == out
        if not sound:
            raise DeltafoldError(
                "shape-mismatch",
                f"the factors of {name} do not fit the base's tensor.",
                facts=[
                    ("base", f"{list(spec.shape)}  {self._base.reference.name}"),
                    ("factors", f"A {list(a)}, B {list(b)}  {self.reference.name}"),
                ],
                fix="check that this adapter was made for this base",
            )

    def _refuse_resized(self, name: str, key: str) -> None:
        """The configuration is the base's, and would not fit a table with other rows."""
        shape = self._adapter.file.entries[key].shape
        if name in self._base and self._base.spec(name).shape != shape:
            raise DeltafoldError(
                "shape-mismatch",
                f"{name} has another shape in the adapter than in the base.",
                facts=[
                    ("base", f"{list(self._base.spec(name).shape)}  {self._base.reference.name}"),
                    ("adapter", f"{list(shape)}  {self.reference.name}"),
                ],
                fix="if rows were added on purpose, merge it with PEFT, save the model, and pack "
                "that: deltafold compress --accept resized",
            )

    def _refuse_tied(self, name: str, own_copy: bool) -> None:
        """PEFT unties a tied embedding that it adapts; a delta of the one tensor would move both."""
        if not own_copy or self._adapter.ties_weights or not _is_tied_table(self._base, name):
            return
        raise DeltafoldError(
            "engine-unsupported",
            f"{name} is tied to the output layer in the base, which this adapter leaves as it was.",
            fix="merge it with PEFT into an untied model, and pack that: deltafold compress "
            "--accept new-tensors",
        )

    def _no_such_module(self, path: str) -> DeltafoldError:
        return DeltafoldError(
            "unexpected-tensor",
            f"{self.reference.folder} adapts a module that the base lacks.",
            facts=[("module", path), ("base", self._base.reference.name)],
            fix="check that this adapter was made for this base; if transformers calls the base's "
            "tensors otherwise, merge the adapter with PEFT, save the model, and pack that: "
            "deltafold compress",
        )


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (b.double() @ a.double()).to(torch.float32)


def _lowrank(a: torch.Tensor, b: torch.Tensor) -> Encoded:
    return Encoded(LowRank(rank=a.shape[0], factor_format="float32"), {"a": a, "b": b})


def _is_tied_table(base: NamedBase, name: str) -> bool:
    """Whether a tensor is a vocabulary's table in a base that ties its tables."""
    words, tied = vocabulary(base.folder)
    shape = base.spec(name).shape if name in base else ()
    return tied is True and len(shape) == 2 and shape[0] == words
