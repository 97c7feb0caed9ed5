"""How steadily a run learned, and how good its estimates of dW were.

Per group, over all its runs, diverged ones included:

- *evaluations that got worse*: share of evaluations whose validation loss is higher than that of the one before, and the largest
  such rise in nats. The windows are the same each time, so a rise is of the weights, not of the text.
- *momentum*: 2-norm of the optimiser's running mean of gradients, its mean over the log after the first tenth of the run, and its
  coefficient of variation there (standard deviation / mean): the "steady magnitude" that the paper credits R = 1's smoothness to.
- *quality of dW* (runs with diagnostics.every): cosine of the sketched to the exact dW of all sketched layers together, and the
  ratio of their norms, means over the looks.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from harness.report.statistics import Estimate, estimate
from harness.report.tables import Column, Table
from harness.results import Group, RunResult


def rises(run: RunResult) -> list[float]:
    """Change of the validation loss from each evaluation to the next; a loss that is no number counts as infinite."""
    losses = [loss if math.isfinite(loss) else math.inf for loss in run.series("val/loss")[1]]
    return [after - before if before < math.inf else 0.0 for before, after in itertools.pairwise(losses)]


def share_worse(run: RunResult) -> float | None:
    """Share of evaluations after the first that got worse."""
    changes = rises(run)
    return sum(change > 0 for change in changes) / len(changes) if changes else None


def largest_rise(run: RunResult) -> float | None:
    """Largest rise between two evaluations in nats, 0 if the loss never rose."""
    changes = rises(run)
    return max(0.0, *changes) if changes else None


def momentum(run: RunResult) -> tuple[float, float] | None:
    """Mean of the momentum's norm after the first tenth of the run, and its coefficient of variation; None if not logged."""
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


def _over_runs(values: Sequence[float | None]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return estimate(known) if known else None


def stability(groups: Sequence[Group]) -> Table:
    """A row per group."""
    rows = []
    for group in groups:
        norms = [momentum(run) for run in group.runs]
        reasons = sorted({run.summary["step"] for run in group.diverged})
        rows.append(
            {
                "method": group.label,
                "seeds": len(group.runs),
                "diverged": f"{len(group.diverged)} of {len(group.runs)}, at step {reasons[0]:,}" if reasons else "no",
                "evaluations": sum(len(rises(run)) for run in group.runs),
                "worse": _over_runs([None if (s := share_worse(run)) is None else 100 * s for run in group.runs]),
                "rise": max((rise for run in group.runs if (rise := largest_rise(run)) is not None), default=None),
                "final": _over_runs([run.last("val/loss") for run in group.runs if not run.diverged]),
                "momentum": _over_runs([pair and pair[0] for pair in norms]),
                "variation": _over_runs([pair and pair[1] for pair in norms]),
                "cosine": _over_runs([mean_of(run, "sketch/all/cosine") for run in group.runs]),
                "norm_ratio": _over_runs([mean_of(run, "sketch/all/norm_ratio") for run in group.runs]),
                "runs": [run.id for run in group.runs],
            }
        )
    columns = {
        "method": Column("method"),
        "seeds": Column("seeds"),
        "diverged": Column("diverged"),
        "evaluations": Column("evaluations"),
        "worse": Column("got worse, %", digits=1),
        "rise": Column("largest rise, nats"),
        "final": Column("last val loss, nats"),
        "momentum": Column("momentum norm", digits=2),
        "variation": Column("its variation"),
        "cosine": Column("cosine of dW", digits=2),
        "norm_ratio": Column("norm ratio of dW", digits=2),
        "runs": Column("run ids"),
    }
    notes = [
        "Got worse: share of evaluations with a higher validation loss than the one before, same windows each time. Momentum: "
        "2-norm of the optimiser's running mean of gradients after the first tenth of the run, and its standard deviation "
        "divided by its mean. Cosine and norm ratio: sketched against exact dW of the same step, all sketched layers together. "
        "± 95% interval over seeds."
    ]
    return Table("stability", "Stability", columns, rows, notes)
