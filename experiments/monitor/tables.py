"""Readings of the monitor beside their true values: two tables, a figure, all of them as CSV.

A row is one layer at one step with one number of probes: each quantity as it was read, and as
`true_<quantity>`. Relative error: (estimate - truth) / truth.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.timing import machine
from harness.memory import format_bytes
from report.figures import canvas
from report.tables import Column, Table

QUANTITIES = {
    "activation_energy": "activation energy",
    "gradient_norm": "gradient norm",
    "stable_rank": "stable rank",
}


def errors(rows: Sequence[dict[str, Any]], quantity: str) -> list[float]:
    """Relative errors of a quantity, with sign."""
    return [
        row[quantity] / row[f"true_{quantity}"] - 1.0 for row in rows if row[f"true_{quantity}"]
    ]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def tables(rows: list[dict[str, Any]], held: list[int], probes: Sequence[int]) -> list[Table]:
    """Errors by quantity and number of probes, over all layers; and by layer, for the middle number
    of probes.
    """
    looks = len({row["step"] for row in rows})
    lines = []
    for quantity, words in QUANTITIES.items():
        for p in probes:
            found = errors([row for row in rows if row["probes"] == p], quantity)
            low, median, high = quartiles(found)
            size = statistics.median(abs(error) for error in found)
            lines.append(
                {
                    "quantity": words,
                    "probes": p,
                    "median": median,
                    "low": low,
                    "high": high,
                    "size": size,
                    "count": len(found),
                }
                | machine()
            )
    columns = {
        "quantity": Column("quantity"),
        "probes": Column("probes"),
        "median": Column("relative error, median", sign=True),
    }
    columns |= {
        "low": Column("lower quartile", sign=True),
        "high": Column("upper quartile", sign=True),
    }
    columns |= {"size": Column("median of its absolute value"), "count": Column("readings")}
    columns |= {name: Column(name) for name in ("machine", "torch", "commit")}
    notes = [
        f"Held between steps by all monitors together: {format_bytes(held[0])} after the first "
        f"look, {format_bytes(held[-1])} after the last of {looks}."
    ]
    overall = Table(
        "monitor", "The monitor against true values, all dense layers", columns, lines, notes
    )

    middle = sorted(probes)[len(probes) // 2]
    lines = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        of_layer = [row for row in rows if row["layer"] == layer and row["probes"] == middle]
        line: dict[str, Any] = {"layer": layer}
        for quantity in QUANTITIES:
            low, median, high = quartiles(errors(of_layer, quantity))
            line[f"true_{quantity}"] = float(
                f"{statistics.median(row[f'true_{quantity}'] for row in of_layer):.3g}"
            )
            line |= {quantity: median, f"{quantity}_low": low, f"{quantity}_high": high}
        lines.append(line)
    columns = {"layer": Column("layer")}
    for quantity, words in QUANTITIES.items():
        columns |= {
            f"true_{quantity}": Column(
                f"true {words}, median", digits=4 if quantity == "gradient_norm" else 1
            ),
            quantity: Column("relative error, median", sign=True, digits=2),
            f"{quantity}_low": Column("lower quartile", sign=True, digits=2),
            f"{quantity}_high": Column("upper quartile", sign=True, digits=2),
        }
    return [
        overall,
        Table("monitor_layers", f"By layer, {middle} probes, {looks} looks", columns, lines),
    ]


def draw(rows: list[dict[str, Any]], probes: Sequence[int], path: Path) -> None:
    """Above, estimate against truth, a colour per layer, for the middle number of probes; below,
    errors by layer: medians and quartiles.
    """
    import matplotlib

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    colours = [
        matplotlib.colormaps["viridis"](i / max(len(layers) - 1, 1)) for i in range(len(layers))
    ]
    middle = sorted(probes)[len(probes) // 2]
    with canvas(path, len(QUANTITIES), 0, lines=2) as (_, axes):
        for column, (quantity, words) in enumerate(QUANTITIES.items()):
            above, below = axes[column], axes[len(QUANTITIES) + column]
            for layer, colour in zip(layers, colours, strict=True):
                shown = [row for row in rows if row["layer"] == layer and row["probes"] == middle]
                truth, estimate = (
                    [row[prefix + quantity] for row in shown] for prefix in ("true_", "")
                )
                above.plot(truth, estimate, ".", color=colour, markersize=3)
            ends = [f(row[f"true_{quantity}"] for row in rows) for f in (min, max)]
            above.plot(ends, ends, color="black", linewidth=0.8)
            above.set_xscale("log")
            above.set_yscale("log")
            above.set_title(f"{words}, {middle} probes", fontsize="small")
            above.set_xlabel("true")
            above.set_ylabel("from sketches")
            for number, p in enumerate(sorted(probes)):
                places = [i + 0.25 * (number - (len(probes) - 1) / 2) for i in range(len(layers))]
                found = [
                    quartiles(
                        errors(
                            [r for r in rows if r["layer"] == layer and r["probes"] == p], quantity
                        )
                    )
                    for layer in layers
                ]
                bars = [[m - low for low, m, _ in found], [high - m for _, m, high in found]]
                medians = [m for _, m, _ in found]
                below.errorbar(
                    places,
                    medians,
                    bars,
                    fmt="o",
                    markersize=2.5,
                    linewidth=1,
                    color=f"C{number}",
                    label=f"{p} probes",
                )
            below.axhline(0, color="black", linewidth=0.8)
            below.set_xticks(
                range(len(layers)),
                [layer.removeprefix("blocks.") for layer in layers],
                rotation=90,
                fontsize=7,
            )
            below.set_ylabel("relative error: median, quartiles")
            for panel in (above, below):
                panel.grid(alpha=0.3)
        axes[len(QUANTITIES)].legend(fontsize="x-small", frameon=False)


def readings_csv(rows: list[dict[str, Any]]) -> str:
    """Every reading beside its true value, to six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
    )
    return text.getvalue()
