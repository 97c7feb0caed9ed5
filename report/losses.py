"""Final losses (Table 3 of the paper) and paired differences to exact backpropagation.

Losses are in nats per token. The validation losses are computed again from checkpoints
(recompute.py); the train loss is the log's, as the mean over the last 1,000 steps and as the last
step alone (64 tokens in the paper's setting; its code reports that).

Two runs of equal seed and equal options except the method's start from the same weights and read
the same text, so their difference has less noise than their losses have. Means, intervals and
p-values are over seeds (statistics.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from basis.estimators import ESTIMATORS
from harness.memory import format_bytes
from report.published import Published
from report.recompute import Losses
from report.results import Group, RunResult, setting
from report.statistics import Estimate, estimate
from report.tables import Column, Table

LAST_STEPS = 1000

Recomputed = Mapping[str, Losses]
"""Losses by run id, of all runs that did not diverge."""


def late_train_loss(run: RunResult) -> float:
    """Mean training loss of the last 1,000 steps (all of them in a shorter run); NaN if none was
    logged.

    A row is the mean over the steps since the row before, and counts by as many of them as lie in
    this stretch.
    """
    steps, losses = run.series("train/loss")
    total = weight = 0.0
    for previous, step, loss in zip([0, *steps], steps, losses, strict=False):
        overlap = max(step - max(previous, steps[-1] - LAST_STEPS), 0)
        total += overlap * loss if overlap else 0.0
        weight += overlap
    return total / weight if weight else math.nan


def compression(group: Group) -> float | None:
    """Rows per row kept, B / R, in a sketched layer; None if its rank is not a number of rows."""
    options = group.runs[0].options
    if group.method != "basis" or group.rank is None:
        return 1.0 if group.method == "exact" else None
    rows = options["micro_batch_size"] * options["model.block_size"]
    return float(rows / min(group.rank, rows))


def _known(values: Sequence[float | None]) -> Estimate | None:
    """Their mean and interval; None if one of them is not known."""
    known = [value for value in values if value is not None]
    return estimate(known) if len(known) == len(values) else None


def _bytes(size: float) -> str | None:
    return format_bytes(size) if math.isfinite(size) else None


def final_losses(
    groups: Sequence[Group], recomputed: Recomputed, published: Published | None = None
) -> Table:
    """A row per group. The paper's columns are filled where a group repeats a published run."""
    rows = []
    for group in groups:
        ended = [run for run in group.runs if not run.diverged]
        dense = ("mem/saved_bytes/linear inputs", "mem/saved_bytes/sketches")
        first = group.runs[0]
        milliseconds = [
            1000 * value for run in group.runs for value in run.series("step_seconds")[1]
        ]
        paper = published.losses(group) if published else None
        row = {
            "method": group.label,
            "options": group.options,
            "seeds": len(group.runs),
            "diverged": len(group.diverged) or None,
            "steps": first.options["steps"],
            "compression": compression(group),
            "paper_train": paper and paper.train_loss,
            "paper_val": paper and paper.val_loss,
            "kept_dense": _bytes(sum(first.last(name) for name in dense)),
            "kept_all": _bytes(first.last("mem/saved_bytes")),
            "state": _bytes(first.last("mem/estimator_bytes"))
            if first.last("mem/estimator_bytes")
            else None,
            "step_time": statistics.median(milliseconds) if milliseconds else None,
            "runs": [run.id for run in group.runs],
        }
        if ended and not group.diverged:  # a mean over those that survived would flatter the group
            row |= {
                "train": estimate([late_train_loss(run) for run in ended]),
                "train_last": estimate([run.last("train/loss_last_step") for run in ended]),
                "val": estimate([recomputed[run.id].held_out for run in ended]),
                "val_as_published": _known([recomputed[run.id].as_published for run in ended]),
            }
        rows.append(row)
    columns = {
        "method": Column("method"),
        "options": Column("every option that varies", data=True),
        "seeds": Column("seeds"),
        "diverged": Column("diverged"),
        "steps": Column("steps"),
        "compression": Column("B/R", digits=0),
        "train": Column("train loss, last 1,000 steps"),
        "train_last": Column("train loss, last step"),
        "paper_train": Column("paper: train"),
        "val": Column("val loss, held out"),
        "val_as_published": Column("val loss, text also trained on"),
        "paper_val": Column("paper: val"),
        "kept_dense": Column("kept by dense layers"),
        "kept_all": Column("kept in all"),
        "state": Column("state"),
        "step_time": Column("step, ms", digits=1),
        "runs": Column("run ids"),
    }
    where = f"on held-out text, and {published.validates}" if published else "on held-out text"
    notes = [
        "Losses in nats per token. Validation losses are computed again from the last checkpoint: "
        f"{where}. Kept: bytes held for backward by one micro-batch; the head is not among "
        "the dense layers there, since it forms its gradient with the loss and keeps no input, "
        "whatever the method. Step time: median over the log, on a machine that may have done "
        "other work beside."
    ]
    if any(row["state"] for row in rows):
        notes.append(
            "State: what layers hold between steps, on top of what is kept; the optimiser's is not "
            "in it."
        )
    stored = sorted(
        {
            g.method
            for g in groups
            if (kind := ESTIMATORS.get(g.method)) and kind.state_replaces_input
        }
    )
    if stored:
        notes.append(
            f"{' and '.join(stored)}: the state stands in for the layers' inputs, so what it keeps "
            "of them is both columns together, kept by dense layers and state; a budget counts "
            "both."
        )
    if published and any(row["paper_val"] for row in rows):
        notes.append(published.note)
    if any(group.options for group in groups):
        unnamed = f" (where they are not named: {groups[0].usual})" if groups[0].usual else ""
        notes.append(
            "So many options vary that a row names only those in which it differs from most "
            f"rows{unnamed}; all of them stand in the .csv of this table, column `options`."
        )
    if any(row["seeds"] == 1 for row in rows):
        notes.append("A row with one seed carries no interval: nothing is known about other seeds.")
    return Table("final_losses", "Final losses", columns, rows, notes)


def paired(group: Group, other: Group, value: Callable[[RunResult], float]) -> Estimate | None:
    """Mean of value(run of `group`) - value(run of `other`) over the seeds that both have.

    None if there is no such seed, and if any run of either diverged: the mean over those that
    survived would flatter.
    """
    if group.diverged or other.diverged:
        return None
    partners = {run.seed: run for run in other.runs}
    differences = [
        value(run) - value(partners[run.seed]) for run in group.runs if run.seed in partners
    ]
    return estimate(differences) if differences else None


def exact_partner(group: Group, groups: Sequence[Group]) -> Group | None:
    """The group of exact runs that share everything with `group` but the method."""
    wanted = setting(group.runs[0])
    return next(
        (other for other in groups if other.method == "exact" and setting(other.runs[0]) == wanted),
        None,
    )


def differences(
    groups: Sequence[Group], recomputed: Recomputed, published: Published | None = None
) -> Table:
    """A row per group that has exact partners."""
    rows = []
    for group in groups:
        exact = exact_partner(group, groups)
        if exact is None or group.method == "exact":
            continue
        val = paired(group, exact, lambda run: recomputed[run.id].held_out)
        if val is None:
            continue
        train = paired(group, exact, late_train_loss)
        paper = published.losses(group) if published else None
        rows.append(
            {
                "method": group.label,
                "pairs": val.count,
                "val": val,
                "val_p": val.p,
                "train": train,
                "train_p": train and train.p,
                "paper": paper.val_loss - published.exact.val_loss if paper and published else None,
                "runs": [run.id for run in group.runs],
            }
        )
    columns = {
        "method": Column("method"),
        "pairs": Column("pairs"),
        "val": Column("val loss above exact", sign=True),
        "val_p": Column("p", p=True),
        "train": Column("train loss above exact", sign=True),
        "train_p": Column("p (train)", p=True),
        "paper": Column("paper: val above exact", sign=True),
        "runs": Column("run ids"),
    }
    notes = [
        "Mean over pairs of equal seed (same weights at the start, same text), 95% interval and "
        "p-value of a t-test. Validation on held-out text; train loss over the last 1,000 steps. "
        "p-values are not corrected for the number of rows. The paper's differences are of single, "
        "unpaired runs. Groups with diverged runs have no row."
    ]
    return Table("differences", "Paired differences to exact", columns, rows, notes)
