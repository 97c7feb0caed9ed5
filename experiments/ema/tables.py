"""Table, looks and figure of the small experiments: score, bytes, what is kept of the gradient,
rank.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.timing import machine
from data.storage import write_atomic
from experiments.ema.task import Outcome, Setting
from report.figures import canvas
from report.statistics import Estimate, estimate
from report.tables import Column, Table


def _estimate(values: Sequence[float]) -> Estimate | None:
    finite = [value for value in values if math.isfinite(value)]
    return estimate(finite) if finite else None


def table(settings: Sequence[Setting], name: str, title: str, score: str, digits: int) -> Table:
    """A line per setting and method: means over seeds with 95% intervals; differences to exact are
    of pairs of equal seeds.
    """
    rows: list[dict[str, Any]] = []
    for setting in settings:
        exact = {outcome.seed: outcome.score for outcome in setting.of("exact")}
        for label in setting.labels():
            runs = setting.of(label)
            differences = [run.score - exact[run.seed] for run in runs] if label != "exact" else []
            most = max(runs, key=lambda run: run.bytes_kept + run.bytes_state)
            rows.append(
                {
                    "setting": setting.name,
                    "method": label,
                    "score": _estimate([run.score for run in runs]),
                    "difference": _estimate(differences),
                    "cosine": _estimate([run.mean("cosine") for run in runs]),
                    "share_kept": _estimate([run.mean("share_kept") for run in runs]),
                    "rank": _ranks(runs),
                    "kept": most.bytes_kept,
                    "state": most.bytes_state,
                    "of_exact": (most.bytes_kept + most.bytes_state) / most.bytes_exact,
                    "seeds": len(runs),
                    "diverged": sum(run.diverged is not None for run in runs) or None,
                }
                | machine()
            )
    columns = {
        "setting": Column("setting"),
        "method": Column("method"),
        "score": Column(score, digits=digits),
        "difference": Column("minus exact", digits=digits, sign=True),
        "cosine": Column("cosine of dW", digits=2),
        "share_kept": Column("kept of the gradient", digits=2),
        "rank": Column("rank, first to last"),
        "kept": Column("kept for backward, bytes"),
        "state": Column("state, bytes"),
        "of_exact": Column("both, of exact", digits=2),
        "seeds": Column("seeds"),
        "diverged": Column("diverged"),
    }
    columns |= {key: Column(key) for key in ("machine", "torch", "commit")}
    notes = [
        "Means over seeds with 95% intervals. Cosine and kept of the gradient: means over the "
        "looks after step 0. Bytes: of the sketched layers, the most at any step. Rank: where "
        "layers have different ones, the largest."
    ]
    return Table(name, title, columns, rows, notes)


def _ranks(runs: Sequence[Outcome]) -> str | None:
    ends = [[look["rank"] for look in run.looks if "rank" in look] for run in runs]
    ends = [ranks for ranks in ends if ranks]
    if not ends:
        return None
    first, last = ends[0][0], sorted({ranks[-1] for ranks in ends})
    if last == [first]:
        return f"{first}"
    return f"{first} to {last[0]}" + (f"-{last[-1]}" if len(last) > 1 else "")


def looks_csv(settings: Sequence[Setting]) -> str:
    """Every look of every training, to six digits."""
    names = ["setting", "method", "seed", "step", "score", "rank", "cosine", "share_kept"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for setting in settings:
        for run in setting.outcomes:
            for seen in run.looks:
                numbers = {key: f"{value:.6g}" for key, value in seen.items()}
                writer.writerow(
                    {"setting": setting.name, "method": run.variant, "seed": run.seed} | numbers
                )
    return text.getvalue()


def draw(settings: Sequence[Setting], path: Path, score: str, *, log: bool) -> None:
    """A line of panels per setting, against the step: score, kept of the gradient, rank; means over
    seeds, bands of 95%.

    log: of the score; a band that would reach far below its mean, or 0, is cut off at 0.3 of it.
    """
    labels = settings[0].labels()
    panels = (
        ("score", score),
        ("share_kept", "kept of the gradient"),
        ("rank", "rank (the largest of the layers)"),
    )
    with canvas(path, len(panels), len(labels), lines=len(settings)) as (figure, axes):
        for line, setting in enumerate(settings):
            for column, (name, words) in enumerate(panels):
                panel = axes[line * len(panels) + column]
                for number, label in enumerate(labels):
                    colour = "black" if label == "exact" else f"C{number - 1}"
                    steps, means = _curve(setting.of(label), name)
                    if not steps:
                        continue
                    style = "--" if label == "exact" else "-"
                    panel.plot(
                        steps,
                        [m.mean for m in means],
                        style,
                        color=colour,
                        linewidth=1.4,
                        label=label,
                    )
                    if name == "score" and means[0].half_width is not None:
                        low, high = [m.low for m in means], [m.high for m in means]
                        if log:  # an interval may reach below 0, which has no place on the axis
                            low = [
                                max(value, 0.3 * m.mean)
                                for value, m in zip(low, means, strict=True)
                            ]
                        panel.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
                if name == "score" and log:
                    panel.set_yscale("log")
                if name == "rank":
                    panel.set_yscale("log")
                    panel.yaxis.set_major_formatter("{x:g}")
                if name == "share_kept":
                    panel.axhline(1, color="grey", linewidth=0.8)
                panel.set_xlabel("step")
                panel.set_ylabel(words)
                panel.grid(alpha=0.3)
                if column == 0:
                    panel.set_title(setting.name, fontsize="small", loc="left")
        handles, found = axes[0].get_legend_handles_labels()
        figure.legend(handles, found, loc="outside lower center", ncols=4, frameon=False)


def _curve(runs: Sequence[Outcome], name: str) -> tuple[list[int], list[Estimate]]:
    """Steps that all runs have a finite number at, and its mean and interval there."""
    curves = [
        {int(s["step"]): s[name] for s in run.looks if math.isfinite(s.get(name, math.nan))}
        for run in runs
    ]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, [estimate([curve[step] for curve in curves]) for step in steps]


def write(
    settings: Sequence[Setting],
    out: Path,
    name: str,
    title: str,
    score: str,
    *,
    digits: int,
    log: bool,
) -> None:
    """Table (printed too), looks and figure into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    found = table(settings, name, title, score, digits)
    print(found.markdown())
    found.write(out / f"{name}.csv")
    write_atomic(out / f"{name}_looks.csv", looks_csv(settings))
    draw(settings, out / f"{name}.svg", score, log=log)
