"""A rebuilt variant that labels and embeds: its dense model, and the trunk within it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltafold.compress import DeltafoldError
from deltafold.runtime.embedded.trunk import Encoder, answers_in


@dataclass(frozen=True)
class OwnModel:
    """What a rebuilt variant is asked through; one of the two at least.

    Attributes:
        trunk: gives vectors, as the shared one does for other variants; None where nothing in the
            class can be asked for them.
        whole: the variant's own class, which answers as a head does; None where it ends with the trunk.
    """

    trunk: Encoder | None
    whole: Encoder | None


def own_model(model: Any) -> OwnModel:
    """Find out how a dense model is asked.

    Args:
        model: of transformers, in eval mode, in its place.

    Raises:
        DeltafoldError: `engine-unsupported` where it reads neither texts nor pictures.
    """
    bare = model.base_model
    try:
        trunk = Encoder.of(bare)
    except DeltafoldError:
        if bare is model:
            raise
        # A class may make what its trunk needs besides a text, such as what a decoder begins with.
        return OwnModel(None, Encoder.of(model))
    if bare is not model:
        return OwnModel(trunk, trunk.around(model))
    # A class without a trunk of its own name is its own trunk, and may have a head all the same.
    return OwnModel(trunk, trunk if "logits" in answers_in(trunk.sample()[1]) else None)
