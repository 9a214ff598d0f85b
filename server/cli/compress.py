"""`deltafold compress`: a base and a fine-tune in, a delta repo out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from deltafold.server.cli.budget import BudgetOptions, budget_options, dry_text, wanted_evidence
from deltafold.server.cli.calibration import (
    CalibrationOptions,
    calibrated,
    calibration_options,
    judge_of,
)
from deltafold.server.cli.command import command_line
from deltafold.server.cli.machine import (
    MachineOptions,
    machine_options,
    prediction_data,
    prediction_text,
)
from deltafold.server.cli.output import Output, output_options, quiet_option
from deltafold.server.cli.packed import pack_data, pack_text
from deltafold.server.cli.recipes import read_recipe, recipe_options

if TYPE_CHECKING:
    from deltafold.compress import PackReport
    from deltafold.compress.calibration import CalibratedEvidence, LogitFit


@click.command("compress")
@click.argument("base")
@click.argument("variant")
@click.option("-o", "--out", required=True, help="The delta repo to write.")
@recipe_options
@click.option(
    "--accept",
    metavar="WORD",
    multiple=True,
    help="Let a difference in structure through: new-tensors, missing-tensors, resized or "
    "tokenizer; repeat it for several.",
)
@click.option(
    "--against",
    type=click.Choice(["original", "dequantized"]),
    default="original",
    show_default=True,
    help="The base as it is, or as it is once quantised; the delta then repairs that too.",
)
@click.option(
    "--base-quantization",
    type=click.Choice(["nf4", "int8"]),
    help="With --against dequantized: how the base will be served.",
)
@budget_options
@calibration_options
@click.option(
    "--fit-scales",
    is_flag=True,
    help="Then train the scales until the logits are the fine-tune's; goes with --calibrate.",
)
@click.option(
    "--fit-terms",
    is_flag=True,
    help="Train instead one factor for each of a tensor's terms, the same for all tensors: two for "
    "shift-scale.",
)
@click.option("--fit-steps", metavar="N", type=int, help="Steps of that; 200 if left out.")
@click.option(
    "--fit-lr",
    metavar="RATE",
    type=float,
    help="Its first rate: of scales in units of the weights, 1e-4 if left out; of factors 0.01.",
)
@machine_options
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
    against: str,
    base_quantization: str | None,
    fit_scales: bool,
    fit_terms: bool,
    fit_steps: int | None,
    fit_lr: float | None,
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
    deltafold compress Llama-3.1-8B ./sql-ft -o zoo/sql --against dequantized \\
        --base-quantization nf4
    """
    from deltafold.compress import compress_checkpoint, plan_checkpoint, predict_checkpoint

    _refuse_half_a_choice(against, base_quantization)
    budget, machine = BudgetOptions.take(more), MachineOptions.take(more)
    chosen = budget.applied(read_recipe(codec, sets, recipe, edits), codec)
    fit = _fit_of(chosen.fit, fit_scales, fit_terms, fit_steps, fit_lr)
    # What is packed; fitting comes on top of it.
    options, chosen = CalibrationOptions.take(more, chosen), replace(chosen, fit=None)
    if dry_run and chosen.budget is None:
        found = predict_checkpoint(
            base,
            variant,
            recipe=chosen,
            accept=accept,
            base_quantization=base_quantization,
            limits=machine.limits(),
            device=more["device"],
            fit=fit is not None,
        )
        output.result(prediction_data(found), prediction_text(found))
        return
    evidence = options.evidence(base, variant, wanted_evidence(chosen))
    judge = judge_of(evidence, options.device)
    pack: Callable[..., PackReport] = partial(
        compress_checkpoint,
        judge=judge,
        base_quantization=base_quantization,
        jobs=machine.threads,
        max_memory=machine.max_memory,
        fresh=machine.fresh,
        device=options.device,
    )
    if fit:
        pack = _fitting(calibrated(evidence), fit, base_quantization)
        # It packs into a folder of its own, which is always fresh.
        pack = partial(pack, jobs=machine.threads, max_memory=machine.max_memory)
    began = time.monotonic()
    with output.progress() as progress:
        settings: dict[str, Any] = {"accept": accept, "evidence": evidence, "progress": progress}
        quality: dict[str, Any] = {}
        if evidence is not None:
            record = evidence.record()
            quality |= record if calibrated(evidence) is None else {"calibration": record}
        plan = None
        if dry_run or (fit and chosen.budget):
            plan = plan_checkpoint(base, variant, recipe=chosen, judge=judge, **settings)
            # Scales are fitted to the codecs that were chosen.
            chosen, quality["plan"] = plan.recipe, plan.evidence()
        if not dry_run:
            report = pack(
                base,
                variant,
                out,
                recipe=chosen,
                overwrite=overwrite,
                command=command_line("compress"),
                quality=quality,
                **settings,
            )
    if dry_run:
        assert plan is not None
        output.result(plan.to_json(), dry_text(plan))
        return
    seconds = time.monotonic() - began
    if plan is not None:
        report = replace(report, plan=plan)
    output.result(pack_data(report, seconds), pack_text(report, seconds))


def _fit_of(
    said: LogitFit | None, scales: bool, terms: bool, steps: int | None, lr: float | None
) -> LogitFit | None:
    """How to fit, if that is asked for: by the options, or else by the recipe's file."""
    from deltafold.compress import DeltafoldError

    if scales and terms:
        raise DeltafoldError(
            "bad-argument", "--fit-scales and --fit-terms train different things: one of the two."
        )
    if not (scales or terms or said):
        return None
    from deltafold.compress.fitting import LogitFit

    fit = said or LogitFit()
    if scales or terms:
        fit = replace(fit, what="scales" if scales else "terms")
    if steps is not None:
        fit = replace(fit, steps=steps)
    return fit if lr is None else replace(fit, lr=lr)


def _fitting(
    evidence: CalibratedEvidence | None, fit: LogitFit, base_quantization: str | None
) -> Callable[..., PackReport]:
    from deltafold.compress import DeltafoldError

    if base_quantization is not None:
        raise DeltafoldError(
            "bad-argument",
            f"--fit-{fit.what} runs the base as it is, not a quantised one.",
            fix=f"leave --against dequantized out, or --fit-{fit.what}",
        )
    if evidence is None:
        raise DeltafoldError(
            "needs-calibration",
            f"--fit-{fit.what} compares models on calibration data, and this run has none.",
            fix="give a calibration set: --calibrate prompts.jsonl",
        )
    from deltafold.compress.calibration import compress_and_fit

    return partial(
        compress_and_fit,
        data=evidence.data,
        fit=fit,
        device=evidence.device,
    )


def _refuse_half_a_choice(against: str, base_quantization: str | None) -> None:
    if (against == "dequantized") == (base_quantization is not None):
        return
    from deltafold.compress import DeltafoldError

    if base_quantization is None:
        raise DeltafoldError(
            "bad-argument",
            "--against dequantized does not say how the base is quantised.",
            fix="add --base-quantization nf4 or int8",
        )
    raise DeltafoldError(
        "bad-argument",
        "a delta against the original base fits any quantisation of it.",
        fix="leave --base-quantization out, or add --against dequantized",
    )
