"""Whether a variant's delta can be applied to the shared model, as far as names and shapes tell.

Nothing of the payload is read, so a zoo can be described before anything is loaded. What only the
base's values tell (where a loader has put a fused tensor) is found out by loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltafold.compress import Checkpoint, DeltafoldError, DeltaRepo
from deltafold.compress.errors import name_some
from deltafold.compress.naming import NamedBase
from deltafold.runtime.configs import differing_keys
from deltafold.runtime.layers import is_embedding, is_linear
from deltafold.runtime.slots import Home, SlotMap


class NotAppliableError(DeltafoldError):
    """A variant that is sound but cannot be applied to the shared model.

    Attributes:
        tensor: the first tensor that stands in the way, or the keys of the configuration.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        tensor: str,
        facts: Sequence[tuple[str, object]] = (),
        fix: str = "",
    ) -> None:
        super().__init__(code, message, facts=facts, fix=fix)
        self.tensor = tensor


def not_appliable(
    repo: DeltaRepo, tensor: str, why: str, facts: Sequence[tuple[str, object]] = ()
) -> NotAppliableError:
    """The `engine-unsupported` error for one tensor of a variant."""
    return NotAppliableError(
        "engine-unsupported",
        f"{repo.folder}: {why}.",
        tensor=tensor,
        facts=facts,
        fix="serve it with --rebuild auto, or restore this variant and serve it by itself",
    )


def misfit(
    repo: DeltaRepo,
    base: Checkpoint,
    slots: SlotMap,
    base_config: Path | None = None,
    *,
    whole: bool = True,
) -> NotAppliableError | None:
    """What stands in the way of applying a delta, found without reading it; None for nothing.

    Args:
        repo: the delta.
        base: the checkpoint that it was packed against.
        slots: of the base's model, after a warm-up.
        base_config: folder of its `config.json`; None leaves the fine-tune's out of account.
        whole: whether the model is all that answers, so that a tensor which the fine-tune dropped
            must not be in it.
    """
    keys = [] if base_config is None else differing_keys(base_config, repo.folder)
    if keys:
        return not_appliable(
            repo,
            f"config.json: {', '.join(keys)}",
            "its config.json asks for another computation than the base's",
            facts=[("differing", name_some(keys, len(keys)))],
        )
    named = repo.named(base)
    own = own_slots(repo, named, slots)
    for tensor in sorted(repo.manifest.tensors):
        problem = _of_tensor(repo, named, slots, tensor, own)
        if problem is not None:
            return problem
    return _of_absent(repo, named, slots) if whole else None


def slot_of(tensor: str, base: NamedBase, slots: SlotMap) -> str | None:
    """The slot of a fine-tune's tensor: the model has the names of the base's checkpoint."""
    found = (slots.find(name) for name in base.likely(tensor))
    return next((slot for slot in found if slot is not None), None)


def own_slots(repo: DeltaRepo, base: NamedBase, slots: SlotMap) -> set[str | None]:
    """Slots that a tensor of the fine-tune names, whether it differs from the base's or not."""
    return {slot_of(tensor, base, slots) for tensor in repo.variant_names()}


def unreachable(
    repo: DeltaRepo, tensor: str, slots: SlotMap, names: list[str]
) -> NotAppliableError:
    """The error for a tensor without a home."""
    readers = sorted({r for n in names for r in slots.reading(n)})
    return not_appliable(
        repo,
        tensor,
        f"the model reads {tensor} where no variant's value can be brought in for some requests "
        "alone, so a delta there would have no effect",
        facts=[("read by", name_some(readers, len(readers)) if readers else "no module")],
    )


def _of_tensor(
    repo: DeltaRepo, base: NamedBase, slots: SlotMap, tensor: str, own: set[str | None]
) -> NotAppliableError | None:
    name = slot_of(tensor, base, slots)
    if name is None:
        return None
    held = tuple(slots.slots[name].tensor.shape)
    shape = tuple(base.spec(tensor).shape) if tensor in base else held
    if shape != held:
        return None  # the loader has changed it; its bytes tell what became of it
    ties = [n for n in slots.tied_to(name) if n == name or n not in own]
    homes = [home for tied in ties for home in slots.homes(tied)]
    if not homes:
        return None if slots.is_idle(ties) else unreachable(repo, tensor, slots, ties)
    return next((p for h in homes if (p := _of_shape(repo, tensor, shape, slots, h))), None)


def _of_shape(
    repo: DeltaRepo, tensor: str, base: tuple[int, ...], slots: SlotMap, home: Home
) -> NotAppliableError | None:
    shape = tuple(repo.entry(tensor).shape)
    vocabulary = id(home.module) in slots.vocabulary and home.path in ("weight", "bias")
    served = is_linear(home.module) or (is_embedding(home.module) and home.path == "weight")
    if shape == base or (vocabulary and served and shape[0]):
        return None
    return not_appliable(
        repo,
        tensor,
        f"{tensor} has another shape than the base's, and only tables of tokens may",
        facts=[("base", list(base)), ("variant", list(shape))],
    )


def _of_absent(repo: DeltaRepo, base: NamedBase, slots: SlotMap) -> NotAppliableError | None:
    """A tensor that the fine-tune dropped and the shared model goes on using."""
    kept = {slot_of(name, base, slots) for name in repo.variant_names()}
    for tensor in repo.manifest.absent:
        name = slot_of(tensor, base, slots)
        if name is not None and not kept & set(slots.tied_to(name)):
            return not_appliable(
                repo, tensor, f"the fine-tune lacks {tensor}, which the model uses"
            )
    return None
