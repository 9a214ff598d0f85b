"""`deltafold compress`: a base and a fine-tune in, a delta repo out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from deltafold.server.cli.calibration import CalibrationOptions, calibration_options
from deltafold.server.cli.command import command_line
from deltafold.server.cli.output import Output, facts, output_options, quiet_option, size

if TYPE_CHECKING:
    from deltafold.compress import Manifest, Method, PackReport, Recipe
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
    against: str,
    base_quantization: str | None,
    fit_scales: bool,
    fit_steps: int,
    fit_lr: float,
    overwrite: bool,
    **calibration: Any,
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
    deltafold compress Llama-3.1-8B ./sql-ft -o zoo/sql --against dequantized \\
        --base-quantization nf4
    """
    from deltafold.compress import compress_checkpoint

    _refuse_half_a_choice(against, base_quantization)
    chosen = read_recipe(codec, sets, recipe, edits)
    evidence = CalibrationOptions(**calibration).evidence(base, variant, chosen.needs())
    pack: Callable[..., PackReport] = partial(
        compress_checkpoint, base_quantization=base_quantization
    )
    if fit_scales:
        pack = _fitting(evidence, fit_steps, fit_lr, base_quantization)
    began = time.monotonic()
    with output.progress() as progress:
        report = pack(
            base,
            variant,
            out,
            recipe=chosen,
            accept=accept,
            overwrite=overwrite,
            command=command_line("compress"),
            evidence=evidence,
            quality={"calibration": evidence.record()} if evidence else None,
            progress=progress,
        )
    seconds = time.monotonic() - began
    output.result(pack_data(report, seconds), pack_text(report, seconds))


def _fitting(
    evidence: CalibratedEvidence | None, steps: int, lr: float, base_quantization: str | None
) -> Callable[..., PackReport]:
    from deltafold.compress import DeltafoldError

    if base_quantization is not None:
        raise DeltafoldError(
            "bad-argument",
            "--fit-scales runs the base as it is, not a quantised one.",
            fix="leave --against dequantized out, or --fit-scales",
        )
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
        "base_quantization": quantization_data(manifest),
        "base_names": names_data(manifest),
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
    quantization = quantization_data(manifest)
    if quantization:
        lines.append(("against", against_text(quantization)))
    if manifest.base_names is not None:
        lines.append(("names", manifest.base_names.text()))
    worst = report.worst(1)
    if worst and worst[0][1] > 0:
        lines.append(("largest error", f"{worst[0][1]:.3f} of its delta, {worst[0][0]}"))
    elif manifest.tensors:
        lines.append(("largest error", "0: every tensor comes back bit for bit"))
    if manifest.accepted:
        lines.append(("accepted", ", ".join(manifest.accepted)))
    lines.append(("took", f"{seconds:.1f} s, peak memory {peak_memory_text()}"))
    return f"{report.out}: written and verified\n{facts(lines)}"


def quantization_data(manifest: Manifest) -> dict[str, Any] | None:
    """What a delta's base must run as, for programs; None where that is free."""
    quantization = manifest.base_quantization
    return None if quantization is None else quantization.model_dump(mode="json")


def names_data(manifest: Manifest) -> dict[str, str] | None:
    """How the fine-tune calls the base's tensors, for programs; None where it calls them the same."""
    scheme = manifest.base_names
    return None if scheme is None else scheme.model_dump(mode="json")


def against_text(quantization: Mapping[str, Any]) -> str:
    """What a delta was taken against, where it is not the base itself."""
    count = len(quantization["tensors"])
    return f"the base dequantised from {quantization['method']} ({count} tensors)"
