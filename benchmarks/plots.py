"""Plots of `kernels.py`'s table."""

from __future__ import annotations

from pathlib import Path


def plot_ratios(model: str, ratios: dict[str, dict[int, float]], path: Path) -> None:
    """Time over the base's by number of variants, a line a case, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for case, points in ratios.items():
        ours = case.startswith("base + ") and "torch" not in case and "public" not in case
        counts = sorted(points)
        style = "-" if ours else ":"
        axes.plot(counts, [points[v] for v in counts], style, marker=".", label=case)
    axes.set(
        xscale="log", yscale="log", xlabel="variants in the batch", ylabel="time over the base's",
        title=f"{model}, linear layers of one step",
    )  # fmt: skip
    axes.legend(fontsize=7, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
