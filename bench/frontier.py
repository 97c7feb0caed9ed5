"""The frontier of training: which alternatives of bench_gpu nobody beats in both time and bytes.

    python -m bench.frontier results/gpu/step.csv                     # draws frontier.svg beside it
    python -m bench.frontier results/gpu/step.csv --out frontier.svg

Each alternative is a point: the median time of a step against the peak of its bytes beyond
parameters, gradients and optimizer. Times are ratios to the baseline that took turns with it, so
they can be compared although they were measured at different moments; where a baseline failed, they
are milliseconds. The frontier are the points for which no other is as fast and as small, and better
in one of the two. A panel for each context. Alternatives that failed have no point, and are named
in the output.

bench_gpu draws the figure itself where matplotlib is installed; this command draws it later.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from report.figures import Figure, Line, Panel

NAME = "frontier"


class Point(NamedTuple):
    """An alternative of one context: its name, time of a step and bytes at the peak."""

    name: str
    time: float
    peak: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other one dominates, by time; of equal ones the first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.time, p.peak)):
        if not found or point.peak < found[-1].peak:
            found.append(point)
    return found


def read(path: Path) -> tuple[dict[str, list[Point]], str, list[str]]:
    """The points of step.csv for each context, what their times are, and the rows that failed.

    Raises ValueError naming the file if a column is missing.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = {"step", "milliseconds", "ratio", "peak_bytes"} - (rows[0].keys() if rows else set())
    if missing:
        raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; is it bench_gpu's?")
    failed = [row["step"] for row in rows if row.get("failed")]
    measured = [row for row in rows if row["milliseconds"] and row["peak_bytes"]]
    relative = all(row["ratio"] for row in measured)
    found: dict[str, dict[str, Point]] = {}
    for row in measured:
        name, context = re.fullmatch(r"(.*?)(?:, (context .*))?", row["step"]).groups(default="")  # type: ignore[union-attr]
        time = float(row["ratio"] if relative else row["milliseconds"])
        # a baseline has a row for each alternative that took turns with it; one point is enough
        found.setdefault(context, {}).setdefault(name, Point(name, time, float(row["peak_bytes"])))
    unit = "time of a step, exact with whole logits = 1" if relative else "time of a step, ms"
    return {context: list(points.values()) for context, points in found.items()}, unit, failed


def figure(points: dict[str, list[Point]], unit: str) -> Figure:
    """A panel for each context: all points with their names, and the frontier as a staircase."""
    panels = []
    for context, alternatives in points.items():
        best = frontier(alternatives)
        others = [point for point in alternatives if point not in best]
        x, y = [best[0].time], [best[0].peak]
        for point in best[1:]:  # whatever takes as long as this one needs at least the last peak
            x += [point.time, point.time]
            y += [y[-1], point.peak]
        lines = [
            Line(x, [value / 2**30 for value in y], "frontier", color="firebrick", width=1.2),
            *(
                Line(
                    [p.time for p in group],
                    [p.peak / 2**30 for p in group],
                    color=color,
                    style="",
                    marker="o",
                    texts=[p.name for p in group],
                )
                for group, color in ((best, "firebrick"), (others, "gray"))
            ),
        ]
        ylabel = "peak beyond parameters, gradients, optimizer (GiB)"
        panels.append(Panel(unit, ylabel, lines, title=context, log_x=True, log_y=True))
    return Figure(NAME, "Time of a step against its peak", panels)


def draw(path: Path, out: Path | None = None) -> list[str]:
    """Draw the figure of step.csv, as frontier.svg beside it or as `out`; returns what it shows, a
    sentence for each context.

    Raises ValueError if the file has no measured row, or is none of bench_gpu's.
    """
    points, unit, failed = read(path)
    if not points:
        raise ValueError(f"{path}: no row has both a time and a peak")
    drawn = figure(points, unit).draw(path.parent if out is None else out.parent)
    if out is not None and drawn != out:
        drawn.replace(out)
    said = [
        f"{context or 'frontier'}: {'; '.join(point.name for point in frontier(alternatives))}"
        for context, alternatives in points.items()
    ]
    return [*said, *(f"failed: {name}" for name in failed)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, help="step.csv of bench_gpu")
    parser.add_argument("--out", type=Path, help="an .svg (default: frontier.svg beside the CSV)")
    options = parser.parse_args(argv)
    try:
        for line in draw(options.csv, options.out):
            print(line)
    except (OSError, ValueError) as error:
        print(f"frontier: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
