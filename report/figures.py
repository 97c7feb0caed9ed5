"""Figures of groups of runs, as PNG and SVG. matplotlib is drawn without a display and imported
when asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report.results import Group, differing_options, setting
from report.statistics import Estimate, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from experiments.arena.standings import Standing

SUFFIXES = ("png", "svg")


@contextmanager
def canvas(
    stem: Path, panels: int, legend_rows: int, lines: int = 1
) -> Iterator[tuple[Any, Sequence[Axes]]]:
    """A figure of `lines` times `panels` axes, line by line, saved as stem.png and stem.svg at the
    end.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "basis"  # equal figures are equal files
    from matplotlib import pyplot as plt

    size = (
        7.0 if panels == 1 else 4.6 * panels,
        4.2 + 0.22 * legend_rows if lines == 1 else 3.6 * lines,
    )
    figure, axes = plt.subplots(lines, panels, figsize=size, layout="constrained", squeeze=False)
    yield figure, list(axes.flatten())
    for suffix in SUFFIXES:
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(stem.with_suffix(f".{suffix}"), dpi=150, metadata=metadata)
    plt.close(figure)


def _styles(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Colours in the order of the groups, exact in black and dashed."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    sketched = [group for group in groups if group.method != "exact"]
    styles = []
    for group in groups:
        exact = group.method == "exact"
        colour = (
            "black" if exact else colours(0.9 * sketched.index(group) / max(len(sketched) - 1, 1))
        )
        styles.append({"color": colour, "linestyle": "--" if exact else "-"})
    return styles


def _legend(figure: Any, groups: Sequence[Group]) -> None:
    columns = 3 if max(len(group.label) for group in groups) <= 24 else 1
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _label(group: Group) -> str:
    return f"{group.label} ({len(group.runs)} seed{'s' if len(group.runs) > 1 else ''})"


def _draw(
    axes: Axes, group: Group, metric: str, style: dict[str, Any], label: str | None = None
) -> list[float]:
    """Mean curve of a metric with a 95% band where there are seeds, a cross where a run diverged;
    returns the means.
    """
    steps, values = mean_curve(group, metric)
    means = [value.mean for value in values]
    axes.plot(steps, means, linewidth=1.6, label=label or _label(group), **style)
    if len(group.runs) > 1:
        low, high = ([value.low for value in values], [value.high for value in values])
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
    if group.diverged and steps:
        axes.plot(steps[-1], means[-1], marker="x", markersize=9, color=style["color"])
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    return means


def mean_curve(group: Group, metric: str) -> tuple[list[int], list[Estimate]]:
    """Steps at which all runs of the group logged a finite `metric`, and mean and interval there:
    to the first divergence.
    """
    curves = [
        {
            step: value
            for step, value in zip(*run.series(metric), strict=True)
            if math.isfinite(value)
        }
        for run in group.runs
    ]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, [estimate([curve[step] for curve in curves]) for step in steps]


def validation_curves(groups: Sequence[Group], stem: Path) -> list[Path]:
    """Figure 1 of the paper: validation loss (nats per token) against steps, a line per group, a
    95% band over seeds.

    The loss of the untrained model is cut off, since all that is to be seen lies below. Returns the
    paths written.
    """
    with canvas(stem, 1, len(groups)) as (figure, (axes,)):
        top, bottom = 0.0, math.inf
        for group, style in zip(groups, _styles(groups), strict=True):
            means = _draw(axes, group, "val/loss", style)
            later = means[max(1, len(means) // 25) :]
            if later:
                top, bottom = max(top, later[0]), min(bottom, *later)
        if math.isfinite(bottom) and top > bottom:
            axes.set_ylim(bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom))
        axes.set_ylabel("validation loss (nats per token)")
        _legend(figure, groups)
    return [stem.with_suffix(f".{suffix}") for suffix in SUFFIXES]


def stability_curves(groups: Sequence[Group], stem: Path) -> list[Path]:
    """Validation loss (first line) and norm of the momentum (second) against steps, a column per
    setting, such as a rate.
    """
    columns: dict[str, list[Group]] = {}
    for group in groups:
        columns.setdefault(setting(group.runs[0]), []).append(group)
    titles = differing_options([members[0].runs[0] for members in columns.values()])
    with canvas(stem, len(columns), len(groups), lines=2) as (_, axes):
        for column, (members, title) in enumerate(zip(columns.values(), titles, strict=True)):
            losses, norms = axes[column], axes[len(columns) + column]
            highest, lowest = 0.0, math.inf
            for group, style in zip(members, _styles(members), strict=True):
                means = _draw(losses, group, "val/loss", style)
                highest, lowest = max([highest, *means[:1]]), min([lowest, *means])
                norms.plot([], [], label=_label(group).replace(f" {title}", ""), **style)
                _draw(norms, group, "momentum_norm", style, label="_nolegend_")
            if highest:
                losses.set_ylim(
                    0.95 * lowest, 1.1 * highest
                )  # a loss that runs away leaves the picture
            losses.set_title(title, fontsize="small")
            norms.set_yscale("log")
            norms.legend(
                fontsize="x-small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16)
            )
        axes[0].set_ylabel("validation loss (nats per token)")
        axes[len(columns)].set_ylabel("2-norm of the momentum")
    return [stem.with_suffix(f".{suffix}") for suffix in SUFFIXES]


def quality_curves(groups: Sequence[Group], stem: Path) -> list[Path]:
    """Cosine and norm ratio of sketched to exact dW against steps; nothing is drawn if no run
    looked at them.
    """
    shown = [group for group in groups if mean_curve(group, "sketch/all/cosine")[0]]
    if not shown:
        return []
    with canvas(stem, 2, len(shown)) as (figure, axes):
        for group, style in zip(shown, _styles(shown), strict=True):
            _draw(axes[0], group, "sketch/all/cosine", style)
            _draw(axes[1], group, "sketch/all/norm_ratio", style)
        axes[0].set_ylabel("cosine of sketched to exact dW")
        axes[1].set_ylabel("norm of sketched / exact dW")
        axes[1].set_yscale("log")
        _legend(figure, shown)
    return [stem.with_suffix(f".{suffix}") for suffix in SUFFIXES]


def arena_costs(standings: Sequence[Standing], stem: Path) -> list[Path]:
    """Final loss against four costs: bytes of dense layers, all bytes, time of a step, time of the
    training.

    Bars: 95% intervals over seeds. The line joins the front, those that nothing beats in both. What
    keeps nothing has no place on a logarithmic axis of bytes and is drawn at its left edge.
    """
    if len(standings) < 2:
        return []
    costs: list[tuple[str, Callable[[Standing], float | None]]] = [
        (
            "kept by dense layers and state (bytes)",
            lambda s: None if s.dense is None else s.dense + s.state,
        ),
        ("kept in all and state (bytes)", lambda s: s.kept + s.state),
        ("median time of a step (ms)", lambda s: None if s.step is None else 1000 * s.step),
        ("training (s)", lambda s: s.seconds),
    ]
    return _scatter(standings, costs, stem, lines=2, joined=True)


def arena_quality(standings: Sequence[Standing], stem: Path) -> list[Path]:
    """Final loss against relative error and cosine of dW; nothing is drawn if no run looked at
    them.
    """
    shown = [s for s in standings if s.quality]
    if len(shown) < 2:
        return []
    costs: list[tuple[str, Callable[[Standing], float | None]]] = [
        ("relative error of dW", lambda s: s.quality.get("relative_error")),
        ("cosine of estimated to exact dW", lambda s: s.quality.get("cosine")),
    ]
    return _scatter(shown, costs, stem, lines=1, joined=False)


def _scatter(
    standings: Sequence[Standing],
    costs: Sequence[tuple[str, Callable[[Standing], float | None]]],
    stem: Path,
    *,
    lines: int,
    joined: bool,
) -> list[Path]:
    """A panel per cost: a colour per method, a number per contender, which the legend explains; the
    worst losses are cut off.
    """
    import matplotlib

    colours = matplotlib.colormaps["tab20"]
    ended = [s for s in standings if s.loss is not None]
    methods = sorted({s.group.method for s in ended if s.group.method != "exact"})
    means = sorted(s.loss.mean for s in ended if s.loss is not None)
    top = means[0] + 3.0 * (means[(3 * len(means)) // 4] - means[0]) if means else 0.0
    with canvas(stem, len(costs) // lines, len(ended) // 2, lines=lines) as (figure, axes):
        for panel, (title, cost) in zip(axes, costs, strict=True):
            points = [(cost(s), s) for s in ended]
            positive = [c for c, _ in points if c]
            edge = min(positive) / 2 if positive else 1.0
            for number, (c, s) in enumerate(points, start=1):
                assert s.loss is not None
                if c is None:
                    continue
                exact = s.group.method == "exact"
                colour = "black" if exact else colours(methods.index(s.group.method) % 20)
                look: dict[str, Any] = {
                    "color": colour,
                    "marker": "s" if exact else "o",
                    "markersize": 4,
                    "linewidth": 1,
                }
                panel.errorbar(max(c, edge), s.loss.mean, s.loss.half_width, **look)
                panel.annotate(
                    str(number),
                    (max(c, edge), s.loss.mean),
                    (4, 3),
                    textcoords="offset points",
                    fontsize=7,
                )
            if joined:
                best, lowest = list[tuple[float, float]](), math.inf
                for c, loss in sorted(
                    (c, s.loss.mean) for c, s in points if c is not None and s.loss is not None
                ):
                    if loss < lowest:
                        best, lowest = [*best, (max(c, edge), loss)], loss
                panel.plot(*zip(*best, strict=True), color="grey", linewidth=0.8, zorder=0)
            if positive and max(positive) > 5 * min(positive):
                panel.set_xscale("log")
            if means and top > means[0] and means[-1] > top:
                panel.set_ylim(means[0] - 0.1 * (top - means[0]), top)
            panel.set_xlabel(title)
            panel.set_ylabel("final validation loss (nats per token)")
            panel.grid(alpha=0.3)
        from matplotlib.lines import Line2D

        handles = [
            Line2D(
                [],
                [],
                linestyle="",
                marker="s" if s.group.method == "exact" else "o",
                color="black"
                if s.group.method == "exact"
                else colours(methods.index(s.group.method) % 20),
                label=f"{number} {s.label}",
            )
            for number, s in enumerate(ended, start=1)
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize="small"
        )
    return [stem.with_suffix(f".{suffix}") for suffix in SUFFIXES]
