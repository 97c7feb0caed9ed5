"""Figures of groups of runs, as PNG and SVG. matplotlib is drawn without a display and imported when asked for."""

from __future__ import annotations

from pathlib import Path

from harness.results import Group, mean_and_interval


def validation_curves(groups: list[Group], stem: Path) -> list[Path]:
    """Validation loss (nats per token) against steps, a line per group, a 95% band where there are seeds.

    Writes stem.png and stem.svg and returns their paths.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.4 + 0.22 * max(len(groups) - 3, 0)), layout="constrained")
    colours = plt.get_cmap("viridis")
    sketched = [group for group in groups if group.method != "exact"]
    for group in groups:
        exact = group.method == "exact"
        colour = "black" if exact else colours(0.9 * sketched.index(group) / max(len(sketched) - 1, 1))
        steps, values = _mean_curve(group)
        means = [mean for mean, _ in values]
        (line,) = axes.plot(steps, means, color=colour, linestyle="--" if exact else "-", linewidth=1.6)
        seeds = len(group.runs)
        line.set_label(f"{group.label} ({seeds} seed{'s' if seeds > 1 else ''})")
        if seeds > 1:
            half = [h or 0.0 for _, h in values]
            low, high = ([m + sign * h for m, h in zip(means, half, strict=True)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    columns = 3 if max(len(group.label) for group in groups) <= 24 else 1
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    paths = []
    for suffix in ("png", "svg"):
        paths.append(stem.with_suffix(f".{suffix}"))
        figure.savefig(paths[-1], dpi=150)
    plt.close(figure)
    return paths


def _mean_curve(group: Group) -> tuple[list[int], list[tuple[float, float | None]]]:
    """Steps at which all runs of the group were evaluated, and mean and interval there."""
    curves = [dict(zip(*run.series("val/loss"), strict=True)) for run in group.runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, [mean_and_interval([curve[step] for curve in curves]) for step in steps]
