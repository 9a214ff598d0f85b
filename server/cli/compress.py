"""`deltafold compress`: a base and a fine-tune in, a delta repo out."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltafold.server.cli.budget import (
    BudgetOptions,
    budget_options,
    dry_text,
    plan_text,
    wanted_evidence,
)
from deltafold.server.cli.calibration import (
    CalibrationOptions,
    calibration_options,
    judge_of,
)
from deltafold.server.cli.output import Output, facts, output_options, quiet_option, size

if TYPE_CHECKING:
    from deltafold.compress import Method, PackReport, Plan, Recipe
    from deltafold.compress.calibration import CalibratedEvidence


@click.command("compress")
@click.argument("base")
@click.argument("variant")
@click.option("-o", "--out", required=True, help="The delta repo to write.")
@click.option(
    "--codec",
    metavar="SPEC",
    help="Codec of matrices, e.g. bitdelta:bits=4,group=128 (the default).",
)
@click.option(
    "--set",
    "sets",
    metavar="'PATTERN=SPEC'",
    multiple=True,
    help="Codec of the tensors whose names match; repeat it, the last match wins.",
)
@click.option(
    "--edit",
    "edits",
    metavar="SPEC",
    multiple=True,
    help="Change the delta before its codec sees it, e.g. scale:by=1.5; PATTERN=SPEC for some "
    "tensors. Repeat it; edits are applied in order.",
)
@click.option("--recipe", metavar="FILE", help="YAML recipe; the options above come on top of it.")
@click.option(
    "--accept",
    metavar="WORD",
    multiple=True,
    help="Let a difference in structure through: new-tensors, missing-tensors, resized or "
    "tokenizer; repeat it for several.",
)
@budget_options
@calibration_options
@click.option(
    "--fit-scales",
    is_flag=True,
    help="Then train the scales until the logits are the fine-tune's; goes with --calibrate.",
)
@click.option(
    "--fit-steps", metavar="N", type=int, default=200, show_default=True, help="Steps of that."
)
@click.option(
    "--fit-lr",
    metavar="RATE",
    type=float,
    default=1e-4,
    show_default=True,
    help="Its first rate, in units of the weights.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing delta.")
@quiet_option
@output_options
@click.pass_obj
def compress(
    output: Output,
    /,
    base: str,
    variant: str,
    out: str,
    codec: str | None,
    sets: tuple[str, ...],
    edits: tuple[str, ...],
    recipe: str | None,
    accept: tuple[str, ...],
    fit_scales: bool,
    fit_steps: int,
    fit_lr: float,
    overwrite: bool,
    dry_run: bool,
    **more: Any,
) -> None:
    """Pack the fine-tune VARIANT as a delta against BASE.

    Both are folders with safetensors weights, or hub ids (org/name, org/name@revision). Every tensor
    is coded, kept exactly, found equal to the base's, or refused. Needs no GPU, and no data but for the
    codecs and edits that `deltafold codecs` marks.

    \b
    deltafold compress Llama-3.1-8B ./sql-ft -o zoo/sql
    deltafold compress Llama-3.1-8B ./sql-ft -o zoo/sql \\
        --codec bitdelta:bits=1 --set 'lm_head*=int:bits=8'
    deltafold compress Llama-3.1-8B ./sql-ft -o archive/sql --codec lossless
    deltafold compress Llama-3.1-8B ./sql-ft -o zoo/sql --codec svd-act --calibrate sql.jsonl
    deltafold compress Llama-3.1-8B ./sql-ft -o zoo/sql \\
        --codec bitdelta --calibrate sql.jsonl --fit-scales
    deltafold compress Llama-3.1-8B ./sql-ft -o zoo/sql --target-size 10%
    """
    budget = BudgetOptions.take(more)
    chosen = budget.applied(read_recipe(codec, sets, recipe, edits), codec)
    options = CalibrationOptions(**more)
    evidence = options.evidence(base, variant, wanted_evidence(chosen))
    words = _command(base, variant, out, codec, sets, edits, recipe, accept, options, budget)
    if fit_scales:
        words = f"{words} {shlex.join(_fit_words(fit_steps, fit_lr))}"
    began = time.monotonic()
    with output.progress() as progress:
        settings: dict[str, Any] = {"accept": accept, "evidence": evidence, "progress": progress}
        measured = settings | {"judge": judge_of(evidence, options.device)}
        if dry_run or (fit_scales and chosen.budget):
            plan = _planning()(base, variant, recipe=chosen, **measured)
            # Scales are fitted to the codecs that were chosen.
            chosen = plan.recipe
        if not dry_run:
            settings |= {
                "recipe": chosen,
                "overwrite": overwrite,
                "command": words,
                "quality": {"calibration": evidence.record()} if evidence else None,
            }
            if fit_scales:
                pack = _fitting(evidence, fit_steps, fit_lr)
            else:
                pack = partial(_packing(), judge=measured["judge"])
            report = pack(base, variant, out, **settings)
    if dry_run:
        output.result(plan.to_json(), dry_text(plan))
        return
    seconds = time.monotonic() - began
    output.result(pack_data(report, seconds), pack_text(report, seconds))


def _packing() -> Callable[..., PackReport]:
    from deltafold.compress import compress_checkpoint

    return compress_checkpoint


def _planning() -> Callable[..., Plan]:
    from deltafold.compress import plan_checkpoint

    return plan_checkpoint


def _fitting(
    evidence: CalibratedEvidence | None, steps: int, lr: float
) -> Callable[..., PackReport]:
    from deltafold.compress import DeltafoldError

    if evidence is None:
        raise DeltafoldError(
            "needs-calibration",
            "--fit-scales compares models on calibration data, and this run has none.",
            fix="give a calibration set: --calibrate prompts.jsonl",
        )
    from deltafold.compress.calibration import LogitFit, compress_and_fit

    return partial(
        compress_and_fit,
        data=evidence.data,
        fit=LogitFit(steps=steps, lr=lr),
        device=evidence.device,
    )


def _fit_words(steps: int, lr: float) -> list[str]:
    words = ["--fit-scales"]
    words += ["--fit-steps", str(steps)] if steps != 200 else []
    words += ["--fit-lr", str(lr)] if lr != 1e-4 else []
    return words


def read_recipe(
    codec: str | None, sets: Sequence[str], recipe: str | None, edits: Sequence[str] = ()
) -> Recipe:
    """The recipe that options and file describe together.

    Raises:
        DeltafoldError: `unknown-codec`, `bad-recipe`, `bad-argument` or `not-found`.
    """
    from deltafold.compress import Recipe, parse_spec
    from deltafold.compress.recipe import parse_edit_for

    chosen = Recipe.from_file(recipe) if recipe else Recipe()
    if codec:
        chosen = replace(chosen, default=parse_spec(codec))
    return replace(
        chosen,
        overrides=(*chosen.overrides, *map(_override, sets)),
        edits=(*chosen.edits, *map(parse_edit_for, edits)),
    )


def _override(text: str) -> tuple[str, Method]:
    from deltafold.compress import DeltafoldError, parse_spec

    pattern, equals, spec = text.partition("=")
    if not (pattern and equals and spec):
        raise DeltafoldError(
            "bad-argument",
            f"--set {text!r} is not of the form PATTERN=SPEC.",
            fix="--set '*norm*=exact'",
        )
    try:
        return pattern, parse_spec(spec)
    except DeltafoldError as error:
        usage = error.fix.removeprefix("--codec ")
        fix = f"--set '{pattern}={usage}'" if usage != error.fix else error.fix
        raise DeltafoldError(error.code, error.message, facts=error.facts, fix=fix) from error


def _command(
    base: str,
    variant: str,
    out: str,
    codec: str | None,
    sets: Sequence[str],
    edits: Sequence[str],
    recipe: str | None,
    accept: Sequence[str],
    calibration: CalibrationOptions,
    budget: BudgetOptions,
) -> str:
    """The command as the model card shows it; of a folder on this machine only the name."""
    words = ["deltafold", "compress", public(base), public(variant), "-o", Path(out).name]
    words += ["--codec", codec] if codec else []
    words += ["--recipe", Path(recipe).name] if recipe else []
    words += [word for text in sets for word in ("--set", text)]
    words += [word for text in edits for word in ("--edit", text)]
    words += [word for text in accept for word in ("--accept", text)]
    words += budget.words()
    words += calibration.words(public)
    return shlex.join(words)


def public(reference: str) -> str:
    """A reference as a model card may show it: of a folder on this machine only the name."""
    folder = Path(reference).expanduser()
    return folder.resolve().name if folder.is_dir() else reference


def pack_data(report: PackReport, seconds: float) -> dict[str, Any]:
    """A packing run's outcome for programs."""
    from deltafold.server.cli.bar import peak_memory

    manifest, totals = report.manifest, report.manifest.totals
    return {
        "out": str(report.out),
        "delta_id": manifest.delta_id,
        "bytes": totals.delta_bytes,
        "variant_bytes": totals.variant_bytes,
        "ratio": totals.ratio,
        "coverage": totals.coverage,
        "counts": {
            "coded": len(manifest.tensors),
            "unchanged": len(manifest.unchanged),
            "absent": len(manifest.absent),
        },
        "accepted": list(manifest.accepted),
        "recipe": manifest.recipe,
        "base": manifest.base.model_dump(),
        "plan": report.plan.to_json() if report.plan else None,
        "quality": manifest.quality,
        "worst": [{"tensor": name, "rel_error": error} for name, error in report.worst()],
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
    }


def pack_text(report: PackReport, seconds: float) -> str:
    """A packing run's outcome for people."""
    from deltafold.server.cli.bar import peak_memory_text

    manifest, totals = report.manifest, report.manifest.totals
    counts = f"{len(manifest.tensors)} coded, {len(manifest.unchanged)} equal to the base's"
    if manifest.absent:
        counts += f", {len(manifest.absent)} absent"
    lines = [
        ("size", f"{size(totals.delta_bytes)}, {totals.ratio:.2%} of {size(totals.variant_bytes)}"),
        ("tensors", counts),
        ("codec", manifest.codec_summary()),
        ("base", f"{manifest.base.name}  ({manifest.base.fingerprint[:23]}...)"),
    ]
    worst = report.worst(1)
    if worst and worst[0][1] > 0:
        lines.append(("largest error", f"{worst[0][1]:.3f} of its delta, {worst[0][0]}"))
    elif manifest.tensors:
        lines.append(("largest error", "0: every tensor comes back bit for bit"))
    if "kl_mean" in manifest.quality:
        figures = manifest.quality
        agreed = f"{figures['top1_agreement']:.2%} same likeliest token"
        lines.append(("KL", f"{figures['kl_mean']:.4g} nats a token; {agreed}"))
    if manifest.accepted:
        lines.append(("accepted", ", ".join(manifest.accepted)))
    lines.append(("took", f"{seconds:.1f} s, peak memory {peak_memory_text()}"))
    text = f"{report.out}: written and verified\n{facts(lines)}"
    return text if report.plan is None else f"{text}\n\nplan\n{plan_text(report.plan)}"
