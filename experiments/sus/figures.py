"""Figures of SUS attention: the variance that it adds, and the time that it takes; as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report.figures import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_variance(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Rows of scripts/sus_variance.py: rho against the length, a colour per c, and against c, a
    colour per length.

    Solid: independent masks, dashed: systematic ones. Bars: 95% intervals.
    """
    with canvas(path, 2, 2) as (_, (by_length, by_c)):
        _rho(by_length, rows, "n", "c")
        _rho(by_c, rows, "c", "n")
        by_length.set_xlabel("n (tokens)")
        by_c.set_xlabel("c (entries of a row)")
        by_length.set_ylabel("rho, increase of the gradient's variance (%)")
        for axes in (by_length, by_c):
            axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
            handles, labels = axes.get_legend_handles_labels()
            axes.legend(handles, labels, fontsize="x-small", frameon=False, ncols=2)


def _rho(axes: Axes, rows: Sequence[dict[str, Any]], along: str, by: str) -> None:
    """rho against one of n and c on log-log axes, a colour for each value of the other."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    values = sorted({row[by] for row in rows})
    for mode, style in (("dense", "-"), ("sparse", "--")):
        for number, value in enumerate(values):
            line = sorted(
                (row for row in rows if row[by] == value and row["mode"] == mode),
                key=lambda row: row[along],
            )
            if not line:
                continue
            rho = [row["rho_all"] for row in line]
            look: dict[str, Any] = {
                "color": colours(0.9 * number / max(len(values) - 1, 1)),
                "linestyle": style,
            }
            axes.errorbar(
                [row[along] for row in line],
                [r.mean for r in rho],
                [r.half_width for r in rho],
                marker="o",
                markersize=3,
                linewidth=1.3,
                label=f"{by} = {value:,g}"
                if style == "-" or not any(r["mode"] == "dense" for r in rows)
                else None,
                **look,
            )
    ticks = sorted({row[along] for row in rows})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def draw_times(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Rows of scripts/bench_sus.py: time of forward and backward, and of backward alone, against
    the length; bars: quartiles.
    """
    styles = {
        "exact": ("black", "--"),
        "sus dense": ("tab:orange", "-"),
        "sus sparse": ("tab:blue", "-"),
    }
    with canvas(path, 2, 1) as (figure, panels):
        for axes, what in zip(panels, ("whole", "backward"), strict=True):
            for name, (colour, style) in styles.items():
                line = [row for row in rows if row["attention"] == name]
                median, low, high = (
                    [row[key] for row in line] for key in (what, f"{what}_low", f"{what}_high")
                )
                bars = [
                    [m - x for m, x in zip(median, low, strict=True)],
                    [x - m for m, x in zip(median, high, strict=True)],
                ]
                lengths = [row["n"] for row in line]
                axes.errorbar(
                    lengths,
                    median,
                    bars,
                    color=colour,
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    label=name,
                )
                if what == "backward" and name == "sus sparse":
                    entries = [row["entries"] for row in line]
                    axes.plot(
                        lengths,
                        entries,
                        color=colour,
                        linestyle=":",
                        label="sus sparse, without sampling",
                    )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
            axes.set_xlabel("n (tokens)")
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("forward and backward (ms)")
        panels[1].set_ylabel("backward (ms)")
        handles, labels = panels[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
