"""How much of the machine a packing run may take, and what it will need of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from deltafold.compress import dtypes
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.memory import resident
from deltafold.compress.methods import PairMethod
from deltafold.compress.methods.chain import codec_of, steps_of
from deltafold.compress.recipe import Recipe
from deltafold.compress.shapes import rows_and_columns
from deltafold.compress.sizes import human
from deltafold.compress.streaming import Coder
from deltafold.compress.survey import looks_at_all
from deltafold.compress.terms.blocks import block_rows

#: Bytes an entry takes while it is coded in blocks, besides the weights of both models: the
#: difference, what is left of it, the codes, and what reading it back makes. Measured for every codec,
#: as are the next ones (`tests/compress/test_memory.py`); codecs that take more say so.
_BLOCK: Final = 52
#: The same for methods that take both models as they are: once, and by byte of a weight.
_PAIRED: Final = 8, 4
#: The same of a tensor that goes through its method as a whole, which may square it in float64.
_WHOLE: Final = 52
#: What edits before that add.
_EDITED: Final = 24
#: Bytes by entry of a matrix of second moments: it, damped, factored and inverted in float64.
_MOMENT: Final = 40
#: The same of a tensor that is looked at before anything is coded: its difference, edited, and counted.
_SEEN: Final = 24
#: What the process may grow by besides tensors: buffers of files, fragments of the allocator.
SPARE: Final = 96 * 2**20


@dataclass(frozen=True)
class Limits:
    """How much of the machine a run may take.

    Attributes:
        jobs: tensors at a time.
        memory: most bytes of the whole process; None means no bound.
    """

    jobs: int = 1
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise DeltafoldError("bad-argument", f"jobs must be 1 or more, not {self.jobs}.")

    def room(self, model: int = 0) -> int | None:
        """Bytes for tensors beside what the process holds already, and a model that it will hold."""
        return None if self.memory is None else self.memory - resident() - SPARE - model


class Need(NamedTuple):
    """Bytes of memory that a tensor takes, and what for."""

    nbytes: int
    name: str
    what: str


def working_bytes(coder: Coder, name: str) -> int:
    """Bytes of memory that coding a tensor takes at its peak."""
    spec, method = coder.target.spec(name), coder.method(name)
    size, columns = dtypes.TORCH[spec.dtype].itemsize, rows_and_columns(spec.shape)[1]
    own: int = getattr(codec_of(method), "entry_bytes", 0)
    if not coder.in_blocks(name):
        entry = max(_WHOLE, own) + _EDITED * bool(steps_of(method))
        moments = _MOMENT * columns**2 * ("activations" in method.needs)
        return _entries(coder, name) * (_sizes(coder, name) + entry) + moments
    rows, once = rows_and_columns(spec.shape)[0], _PAIRED[0] + _PAIRED[1] * size
    entry = max(once if isinstance(method, PairMethod) else _BLOCK, own)
    block = (block_rows(spec.shape) or rows) * columns * (_sizes(coder, name) + entry)
    added = max(rows - rows_and_columns(coder.source.spec(name).shape)[0], 0)
    # Added rows go to the payload as one part, behind the last block.
    return block + added * columns * size


def needs(coder: Coder, names: Iterable[str], before: Recipe | None = None) -> list[Need]:
    """What each tensor takes at its peak.

    Args:
        coder: what codes them.
        names: the tensors.
        before: a recipe that is prepared for them first: it may look at the whole model, or have a
            budget, for which codecs are tried. None counts coding alone.
    """
    looks, tries = False, False
    if before is not None:
        looks, tries = looks_at_all(before), before.budget is not None
    found: list[Need] = []
    for name in names:
        entries, sizes = _entries(coder, name), _sizes(coder, name)
        kinds = [Need(working_bytes(coder, name), name, "coded")]
        if tries:
            kinds.append(Need(entries * (sizes + _WHOLE), name, "tried whole for the budget"))
        if looks:
            kinds.append(Need(entries * (sizes + _SEEN), name, "looked at whole before coding"))
        found.append(max(kinds))
    return found


def check_room(found: Iterable[Need], limits: Limits, model: int = 0) -> None:
    """Refuse a bound that one of the tensors does not fit.

    Args:
        found: what each tensor takes.
        limits: how much of the machine the run may take.
        model: bytes of a model that the run will hold beside them.

    Raises:
        DeltafoldError: `not-enough-memory`.
    """
    room, largest = limits.room(model), max(found, default=None)
    if room is None or largest is None or largest.nbytes <= room:
        return
    assert limits.memory is not None
    raise DeltafoldError(
        "not-enough-memory",
        f"{largest.name} cannot be {largest.what} within the memory that this run may take.",
        facts=[
            ("bound", human(limits.memory)),
            (
                "needed",
                f"{human(limits.memory - room + largest.nbytes)}, all of the process counted",
            ),
            *([("calibration", f"{human(model)} of it, and activations")] if model else []),
        ],
        fix="raise --max-memory, or choose a codec that codes rows by themselves "
        "(bitdelta with scale=row or groups, int, exact, lossless)",
    )


def _entries(coder: Coder, name: str) -> int:
    """Of the larger of both models' tensors."""
    shapes = [coder.target.spec(name).shape]
    shapes += [coder.source.spec(name).shape] if name in coder.source else []
    return max(map(math.prod, shapes))


def _sizes(coder: Coder, name: str) -> int:
    """Bytes of an entry in both models."""
    found = dtypes.TORCH[coder.target.spec(name).dtype].itemsize
    if name in coder.source:
        found += dtypes.TORCH[coder.source.spec(name).dtype].itemsize
    return found
