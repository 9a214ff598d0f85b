"""The options of commands that run a model on calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from deltafold.compress.fitting import CalibrationInputs
from deltafold.server.cli.options import F, add_options

if TYPE_CHECKING:
    from deltafold.compress import Recipe
    from deltafold.compress.calibration import CalibratedEvidence, CalibratedJudge
    from deltafold.compress.evidence import Need
    from deltafold.compress.references import ReferenceEvidence

_ROWS, _LENGTH = 64, 512


def calibration_options(command: F) -> F:
    """Decorator: add `--calibrate` and its companions; `CalibrationOptions` takes their values."""
    options = [
        click.option(
            "--calibrate",
            "file",
            metavar="FILE",
            help="Examples for codecs and edits that look at the running fine-tune: .jsonl with text; "
            "prompt and completion; messages; or input_ids. Or a .txt file.",
        ),
        click.option(
            "--calibrate-rows",
            "rows",
            metavar="N",
            type=int,
            help=f"Most rows of it that are used; {_ROWS} if left out.",
        ),
        click.option(
            "--calibrate-length",
            "length",
            metavar="N",
            type=int,
            help=f"Most tokens of a row; {_LENGTH} if left out.",
        ),
        click.option(
            "--reference",
            "references",
            metavar="ROLE=MODEL",
            multiple=True,
            help="Another checkpoint for codecs and edits that look at one; ROLE is aligned, "
            "unaligned, or task: another fine-tune, of which there may be several.",
        ),
        click.option(
            "--safe",
            metavar="FILE",
            help="Harmful prompts with safe answers, for safe-delta and irr, which look at the aligned "
            "model on them: the base, or --reference aligned.",
        ),
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            help="Where calibration runs the model, and where codecs run whose cost is arithmetic "
            "(see `deltafold codecs`); the others stay on the CPU.",
        ),
    ]
    return add_options(command, options)


@dataclass(frozen=True)
class CalibrationOptions:
    """What `calibration_options` were given.

    Attributes:
        file: the calibration file, or None.
        rows: most rows.
        length: most tokens of a row.
        references: `ROLE=MODEL`.
        safe: a file of safe answers, or None.
        device: where the model runs, and codecs whose cost is arithmetic.
    """

    file: str | None = None
    rows: int = _ROWS
    length: int = _LENGTH
    references: tuple[str, ...] = ()
    safe: str | None = None
    device: str = "cpu"

    @classmethod
    def take(cls, given: dict[str, Any], recipe: Recipe) -> CalibrationOptions:
        """A command's arguments, which come before what the recipe's file says."""
        said = recipe.calibration or CalibrationInputs(rows=_ROWS, length=_LENGTH)
        return cls(
            file=given["file"] or said.file or None,
            rows=said.rows if given["rows"] is None else given["rows"],
            length=said.length if given["length"] is None else given["length"],
            references=given["references"] or said.references,
            safe=given["safe"] or said.safe or None,
            device=given["device"],
        )

    def evidence(
        self, base: str, variant: str, wanted: Iterable[Need]
    ) -> CalibratedEvidence | ReferenceEvidence | None:
        """Evidence for packing `variant`; None where neither file nor other fine-tunes were given.

        Raises:
            DeltafoldError: whatever is wrong with the file, the references or the device.
        """
        from deltafold.compress import DeltafoldError
        from deltafold.compress.evidence import is_task
        from deltafold.compress.references import compare_with

        references = read_references(self.references)
        if self.file is None:
            if self.safe is not None:
                raise DeltafoldError(
                    "bad-argument",
                    "--safe goes with calibration data of the task.",
                    fix="--calibrate prompts.jsonl",
                )
            if not all(map(is_task, references)):
                raise DeltafoldError(
                    "bad-argument",
                    "--reference goes with calibration data, but for other fine-tunes.",
                    fix="--calibrate prompts.jsonl, or --reference task=MODEL",
                )
            return compare_with(base, variant, references) if references else None
        from deltafold.compress.calibration import calibrate

        return calibrate(
            base,
            variant,
            self.file,
            rows=self.rows,
            length=self.length,
            references=references,
            safe=self.safe,
            wanted=(*wanted, "reference") if any(map(is_task, references)) else wanted,
            device=self.device,
        )


def calibrated(
    evidence: CalibratedEvidence | ReferenceEvidence | None,
) -> CalibratedEvidence | None:
    """Evidence of a model that ran on data; None without data."""
    from deltafold.compress.references import ReferenceEvidence

    return None if isinstance(evidence, ReferenceEvidence) else evidence


def judge_of(
    evidence: CalibratedEvidence | ReferenceEvidence | None, device: str
) -> CalibratedJudge | None:
    """What measures packed deltas on the calibration data; None without any."""
    ran = calibrated(evidence)
    if ran is None:
        return None
    from deltafold.compress.calibration import CalibratedJudge

    return CalibratedJudge(ran, device)


def read_references(given: Iterable[str]) -> dict[str, str]:
    """`ROLE=MODEL` as models by role; other fine-tunes are numbered.

    Raises:
        DeltafoldError: `bad-argument` for text of another form, or a role given twice.
    """
    from deltafold.compress import DeltafoldError

    found: dict[str, str] = {}
    for text in given:
        role, equals, model = text.partition("=")
        if role == "task":
            role = f"task:{1 + sum(r.startswith('task:') for r in found)}"
        if not (role and equals and model) or role in found:
            raise DeltafoldError(
                "bad-argument",
                f"--reference {text!r} is not of the form ROLE=MODEL, or its role is taken.",
                fix="--reference aligned=FOLDER",
            )
        found[role] = model
    return found
