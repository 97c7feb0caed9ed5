"""The figure of rate_distortion.py, as SVG."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from report.figures import canvas


class Distortion(Protocol):
    """A measured point: distortion and bound relative to the variance."""

    @property
    def layer(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def bits(self) -> float: ...
    @property
    def distortion(self) -> float: ...
    @property
    def bound(self) -> float: ...


def draw(points: Sequence[Distortion], path: Path) -> None:
    """Distortion against bits, a panel per kind of layer (medians over blocks), a line per method,
    the bound in black.
    """
    kinds: dict[str, list[Distortion]] = {}
    for point in points:
        kinds.setdefault(".".join(point.layer.split(".")[-2:]), []).append(point)
    methods = list(dict.fromkeys(point.method for point in points))
    with canvas(path, max(len(kinds), 1), len(methods)) as (figure, panels):
        for axes, (kind, here) in zip(panels, kinds.items(), strict=True):
            limit = _medians((p.bits, p.bound) for p in here)
            axes.plot(
                *zip(*limit, strict=True), color="black", linewidth=1.2, label="Gaussian bound"
            )
            for number, method in enumerate(methods):
                line = _medians((p.bits, p.distortion) for p in here if p.method == method)
                if line:
                    axes.plot(
                        *zip(*line, strict=True),
                        color=f"C{number}",
                        marker="o",
                        markersize=3,
                        linewidth=1.2,
                        label=method,
                    )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(kind, fontsize="medium")
            axes.set_xlabel("bits kept of a number of X")
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("squared error / variance of X")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def _medians(pairs: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Median of y at each x (to three digits), in order of x."""
    by_x: dict[float, list[float]] = {}
    for x, y in pairs:
        by_x.setdefault(float(f"{x:.3g}"), []).append(y)
    return [(x, statistics.median(ys)) for x, ys in sorted(by_x.items())]
