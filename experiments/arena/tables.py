"""The arena's tables and sentences: ranks, rates tried, error of dW, what is out of reach, and what
a practitioner may conclude.

What a row's numbers are and who is compared with whom: standings.py. A sentence is worded from the
numbers; *undecided* stands where an interval covers zero or there is none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from basis.diagnostics.budget import parse_share
from experiments.arena.standings import TOLERANCE, Standing
from harness.memory import format_bytes
from report.results import Group, RunResult, contender
from report.statistics import Estimate, estimate, p_text
from report.tables import Column, Table


def ranks(found: Sequence[Standing], timed: str) -> Table:
    """A row per contender, best loss first. timed: how, for the notes."""
    exact = next(s for s in found if s.above is None and s.group.method == "exact")
    rows = []
    for place, s in enumerate(found, start=1):
        off = s.off
        rows.append(
            {
                "rank": place if s.loss is not None else None,
                "method": s.label,
                "budget": s.budget,
                "share": s.share,
                "off": None if off is None or abs(off) <= TOLERANCE else f"{off:+.0%}",
                "dense": None if s.dense is None else format_bytes(s.dense),
                "dense_ratio": s.dense / exact.dense
                if s.dense is not None and exact.dense
                else None,
                "kept": format_bytes(s.kept),
                "state": format_bytes(s.state) if s.state else None,
                "seeds": len(s.group.runs),
                "diverged": len(s.group.diverged) or None,
                "lr": f"{s.group.runs[0].options['optim.lr']:g}",
                "val": s.loss,
                "above": s.above,
                "p": s.above and s.above.p,
                "step_ratio": s.step / exact.step if s.step and exact.step else None,
                "seconds": s.seconds,
                "front": ", ".join(s.fronts) or None,
            }
        )
    columns = {
        "rank": Column("rank"),
        "method": Column("method"),
        "budget": Column("budget"),
        "share": Column("share of X", digits=4),
        "off": Column("off budget by"),
        "dense": Column("dense bytes"),
        "dense_ratio": Column("of exact's", digits=3),
        "kept": Column("kept in all"),
        "state": Column("state"),
        "seeds": Column("seeds"),
        "diverged": Column("diverged"),
        "lr": Column("learning rate"),
        "val": Column("val loss", digits=4),
        "above": Column("above exact", digits=4, sign=True),
        "p": Column("p", p=True),
        "step_ratio": Column("step time / exact's", digits=2),
        "seconds": Column("training, s", digits=1),
        "front": Column("front by"),
    }
    notes = [
        "Losses in nats per token on held-out text, with 95% intervals over seeds, differences "
        "over pairs of equal seed; p-values are not corrected for the number of rows. Bytes: kept "
        "for backward by one micro-batch; state: between steps, on top. The head keeps no input, "
        "whatever the method. Of exact's: above the share of X since exact's dense layers keep no "
        "input of attention's projection, which attention keeps anyway. Training: sum of step "
        "times.",
        f"Off budget: where the measured share of X is off by more than {TOLERANCE:.0%} of the "
        "budget.",
    ]
    if timed:
        notes.append(timed)
    if any(s.loss is not None and s.loss.half_width is None for s in found):
        notes.append("A row with one seed carries no interval: nothing is known about other seeds.")
    return Table("arena", "Methods at equal bytes", columns, rows, notes)


def rates(found: Sequence[Standing], groups: Sequence[Group], tuning: Sequence[RunResult]) -> Table:
    """What was tried: a row per contender, a column per learning rate."""
    tried: dict[str, dict[float, list[float]]] = {}
    looked = tuning or [run for group in groups for run in group.runs]
    for run in looked:
        end = math.inf if run.diverged else run.last("val/loss")
        tried.setdefault(contender(run), {}).setdefault(float(run.options["optim.lr"]), []).append(
            end
        )
    every = sorted({rate for grid in tried.values() for rate in grid})
    rows = []
    for s in found:
        first = s.group.runs[0]
        grid = {
            rate: statistics.fmean(ends) for rate, ends in tried.get(contender(first), {}).items()
        }
        if len(grid) < 2:
            continue
        best = float(first.options["optim.lr"])
        row: dict[str, Any] = {"method": s.label, "chosen": f"{best:g}"}
        row |= {
            f"{rate:g}": end if math.isfinite(end) else "diverged" for rate, end in grid.items()
        }
        row["edge"] = "yes" if best in (min(grid), max(grid)) else None
        rows.append(row)
    columns = {"method": Column("method")} | {
        f"{rate:g}": Column(f"lr {rate:g}", digits=4) for rate in every
    }
    columns |= {"chosen": Column("chosen"), "edge": Column("at the edge of its grid")}
    notes = [
        "Final validation loss in nats per token of the runs that only tuned, which enter no "
        "average; without such runs, means over the seeds. A choice at the edge: a rate beyond it "
        "may be better still. Accumulation and checkpoints take exact's rate."
    ]
    return Table("arena_rates", "Learning rates tried", columns, rows, notes)


def quality(found: Sequence[Standing]) -> Table:
    """Error of dW beside the loss, of those whose runs looked at it."""
    rows = [{"method": s.label, **s.quality, "above": s.above} for s in found if s.quality]
    columns = {
        "method": Column("method"),
        "relative_error": Column("relative error of dW"),
        "cosine": Column("cosine to exact dW"),
        "above": Column("val loss above exact", digits=4, sign=True),
    }
    notes = [
        "All sketched layers as one vector, one micro-batch, one draw; means over the looks "
        "of a run and over seeds."
    ]
    return Table("arena_quality", "Error of dW and loss", columns, rows, notes)


def refused(ledgers: Sequence[Mapping[str, Any]]) -> Table:
    """What can't keep to a budget."""
    rows = [dict(line) for ledger in ledgers for line in ledger.get("refused", [])]
    columns = {
        "method": Column("method"),
        "budget": Column("budget"),
        "reason": Column("why it has no runs"),
    }
    return Table("arena_refused", "Budgets out of reach", columns, rows)


def conclusions(found: Sequence[Standing], out_of_reach: Table) -> list[str]:
    """One sentence per question, worded from the numbers; *undecided* where an interval covers zero
    or there is none.
    """
    sentences = []
    exact = next((s for s in found if s.above is None and s.group.method == "exact"), None)
    if exact is None:
        return []
    budgets = sorted({s.budget for s in found if s.budget}, key=parse_share, reverse=True)
    for budget in budgets:
        sentences += _at_budget(budget, [s for s in found if s.budget == budget], found, exact)
    for budget in sorted(
        {line["budget"] for line in out_of_reach.rows}, key=parse_share, reverse=True
    ):
        names = ", ".join(line["method"] for line in out_of_reach.rows if line["budget"] == budget)
        sentences.append(f"Out of reach at {budget} of the bytes: {names}.")
    for s in found:
        if s.group.method == "zeroth_order" and s.above is not None:
            sentences.append(f"The floor: {s.label} keeps nothing and ends {_nats(s.above)}.")
    pairs = [
        (s.quality["relative_error"], s.above.mean)
        for s in found
        if "relative_error" in s.quality and s.above
    ]
    if len(pairs) >= 4:
        from scipy import stats

        rho, p = stats.spearmanr(*zip(*pairs, strict=True))
        sentences.append(
            f"Over {len(pairs)} contenders the relative error of dW and the loss above exact "
            "have a "
            f"rank correlation of {rho:+.2f} (p-value {p_text(float(p))})."
        )
    return sentences


def _at_budget(
    budget: str, here: Sequence[Standing], found: Sequence[Standing], exact: Standing
) -> list[str]:
    """The best at a budget against exact, the next, and what exact does with as many bytes."""
    alive = [s for s in here if s.loss is not None and s.above is not None]
    sentences = [f"At {budget} of the bytes, {s.label} diverged." for s in here if s.loss is None]
    if not alive:
        return sentences
    best = alive[0]  # in order of loss
    assert best.above is not None
    time = (
        f" at {best.step / exact.step:.2f} times its step time" if best.step and exact.step else ""
    )
    chosen = (
        f", the best of {len(alive)} on these very seeds," if len(alive) > 1 else ""
    )  # which flatters it
    sentences.append(
        f"At {budget} of the bytes, {best.label}{chosen} ends {_nats(best.above)}{time}."
    )
    sentences += [
        f"At {budget}, next is {other.label}: {_against(best, other)}." for other in alive[1:2]
    ]
    if exact.dense:
        limit = parse_share(budget) * (1 + TOLERANCE) * exact.dense
        fitting = [
            (s.dense, s)
            for s in found
            if s.group.method == "exact" and s.dense is not None and s.dense <= limit
        ]
        most = max((size for size, _ in fitting), default=None)
        sentences += [
            f"At {budget}, {best.label} beside {s.label} ({size / exact.dense:.3g} of exact's "
            f"dense bytes): {_against(best, s)}."
            for size, s in fitting
            if size == most and s.loss is not None
        ]
    return sentences


def _nats(above: Estimate) -> str:
    """ "within 0.020 nats of exact (+0.010 ± 0.010, 3 pairs): undecided which is better"."""
    pairs = "one pair" if above.count == 1 else f"{above.count} pairs"
    shown = f"{above.text(4, sign=True)}, {pairs}"
    if above.half_width is None:
        return (
            f"{above.mean:+.4f} nats from exact ({pairs}): undecided, one pair having no interval"
        )
    if above.low <= 0.0 <= above.high:
        furthest = max(-above.low, above.high)
        return f"within {furthest:.4f} nats of exact ({shown}): undecided which is better"
    return (
        f"{abs(above.mean):.4f} nats {'worse' if above.mean > 0 else 'better'} than exact ({shown})"
    )


def _against(best: Standing, other: Standing) -> str:
    """The difference of two contenders over their pairs of seeds, judged."""
    shared = [seed for seed in best.by_seed if seed in other.by_seed]
    if not shared:
        return "undecided, no seed in common"
    difference = estimate([best.by_seed[seed] - other.by_seed[seed] for seed in shared])
    shown = f"{difference.text(4, sign=True)} nats"
    if difference.half_width is None:
        return f"{shown}, undecided, one pair having no interval"
    if difference.low <= 0.0 <= difference.high:
        return f"{shown}, undecided, the interval covers zero"
    return f"{shown}, {best.label if difference.mean < 0 else other.label} is better"
