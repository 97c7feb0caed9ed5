"""Figures as values: panels of lines that report.json keeps, drawn as SVG by one function.

A figure holds the very numbers that it shows, rounded to six digits. So it can be drawn again from
report.json alone, and a study makes one without importing matplotlib, which is imported when a
figure is drawn. Text in the SVG stays text, which keeps the file small.

`canvas` is for a study that draws with matplotlib itself.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.storage import write_atomic
from report.results import Group
from report.statistics import Estimate, estimate
from report.tables import without_defaults

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Line:
    """Points (x, y) that are joined by a line, marked, or both.

    label: in the legend; without one the line is not in it. half: half the width of the interval at
    each point, None where there is none; shown as a band, or as bars where the points have markers.
    color: a name of matplotlib, or "viridis:0.3" and "tab20:4", a place in a colour map.
    texts: written next to each point. ends_with: the marker of the last point alone.
    """

    x: list[float]
    y: list[float]
    label: str | None = None
    half: list[float | None] | None = None
    color: str = "black"
    style: str = "-"
    width: float = 1.6
    marker: str = ""
    texts: list[str] | None = None
    ends_with: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes. limits: of y; without them all lines are shown. legend: one of its own."""

    xlabel: str
    ylabel: str
    lines: list[Line]
    title: str = ""
    log_x: bool = False
    log_y: bool = False
    limits: tuple[float, float] | None = None
    legend: bool = False


@dataclass(frozen=True)
class Figure:
    """name: of its file; panels: row by row. legend: how many columns the legend of the whole
    figure has, which lists the lines of the first panel; 0: none.
    """

    name: str
    title: str
    panels: list[Panel]
    rows: int = 1
    legend: int = 0

    def shows_something(self) -> bool:
        """Whether there is a point in it."""
        return any(line.x for panel in self.panels for line in panel.lines)

    def json(self) -> dict[str, Any]:
        """The figure as report.json keeps it."""
        rounded: dict[str, Any] = _rounded(self)
        return rounded

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Figure:
        """The inverse of json()."""
        panels = [
            Panel(
                **panel
                | {
                    "lines": [Line(**line) for line in panel["lines"]],
                    "limits": tuple(panel["limits"]) if "limits" in panel else None,
                }
            )
            for panel in values["panels"]
        ]
        return cls(**{**values, "panels": panels})

    def draw(self, folder: Path) -> Path:
        """Write <name>.svg into `folder` and return its path. Equal figures are equal files."""
        shown = Figure.from_json(self.json())  # what is drawn is what is kept
        entries = sum(line.label is not None for line in self.panels[0].lines)
        legend_rows = -(-entries // self.legend) if self.legend else 0
        path = folder / f"{self.name}.svg"
        with canvas(path, len(self.panels) // self.rows, legend_rows, self.rows) as (figure, axes):
            for axis, panel in zip(axes, shown.panels, strict=True):
                _draw_panel(axis, panel)
            if self.legend:
                handles, labels = axes[0].get_legend_handles_labels()
                figure.legend(
                    handles, labels, loc="outside lower center", ncols=self.legend, frameon=False
                )
        return path


def _rounded(value: Any) -> Any:
    """Dataclasses as dicts of what is not a default, floats to six digits; NaN and infinity become
    None, as JSON wants it.
    """
    if isinstance(value, Figure | Panel | Line):
        return {name: _rounded(item) for name, item in without_defaults(value).items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


@contextmanager
def pyplot() -> Iterator[Any]:
    """matplotlib.pyplot without a display, set so that `save` writes small, reproducible SVGs.

    Ids come from a fixed salt, so equal figures are equal files. Text stays text: glyphs drawn as
    paths would be most of a file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with matplotlib.rc_context({"svg.hashsalt": "basis", "svg.fonttype": "none"}):
        yield plt


def save(figure: Any, path: Path) -> Path:
    """Write a figure of `pyplot` to `path`, an SVG, and return it; the folder is made.

    No date is written, and coordinates have two decimals: a hundredth of a point can't be seen.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, compact(text.getvalue()))
    return path


def compact(svg: str) -> str:
    """An SVG of matplotlib with coordinates to two decimals and without blanks at line ends."""
    shorter = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", svg)
    return re.sub(r"[ \t]+$", "", shorter, flags=re.MULTILINE)


@contextmanager
def canvas(
    path: Path, panels: int, legend_rows: int, lines: int = 1
) -> Iterator[tuple[Any, Sequence[Axes]]]:
    """A figure of `lines` times `panels` axes, row by row; at the end it is saved to `path`."""
    size = (
        7.0 if panels == 1 else 4.6 * panels,
        4.2 + 0.22 * legend_rows if lines == 1 else 3.6 * lines,
    )
    with pyplot() as plt:
        figure, axes = plt.subplots(
            lines, panels, figsize=size, layout="constrained", squeeze=False
        )
        yield figure, list(axes.flatten())
        save(figure, path)
        plt.close(figure)


def _color(name: str) -> Any:
    """A colour that matplotlib takes, from what Line.color says."""
    import matplotlib

    colormap, _, place = name.partition(":")
    if not place:
        return name
    chosen = matplotlib.colormaps[colormap]
    return chosen(int(place)) if colormap == "tab20" else chosen(float(place))


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for line in panel.lines:
        style: dict[str, Any] = {"color": _color(line.color), "linewidth": line.width}
        label = line.label if line.label is not None else "_nolegend_"
        # A point without an interval has a bar, or a band, of width 0.
        half = [value or 0.0 for value in line.half] if line.half else None
        if line.marker:
            axes.errorbar(
                line.x,
                line.y,
                half,
                linestyle=line.style or "none",
                marker=line.marker,
                markersize=4,
                label=label,
                **style,
            )
        else:
            axes.plot(line.x, line.y, linestyle=line.style, label=label, **style)
            if half:
                low = [y - h for y, h in zip(line.y, half, strict=True)]
                high = [y + h for y, h in zip(line.y, half, strict=True)]
                axes.fill_between(line.x, low, high, color=style["color"], alpha=0.2, linewidth=0)
        if line.ends_with and line.x:
            axes.plot(
                line.x[-1], line.y[-1], marker=line.ends_with, markersize=9, color=style["color"]
            )
        for text, x, y in zip(line.texts or [], line.x, line.y, strict=False):
            axes.annotate(text, (x, y), (4, 3), textcoords="offset points", fontsize=7)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    if panel.limits:
        axes.set_ylim(*panel.limits)
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    axes.set_title(panel.title, fontsize="small")
    axes.grid(alpha=0.3)
    if panel.legend:
        axes.legend(
            fontsize="x-small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16)
        )


def colors(groups: Sequence[Group]) -> list[str]:
    """A colour for each group in their order, black for exact."""
    sketched = [group for group in groups if group.method != "exact"]
    last = max(len(sketched) - 1, 1)
    return [
        "black" if group.method == "exact" else f"viridis:{0.9 * sketched.index(group) / last:.4g}"
        for group in groups
    ]


def columns(labels: Iterable[str]) -> int:
    """How many columns a legend with these labels has."""
    return 3 if max(map(len, labels), default=0) <= 24 else 1


def seeds_label(group: Group) -> str:
    """The group's label with its number of seeds, for a legend."""
    return f"{group.label} ({len(group.runs)} seed{'s' if len(group.runs) > 1 else ''})"


def mean_curve(group: Group, metric: str) -> tuple[list[int], list[Estimate]]:
    """The steps at which all runs of the group logged a finite `metric`, and the mean and interval
    at each: the curve ends where the first run diverged.
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


def mean_line(group: Group, metric: str, color: str, label: str | None) -> Line:
    """The mean of a metric over the seeds with a 95% band, and a cross where a run diverged."""
    steps, values = mean_curve(group, metric)
    return Line(
        [float(step) for step in steps],
        [value.mean for value in values],
        label,
        half=[value.half_width for value in values] if len(group.runs) > 1 else None,
        color=color,
        style="--" if group.method == "exact" else "-",
        ends_with="x" if group.diverged else "",
    )


def validation_curves(groups: Sequence[Group]) -> Figure:
    """Figure 1 of the paper: validation loss (nats per token) against steps, a line per group, a
    95% band over seeds.

    The loss of the untrained model is cut off: everything of interest lies far below it.
    """
    lines = [
        mean_line(group, "val/loss", color, seeds_label(group))
        for group, color in zip(groups, colors(groups), strict=True)
    ]
    later = [line.y[max(1, len(line.y) // 25) :] for line in lines]
    top = max((ys[0] for ys in later if ys), default=0.0)
    bottom = min((y for ys in later for y in ys), default=math.inf)
    limits = None
    if top > bottom:
        limits = (bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom))
    panel = Panel("step", "validation loss (nats per token)", lines, limits=limits)
    return Figure(
        "validation_loss", "Validation loss", [panel], legend=columns(g.label for g in groups)
    )
