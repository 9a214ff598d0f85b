"""How the tensors of a model are served, counted for the tables of `docs/architectures.md`."""

from __future__ import annotations

from typing import Any


def homes_of(model: Any) -> list[str]:
    """Products, tables, and the classes of modules that are run again."""
    from deltafold.runtime.layers import is_embedding, is_linear, is_transposed_linear
    from deltafold.runtime.slots import SlotMap
    from deltafold.runtime.warm_up import warm_up_inputs

    slots = SlotMap(model)
    slots.observe(model, warm_up_inputs(model))
    # What is saved can be changed; tables of angles, say, are made anew at every start.
    modules = {h.name: h.module for n in model.state_dict() for h in slots.homes(n)}
    products = {n for n, m in modules.items() if is_linear(m) or is_transposed_linear(m)}
    tables = {n for n, m in modules.items() if is_embedding(m)}
    again = sorted({type(m).__name__ for n, m in modules.items() if n not in products | tables})
    return [str(len(products)), str(len(tables)), ", ".join(f"`{n}`" for n in again)]
