"""The README's figure: what each method's loss costs above exact, against the bytes it keeps of X.

    python -m experiments.arena.headline  # results/arena/tuned -> docs/loss_against_bytes.svg

It draws the ranking of an arena, as eval.py wrote it to report.json. A point is a method at a
budget, its bar the 95% interval over pairs of seeds. A hollow point has a state between steps that
is not in its bytes. One seed carries no bar.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.storage import write_atomic

RANKING = Path("results/arena/tuned/report.json")
FIGURE = Path("docs/loss_against_bytes.svg")
SHOWN = {  # method: name in the figure, colour
    "basis": ("BASIS (paper)", "tab:red"),
    "row_sampling": ("row sampling", "tab:brown"),
    "low_rank": ("low rank", "tab:olive"),
    "subspace": ("subspace", "tab:green"),
    "quantized": ("quantized", "tab:blue"),
    "transform": ("transform", "tab:purple"),
}


def points(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the ranking by method, from few bytes to many.

    BASIS is the paper's, without the mean kept exactly. Raises ValueError if `report` has no
    ranking.
    """
    if "arena" not in report["tables"]:
        raise ValueError("the report has no ranking of methods: make it with eval.py arena=true")
    found: dict[str, list[dict[str, Any]]] = {}
    for row in report["tables"]["arena"]["rows"]:
        name = str(row["method"]).split()[0]
        if name in SHOWN and row["budget"] and row["above"] and "center=True" not in row["method"]:
            found.setdefault(name, []).append(row)
    return {name: sorted(rows, key=lambda row: row["share"]) for name, rows in found.items()}


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the figure to `path`; equal reports give equal files."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "basis"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    axes.axhline(0.0, color="black", linewidth=1.0, linestyle="--")
    axes.text(1 / 13.5, -0.035, "exact, which keeps all of X", ha="center", va="center", fontsize=9)
    for place, (name, rows) in enumerate(points(report).items()):
        label, colour = SHOWN[name]
        shares = [row["share"] * 1.015 ** (place - 2) for row in rows]  # bars next to each other
        means = [row["above"]["mean"] for row in rows]
        bars = [row["above"]["half_width"] or 0.0 for row in rows]
        hollow = any(row["state"] for row in rows)
        axes.errorbar(
            shares,
            means,
            bars,
            label=f"{label}, and state" if hollow else label,
            color=colour,
            marker="o",
            markersize=6,
            markerfacecolor="white" if hollow else colour,
            linewidth=1.4,
            capsize=3,
        )
    axes.set_xscale("log")
    axes.set_xticks([1 / 24, 1 / 8, 1 / 4], ["1/24", "1/8", "1/4"])
    axes.minorticks_off()
    axes.set_xlabel("share of X's bytes that is kept")
    axes.set_ylabel("validation loss above exact (nats)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], metadata={"Date": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, drawn.getvalue())
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--report", type=Path, default=RANKING, help="report.json of an arena")
    parser.add_argument("--out", type=Path, default=FIGURE, help="the .svg to write")
    arguments = parser.parse_args(argv)
    draw(json.loads(arguments.report.read_text()), arguments.out)
    print("Written:", arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
