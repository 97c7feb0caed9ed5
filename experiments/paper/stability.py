"""How steadily a run learned, and how good its estimates of dW were.

Per group, over all its runs, diverged ones included:

- *evaluations that got worse*: how many evaluations found a higher validation loss than the one
  before, and the largest such rise in nats. The windows are the same each time, so a rise is of the
  weights, not of the text.
- *momentum*: 2-norm of the optimiser's momentum buffer (SGD's is a discounted sum of gradients,
  AdamW's a mean), its mean over the log after the first tenth of the run, and its coefficient of
  variation there (standard deviation / mean; a drift counts too): the "steady magnitude" that the
  paper credits R = 1's smoothness to.
- *quality of dW* (runs with diagnostics.every): cosine of the sketched to the exact dW of all
  sketched layers together, and the ratio of their norms, means over the looks.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from report.figures import Figure, Line, Panel, colors, columns, mean_curve, mean_line, seeds_label
from report.results import Group, RunResult, differing_options, setting
from report.statistics import Estimate, estimate
from report.tables import Column, Table


def rises(run: RunResult) -> list[float]:
    """Change of the validation loss from each evaluation to the next; a loss that is no number
    counts as infinite.
    """
    losses = [loss if math.isfinite(loss) else math.inf for loss in run.series("val/loss")[1]]
    return [
        after - before if before < math.inf else 0.0 for before, after in itertools.pairwise(losses)
    ]


def largest_rise(run: RunResult) -> float | None:
    """Largest rise between two evaluations in nats, 0 if the loss never rose."""
    changes = rises(run)
    return max(0.0, *changes) if changes else None


def momentum(run: RunResult) -> tuple[float, float] | None:
    """Mean of the momentum's norm after the first tenth of the run, and its coefficient of
    variation; None if not logged.
    """
    steps, norms = run.series("momentum_norm")
    late = [norm for step, norm in zip(steps, norms, strict=True) if step > steps[-1] / 10]
    if len(late) < 2 or not all(math.isfinite(norm) for norm in late):
        return None
    mean = statistics.fmean(late)
    return (mean, statistics.stdev(late) / mean) if mean else None


def mean_of(run: RunResult, metric: str) -> float | None:
    """Mean of a logged metric over its finite values."""
    values = [value for value in run.series(metric)[1] if math.isfinite(value)]
    return statistics.fmean(values) if values else None


def worse_count(group: Group) -> tuple[int, int]:
    """Evaluations of all runs that got worse, and all that had one before."""
    changes = [change for run in group.runs for change in rises(run)]
    return sum(change > 0 for change in changes), len(changes)


def _over_runs(values: Sequence[float | None]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return estimate(known) if known else None


def stability(groups: Sequence[Group]) -> Table:
    """A row per group."""
    rows = []
    for group in groups:
        norms = [momentum(run) for run in group.runs]
        worse, evaluations = worse_count(group)
        first = min((run.diverged_at for run in group.diverged), default=None)
        rows.append(
            {
                "method": group.label,
                "seeds": len(group.runs),
                "diverged": "no"
                if first is None
                else f"{len(group.diverged)} of {len(group.runs)}, first at step {first:,}",
                "worse": worse,
                "evaluations": evaluations,
                "share": 100 * worse / evaluations if evaluations else None,
                "rise": max(
                    (rise for run in group.runs if (rise := largest_rise(run)) is not None),
                    default=None,
                ),
                "final": None
                if group.diverged
                else _over_runs([run.last("val/loss") for run in group.runs]),
                "momentum": _over_runs([pair and pair[0] for pair in norms]),
                "variation": _over_runs([pair and pair[1] for pair in norms]),
                "cosine": _over_runs([mean_of(run, "sketch/all/cosine") for run in group.runs]),
                "norm_ratio": _over_runs(
                    [mean_of(run, "sketch/all/norm_ratio") for run in group.runs]
                ),
                "runs": [run.id for run in group.runs],
            }
        )
    shown = {
        "method": Column("method"),
        "seeds": Column("seeds"),
        "diverged": Column("diverged"),
        "worse": Column("evaluations that got worse"),
        "evaluations": Column("of"),
        "share": Column("%", digits=0),
        "rise": Column("largest rise, nats"),
        "final": Column("last val loss, nats"),
        "momentum": Column("momentum norm", digits=2),
        "variation": Column("its variation"),
        "cosine": Column("cosine of dW", digits=2),
        "norm_ratio": Column("norm ratio of dW", digits=2),
        "runs": Column("run ids"),
    }
    notes = [
        "Got worse: a higher validation loss than at the evaluation before, same windows each "
        "time. Momentum: 2-norm of the optimiser's momentum buffer after the first tenth of the "
        "run, and its standard deviation over the log divided by its mean. Cosine and norm ratio: "
        "sketched against exact dW of the same step, all sketched layers together. ± 95% interval "
        "over seeds."
    ]
    return Table("stability", "Stability", shown, rows, notes)


def stability_curves(groups: Sequence[Group]) -> Figure:
    """Validation loss (first row) and norm of the momentum (second) against steps; a column for
    each setting, such as a learning rate.
    """
    by_setting: dict[str, list[Group]] = {}
    for group in groups:
        by_setting.setdefault(setting(group.runs[0]), []).append(group)
    titles = differing_options([members[0].runs[0] for members in by_setting.values()])
    losses, norms = [], []
    for members, title in zip(by_setting.values(), titles, strict=True):
        hues = colors(members)
        lines = [
            mean_line(group, "val/loss", hue, None)
            for group, hue in zip(members, hues, strict=True)
        ]
        first = max((line.y[0] for line in lines if line.y), default=0.0)
        lowest = min((y for line in lines for y in line.y), default=0.0)
        # A loss that runs away leaves the picture.
        limits = (0.95 * lowest, 1.1 * first) if first else None
        losses.append(
            Panel("step", "validation loss (nats per token)", lines, title=title, limits=limits)
        )
        named = [
            mean_line(group, "momentum_norm", hue, seeds_label(group).replace(f" {title}", ""))
            for group, hue in zip(members, hues, strict=True)
        ]
        norms.append(Panel("step", "2-norm of the momentum", named, log_y=True, legend=True))
    return Figure("stability", "Loss and momentum", [*losses, *norms], rows=2)


def quality_curves(groups: Sequence[Group]) -> Figure:
    """Cosine and norm ratio of sketched to exact dW against steps, of the groups whose runs looked
    at them.
    """
    shown = [group for group in groups if mean_curve(group, "sketch/all/cosine")[0]]
    hues = colors(shown)

    def lines(metric: str) -> list[Line]:
        return [
            mean_line(group, f"sketch/all/{metric}", hue, seeds_label(group))
            for group, hue in zip(shown, hues, strict=True)
        ]

    panels = [
        Panel("step", "cosine of sketched to exact dW", lines("cosine")),
        Panel("step", "norm of sketched / exact dW", lines("norm_ratio"), log_y=True),
    ]
    legend = columns(group.label for group in shown)
    return Figure("gradient_quality", "Quality of dW", panels, legend=legend)
