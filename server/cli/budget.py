"""The options that choose codecs by a budget, and how a plan is printed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from deltafold.compress.sizes import human
from deltafold.server.cli.options import F, add_options
from deltafold.server.cli.output import facts, table

if TYPE_CHECKING:
    from deltafold.compress import Recipe
    from deltafold.compress.budget.plan import Plan
    from deltafold.compress.evidence import Need

_NAMES = ("target_size", "max_kl", "candidates")


def budget_options(command: F) -> F:
    """Decorator: add `--target-size` and its companions; `BudgetOptions.take` finds their values."""
    options = [
        click.option(
            "--target-size",
            metavar="SIZE",
            help="Choose the codec of every matrix so that the delta has at most this size and loses "
            "least: 10% of the fine-tune's bytes, or 500MiB.",
        ),
        click.option(
            "--max-kl",
            metavar="NATS",
            type=float,
            help="Choose them for the smallest delta whose KL divergence to the fine-tune on the "
            "--calibrate data is at most this.",
        ),
        click.option(
            "--candidates",
            metavar="SPEC",
            multiple=True,
            help="A codec to choose from; repeat it. A sensible list if left out.",
        ),
        click.option(
            "--dry-run",
            is_flag=True,
            help="Print the recipe and the size of the delta to the byte, and write nothing.",
        ),
    ]
    return add_options(command, options)


@dataclass(frozen=True)
class BudgetOptions:
    """What `budget_options` were given."""

    target_size: str | None = None
    max_kl: float | None = None
    candidates: tuple[str, ...] = ()

    @classmethod
    def take(cls, given: dict[str, Any]) -> BudgetOptions:
        """Take the options out of a command's arguments."""
        return cls(**{name: given.pop(name) for name in _NAMES})

    def applied(self, recipe: Recipe, codec: str | None) -> Recipe:
        """The recipe with the budget that options and file give together.

        Raises:
            DeltafoldError: `bad-argument`, or `unknown-codec` for a candidate.
        """
        from deltafold.compress import DeltafoldError, parse_spec
        from deltafold.compress.budget.goal import Budget

        budget = recipe.budget
        if self.target_size is not None or self.max_kl is not None:
            old = budget.candidates if budget else ()
            budget = Budget(self.target_size or "", self.max_kl or 0.0, old)
        if self.candidates:
            if budget is None:
                raise DeltafoldError(
                    "bad-argument",
                    "--candidates are for a budget to choose from.",
                    fix="--target-size 10%, or --max-kl 0.02 with --calibrate FILE",
                )
            budget = replace(budget, candidates=tuple(map(parse_spec, self.candidates)))
        if budget is not None and codec is not None:
            raise DeltafoldError(
                "bad-argument",
                "--codec says what a budget is there to choose.",
                fix=f"--candidates {codec}, or --set '*=SPEC' for tensors whose codec is fixed",
            )
        return replace(recipe, budget=budget)


def wanted_evidence(recipe: Recipe) -> tuple[Need, ...]:
    """What a calibration run should find out: a budget weighs errors by gradients."""
    needs = recipe.needs()
    return needs if recipe.budget is None or "gradients" in needs else (*needs, "gradients")


def plan_text(plan: Plan) -> str:
    """A plan for people: its size, its codecs, and the frontier it lies on."""
    lines = [("size", f"{plan.nbytes:,} bytes, {plan.ratio:.2%} of {human(plan.variant_bytes)}")]
    lines.append(("error", f"{plan.error:.4g} ({plan.unit})"))
    if plan.kl is not None:
        lines.append(("KL", f"{plan.kl:.4g} nats a token on the calibration data"))
    codecs = table(
        ["codec", "tensors"], [[spec, str(n)] for spec, n in plan.codecs.items()], "tensors"
    )
    text = f"{facts(lines)}\n\n{codecs}"
    return text if len(plan.frontier) < 2 else f"{text}\n\n{_frontier_text(plan)}"


def _frontier_text(plan: Plan) -> str:
    measured = any(point.kl is not None for point in plan.frontier)
    rows = [
        [
            f"{point.nbytes:,}",
            f"{point.nbytes / max(plan.variant_bytes, 1):.2%}",
            f"{point.error:.4g}",
            *(["-" if point.kl is None else f"{point.kl:.4g}"] if measured else []),
            "chosen" if point.nbytes == plan.nbytes else "",
        ]
        for point in plan.frontier
    ]
    head = ["bytes", "size", "error", *(["KL"] if measured else []), ""]
    return table(head, rows, "bytes size error KL")


def dry_text(plan: Plan) -> str:
    """A plan and its recipe as YAML, which `--recipe` reads."""
    import yaml

    recipe = yaml.safe_dump(plan.recipe.to_json(), sort_keys=False, width=1000).strip()
    return f"nothing was written\n{plan_text(plan)}\n\nrecipe:\n\n{recipe}"
