"""A delta as a PEFT LoRA folder, for servers that know only those.

Matrices become factors of a chosen rank; a delta that is one `lowrank` term keeps its own factors.
Tables, norms and other small modules go to `modules_to_save`, biases of adapted layers beside them.
What an adapter cannot hold is refused until the user drops it by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch

from deltafold.compress import dtypes
from deltafold.compress.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from deltafold.compress.checkpoint import Checkpoint
from deltafold.compress.companions import copy_files, is_tokenizer_file, vocabulary
from deltafold.compress.differences import difference
from deltafold.compress.errors import DeltafoldError, name_some
from deltafold.compress.experts import of_experts
from deltafold.compress.fingerprint import digest_source
from deltafold.compress.manifest import TensorEntry
from deltafold.compress.naming import NamedBase
from deltafold.compress.progress import OnProgress, Progress, ignore
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.restore import own_companions
from deltafold.compress.safetensors_file import write_file
from deltafold.compress.staging import Staging
from deltafold.compress.terms import LowRank
from deltafold.compress.terms.lowrank import truncated_svd
from deltafold.compress.verify import check_coverage

#: Names of the table and the output layer that PEFT keeps tied (`EMBEDDING_LAYER_NAMES`).
_TABLE, _HEAD = "embed_tokens", "lm_head"

Kind = Literal["lora", "saved", "bias", "dropped"]


@dataclass(frozen=True, slots=True)
class Exported:
    """What became of one tensor's delta.

    Attributes:
        tensor: its name.
        kind: `lora` factors, `saved` whole, a `bias` beside factors, or `dropped`.
        rank: of the factors; 0 where there are none.
        norm: Frobenius norm of the delta.
        missed: Frobenius norm of what the adapter does not hold.
    """

    tensor: str
    kind: Kind
    rank: int
    norm: float
    missed: float

    @property
    def rel_error(self) -> float:
        """`missed` over `norm`."""
        return self.missed / self.norm if self.norm > 0 else 0.0


@dataclass(frozen=True)
class ExportReport:
    """The outcome, a record a tensor that differs from the base."""

    out: Path
    rank: int
    nbytes: int
    tensors: list[Exported] = field(default_factory=list)

    @property
    def rel_error(self) -> float:
        """Of the whole delta: what is missed over what there is."""
        norm = math.hypot(*(t.norm for t in self.tensors))
        return math.hypot(*(t.missed for t in self.tensors)) / norm if norm > 0 else 0.0

    def of(self, kind: Kind) -> list[str]:
        """Names of the tensors of one kind."""
        return [t.tensor for t in self.tensors if t.kind == kind]


def export_peft(
    delta: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int = 16,
    drop: Collection[str] = (),
    overwrite: bool = False,
    progress: OnProgress = ignore,
) -> ExportReport:
    """Write a delta as a PEFT LoRA folder.

    Args:
        delta: folder or hub id of the delta repo.
        base: folder or hub id of its base.
        out: the folder to write.
        rank: most factors of a matrix; deltas that are one `lowrank` term keep theirs.
        drop: shell patterns of tensors to leave out; they stay as in the base.
        overwrite: replace an existing `out`.
        progress: called after every tensor.

    Raises:
        DeltafoldError: `bad-argument`; `engine-unsupported` with the tensors that an adapter cannot
            hold; what is wrong with delta or base; all of it before `out` exists.
    """
    if rank < 1:
        raise DeltafoldError("bad-argument", f"the rank must be at least 1, not {rank}.")
    repo, source = DeltaRepo.open(delta), Checkpoint.open(base)
    digests = digest_source(source)
    repo.check_base(digests, given=source.reference.name)
    check_coverage(repo, digests)
    run = _Run(repo, repo.named(source), rank, _kinds(repo, source, drop))
    with Staging(Path(out), overwrite=overwrite, inputs=(source.folder, repo.folder)) as staging:
        for done, name in enumerate(run.kinds, 1):
            run.tensor(name)
            progress(Progress("export", name, done, len(run.kinds), repo.entry(name).bytes))
        write_file(staging.folder / WEIGHTS_NAME, run.tensors, {"format": "pt"})
        config = json.dumps(run.config(), indent=2, sort_keys=True) + "\n"
        (staging.folder / CONFIG_NAME).write_text(config, "utf-8")
        own = own_companions(repo).items()
        copy_files({n: p for n, p in own if is_tokenizer_file(n)}, staging.folder)
        staging.publish()
    nbytes = sum(t.numel() * t.element_size() for t in run.tensors.values())
    return ExportReport(Path(out), rank, nbytes, run.report)


@dataclass
class _Run:
    """One export: the choices, and what has come of them so far."""

    repo: DeltaRepo
    source: NamedBase
    rank: int
    kinds: Mapping[str, Kind]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    report: list[Exported] = field(default_factory=list)

    def __post_init__(self) -> None:
        matrices = [n for n, kind in self.kinds.items() if kind == "lora"]
        self.transposed = _transposed(self.source, matrices)

    def tensor(self, name: str) -> None:
        kind, base = self.kinds[name], self.repo.base_tensor(self.source.checkpoint, name)
        # An adapter's base is not quantised.
        delta = difference(self.repo, self.source.checkpoint, name)
        norm, missed, rank = _norm(delta), 0.0, 0
        module, _, attribute = name.rpartition(".")
        if kind == "lora":
            a, b = self._factors(name, delta)
            rank = self.ranks[module] = a.shape[0]
            missed = _norm(delta - b @ a)
            if self.transposed:
                a, b = b.T, a.T
            self.tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous()
            self.tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous()
        elif kind == "saved":
            self._save(module)
        elif kind == "bias":
            key = f"{PREFIX}{module}.base_layer.{attribute}"
            self.tensors[key] = self.repo.restored(name, base)
        else:
            missed = norm
        self.report.append(Exported(name, kind, rank, norm, missed))

    def config(self) -> dict[str, Any]:
        """`adapter_config.json`: alpha is the rank everywhere, so every scale is 1."""
        odd = {module: rank for module, rank in sorted(self.ranks.items()) if rank != self.rank}
        saved = sorted({n.rpartition(".")[0] for n, kind in self.kinds.items() if kind == "saved"})
        return {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": self.repo.manifest.base.name,
            "revision": self.repo.manifest.base.revision,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "rank_pattern": odd,
            "alpha_pattern": odd,
            "target_modules": sorted(self.ranks),
            "modules_to_save": saved or None,
            "fan_in_fan_out": self.transposed,
            "bias": "all" if "bias" in self.kinds.values() else "none",
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
            **(
                {"ensure_weight_tying": True} if saved and vocabulary(self.source.folder)[1] else {}
            ),
        }

    def _factors(self, name: str, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 `a [r, M]` and `b [N, r]`."""
        parts = self.repo.parts(name)
        kept = name not in self.repo.quantised
        if kept and len(parts) == 1 and isinstance(parts[0].term, LowRank):
            return parts[0].term.factors(parts[0].parts)
        rank = max(min(self.rank, *delta.shape), 1)
        left, singular, right = truncated_svd(delta, rank)
        root = singular.sqrt()
        return root.unsqueeze(1) * right, left * root

    def _save(self, module: str) -> None:
        """All tensors of a module: a wrapper of PEFT's holds the whole module."""
        for name in _tensors_of(module, self.source):
            coded = self.kinds.get(name) == "saved"
            base = self.repo.base_tensor(self.source.checkpoint, name)
            value = self.repo.restored(name, base) if coded else self.source.tensor(name)
            self.tensors[PREFIX + name] = value
            if name.endswith(f".{_TABLE}.weight") and vocabulary(self.source.folder)[1]:
                # PEFT saves a table that it keeps tied under both names, and asks for both.
                self.tensors.setdefault(f"{PREFIX}{_HEAD}.weight", value)


def _kinds(repo: DeltaRepo, source: Checkpoint, drop: Collection[str]) -> dict[str, Kind]:
    """What becomes of each tensor that differs from the base's."""
    names = sorted(repo.manifest.tensors)
    unused = [p for p in drop if not any(fnmatchcase(n, p) for n in names)]
    if unused:
        raise DeltafoldError(
            "bad-argument",
            f"--drop {unused[0]!r} matches no tensor that differs from the base's.",
            facts=[("tensors", name_some(names, len(names)))],
            fix="a pattern is matched with the whole name: begin or end it with *",
        )
    kept = [n for n in names if not any(fnmatchcase(n, p) for p in drop)]
    words = vocabulary(source.folder)[0]
    lora = {n for n in kept if _is_linear(repo.entry(n), n, words)}
    kinds: dict[str, Kind] = {}
    for name in names:
        module = name.rpartition(".")[0]
        # A layer that is no LoRA target cannot have its bias trained by one either.
        beside = f"{module}.weight"
        if name in lora:
            kinds[name] = "lora"
        elif name not in kept:
            kinds[name] = "dropped"
        elif beside in lora and name != beside:
            kinds[name] = "bias"
        else:
            kinds[name] = "saved"
    _refuse(repo, kinds, of_experts(repo.named(source)) | _lost_ties(repo, source))
    return kinds


def _is_linear(entry: TensorEntry, name: str, words: int | None) -> bool:
    """Whether a tensor is, by name and shape, the weight of a linear layer and no table.

    Tables are told by their rows (the vocabulary's) or their name. An output layer looks the same;
    saved whole, it is right in either case.
    """
    module, _, attribute = name.rpartition(".")
    last = module.rpartition(".")[2]
    return (
        attribute == "weight"
        and len(entry.shape) == 2
        and entry.dtype in dtypes.FLOATS
        and min(entry.shape) > 0
        and entry.shape[0] != words
        and "emb" not in last
        and last not in ("wte", "wpe")
    )


def _lost_ties(repo: DeltaRepo, source: Checkpoint) -> set[str]:
    """Tables of tokens whose output layer PEFT would leave as it was: it ties them by name."""
    words, tied = vocabulary(source.folder)
    shapes = {n: entry.shape for n, entry in repo.manifest.tensors.items()}
    tables = {n for n, shape in shapes.items() if len(shape) == 2 and shape[0] == words}
    return {n for n in tables if n.split(".")[-2] not in (_TABLE, _HEAD)} if tied else set()


def _refuse(repo: DeltaRepo, kinds: Mapping[str, Kind], strange: Collection[str]) -> None:
    """What PEFT has no place for: new, resized or absent tensors, bare parameters; experts and
    routers, which are no linear layers in the model that it adapts; ties that it does not know.
    """
    kept = [n for n, kind in kinds.items() if kind != "dropped"]
    lost = [n for n in kept if n in strange or not _fits(repo, n, kinds[n])]
    if lost or repo.manifest.absent:
        raise DeltafoldError(
            "engine-unsupported",
            f"{repo.folder} changes tensors that a LoRA folder cannot hold.",
            facts=[("no place for", name_some([*lost, *repo.manifest.absent], len(kinds), 12))],
            fix=f"leave them out, which changes the model: --drop '{lost[0]}'; or --to hf"
            if lost
            else "write a full checkpoint: --to hf",
        )


def _fits(repo: DeltaRepo, name: str, kind: Kind) -> bool:
    entry = repo.entry(name)
    module, _, attribute = name.rpartition(".")
    ours = entry.base_shape == entry.shape and name not in (repo.manifest.untied or {})
    named = attribute in (("bias",) if kind == "bias" else ("weight", "bias"))
    return ours and bool(module) and named


def _transposed(source: NamedBase, names: Collection[str]) -> bool:
    """Whether the layers store `[in, out]`: their biases then have a column's length, not a row's."""
    found: dict[bool, str] = {}
    for name in names:
        bias = f"{name.removesuffix('weight')}bias"
        rows, columns = source.spec(name).shape
        if bias in source and rows != columns:
            found[source.spec(bias).shape == (columns,)] = name
    if len(found) > 1:
        raise DeltafoldError(
            "engine-unsupported",
            "the base stores some weights as [out, in] and some as [in, out].",
            facts=[("for example", f"{found[False]}, {found[True]}")],
            fix="drop one kind with --drop, or write a full checkpoint: --to hf",
        )
    return True in found


def _tensors_of(module: str, source: NamedBase) -> list[str]:
    return [name for name in source.names() if name.rpartition(".")[0] == module]


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
