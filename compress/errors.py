"""The one family of errors that users see.

Every error says what happened, where, what was expected and found, and what to do next. `code` is
stable and searchable: each code has a section in `docs/errors.md`, and the server maps codes to
HTTP statuses. Broken invariants of our own use `assert` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

#: Every code and the exit status of the command line (3 verification, 4 missing, 5 no room).
CODES: Final[dict[str, int]] = {
    "bad-argument": 2,
    "bad-recipe": 2,
    "unknown-codec": 2,
    "needs-calibration": 2,
    "base-mismatch": 3,
    "unexpected-tensor": 3,
    "missing-tensor": 3,
    "shape-mismatch": 3,
    "tokenizer-changed": 3,
    "input-changed": 3,
    "not-finite": 3,
    "coverage": 3,
    "checksum": 3,
    "truncated": 3,
    "newer-format": 3,
    "bad-manifest": 3,
    "not-a-delta": 3,
    "not-lossless": 3,
    "engine-unsupported": 3,
    "not-found": 4,
    "not-a-checkpoint": 4,
    "missing-extra": 4,
    "exists": 2,
    "busy": 2,
    "variant-not-found": 4,
    "context-length": 2,
    "not-enough-memory": 5,
    "not-enough-disk": 5,
}


class DeltafoldError(ValueError):
    """An error that its reader can act on.

    Args:
        code: a key of `CODES`.
        message: what happened and where, one sentence.
        facts: `(label, value)` pairs, printed one a line (expected, found, first differences).
        fix: what to do, ideally a command.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        facts: Sequence[tuple[str, object]] = (),
        fix: str = "",
    ) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.code = code
        self.message = message
        self.facts = tuple((label, str(value)) for label, value in facts)
        self.fix = fix

    @property
    def exit_code(self) -> int:
        """Exit status for the command line."""
        return CODES[self.code]

    def to_json(self) -> dict[str, object]:
        """The error as one JSON object, as printed under `--json`."""
        return {
            "code": self.code,
            "message": self.message,
            "facts": dict(self.facts),
            "fix": self.fix,
        }

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.message}"]
        width = max((len(label) for label, _ in self.facts), default=0)
        lines += [f"  {label:<{width}}  {value}" for label, value in self.facts]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


def name_some(names: Sequence[str], total: int | None = None, limit: int = 3) -> str:
    """`a, b, c, ... (3 of 288)`: the first names of a list that may be long."""
    shown = ", ".join(names[:limit])
    if len(names) > limit:
        shown += ", ..."
    return f"{shown} ({len(names)} of {total})" if total is not None else shown
