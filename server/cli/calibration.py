"""The options of commands that run a model on calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from deltafold.server.cli.options import F, add_options

if TYPE_CHECKING:
    from deltafold.compress.calibration import CalibratedEvidence, CalibratedJudge
    from deltafold.compress.evidence import Need

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
            default=_ROWS,
            show_default=True,
            help="Most rows of it that are used.",
        ),
        click.option(
            "--calibrate-length",
            "length",
            metavar="N",
            type=int,
            default=_LENGTH,
            show_default=True,
            help="Most tokens of a row.",
        ),
        click.option(
            "--reference",
            "references",
            metavar="ROLE=MODEL",
            multiple=True,
            help="Another checkpoint for edits that ask for one; ROLE is aligned or unaligned.",
        ),
        click.option(
            "--device", default="cpu", show_default=True, help="Where calibration runs the model."
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
        device: where the model runs.
    """

    file: str | None = None
    rows: int = _ROWS
    length: int = _LENGTH
    references: tuple[str, ...] = ()
    device: str = "cpu"

    def evidence(
        self, base: str, variant: str, wanted: Iterable[Need]
    ) -> CalibratedEvidence | None:
        """Evidence for packing `variant`; None where no file was given.

        Raises:
            DeltafoldError: whatever is wrong with the file, the references or the device.
        """
        from deltafold.compress import DeltafoldError

        references = dict(map(_reference, self.references))
        if self.file is None:
            if references:
                raise DeltafoldError(
                    "bad-argument",
                    "--reference goes with calibration data.",
                    fix="--calibrate prompts.jsonl",
                )
            return None
        from deltafold.compress.calibration import calibrate

        return calibrate(
            base,
            variant,
            self.file,
            rows=self.rows,
            length=self.length,
            references=references,
            wanted=wanted,
            device=self.device,
        )


def judge_of(evidence: CalibratedEvidence | None, device: str) -> CalibratedJudge | None:
    """What measures packed deltas on the calibration data; None without any."""
    from deltafold.compress.calibration import CalibratedJudge

    return None if evidence is None else CalibratedJudge(evidence, device)


def _reference(text: str) -> tuple[str, str]:
    from deltafold.compress import DeltafoldError

    role, equals, model = text.partition("=")
    if not (role and equals and model):
        raise DeltafoldError(
            "bad-argument",
            f"--reference {text!r} is not of the form ROLE=MODEL.",
            fix="--reference aligned=FOLDER",
        )
    return role, model
