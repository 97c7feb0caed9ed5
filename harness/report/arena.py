"""Methods at equal bytes: who loses how much, for how many bytes and seconds, and what can't be said.

A *contender* is all that is the same in a set of runs but seed and learning rate. Of several rates the one counts that was run on
the most seeds, of those the one with the lowest mean loss; runs made for tuning alone (results.py) only show what was tried. All
are compared with *exact*: float32, everything kept, the largest batch. Differences are over pairs of equal seed, which start from
the same weights; of equal batches they also read the same text.

- *share of X*: bytes that the sketched layers keep, over the bytes of their inputs X: what method.budget promises layer by layer.
- *dense bytes*: what dense layers keep, inputs and sketches together, and as a ratio to exact's. That ratio is larger than the
  share: the input of attention's projection is kept by attention anyway, so exact's dense layers keep 6 tensors of a block's
  width where the methods sketch 7. Recomputed blocks have no such number.
- *state*: what a method remembers between steps. It comes on top of what is kept.
- *seconds*: sum of step times, without evaluation, diagnostics and checkpoints.
- *front*: nothing else is at most as costly and at most as bad; by dense bytes, all bytes with state, and seconds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from basis.budget import parse_share
from harness.memory import format_bytes
from harness.report.losses import Recomputed, paired
from harness.report.statistics import Estimate, estimate, p_text
from harness.report.tables import Column, Table
from harness.results import Group, RunResult, contender, world
from models import GPT, GPTConfig

TOLERANCE = 0.1
"""How far, as a part of the budget, the measured share of X may be off before it is flagged."""


@dataclass
class Standing:
    """A contender with its numbers. Bytes of one micro-batch, seconds of a whole run; None: not known or not defined."""

    label: str
    group: Group
    budget: str | None
    loss: Estimate | None
    above: Estimate | None
    dense: float | None
    kept: float
    state: float
    share: float | None
    step: float | None
    seconds: float | None
    quality: dict[str, float]
    by_seed: dict[int, float]  # final losses, none where a run diverged
    fronts: list[str] = field(default_factory=list)

    @property
    def off(self) -> float | None:
        """By what part of the budget the measured share of X is off."""
        return None if self.share is None or self.budget is None else self.share / parse_share(self.budget) - 1.0


def is_arena(groups: Sequence[Group]) -> bool:
    """Whether runs compare methods at budgets, or several methods: then these tables are made without being asked for."""
    return any(group.runs[0].options.get("method.budget") for group in groups) or len({g.method for g in groups}) > 2


def reference(groups: Sequence[Group]) -> Group | None:
    """The runs of plain exact backpropagation with the largest batch, of several lengths the shortest; their best rate."""

    def plain(group: Group) -> bool:
        o = group.runs[0].options
        whole = o["tokens_per_step"] in (None, o["micro_batch_size"] * o["model.block_size"])
        return group.method == "exact" and o["activations.name"] == "plain" and o["precision"] == "float32" and whole

    found = [group for group in groups if plain(group)]
    if not found:
        return None
    first = min(found, key=lambda g: (-g.runs[0].options["micro_batch_size"], g.runs[0].options["steps"]))
    return _chosen([group for group in found if contender(group.runs[0]) == contender(first.runs[0])])


def _chosen(rates: Sequence[Group]) -> Group:
    """Of one contender's groups, one per rate, the one that counts."""

    def mean(group: Group) -> float:
        ends = [math.inf if run.diverged else run.last("val/loss") for run in group.runs]
        return statistics.fmean(ends)

    return min(rates, key=lambda group: (-len(group.runs), mean(group)))


def standings(groups: Sequence[Group], recomputed: Recomputed) -> list[Standing]:
    """All contenders in order of loss, those that diverged last; an empty list without exact runs to compare with."""
    exact = reference(groups)
    if exact is None:
        return []
    by_contender: dict[str, list[Group]] = {}
    for group in groups:
        if world(group.runs[0]) == world(exact.runs[0]):
            by_contender.setdefault(contender(group.runs[0]), []).append(group)
    chosen = [_chosen(rates) for rates in by_contender.values()]
    found = [_standing(group, exact, chosen, recomputed) for group in chosen]
    costs: dict[str, Callable[[Standing], float | None]] = {
        "dense bytes": lambda s: None if s.dense is None else s.dense + s.state,
        "all bytes": lambda s: s.kept + s.state,
        "seconds": lambda s: s.seconds,
    }
    for name, cost in costs.items():
        for standing in front(found, cost):
            standing.fronts.append(name)
    return sorted(found, key=lambda s: math.inf if s.loss is None else s.loss.mean)


def front(found: Sequence[Standing], cost: Callable[[Standing], float | None]) -> list[Standing]:
    """Those that no other beats or equals in both cost and loss (and beats in one), in order of cost."""
    points = [(c, s.loss.mean, s) for s in found if s.loss is not None and (c := cost(s)) is not None]
    best = [
        (c, s)
        for c, loss, s in points
        if not any(d <= c and other <= loss and (d, other) != (c, loss) for d, other, _ in points)
    ]
    return [s for _, s in sorted(best, key=lambda pair: pair[0])]


def _standing(group: Group, exact: Group, everyone: Sequence[Group], recomputed: Recomputed) -> Standing:
    first = group.runs[0]

    def value(run: RunResult) -> float:
        return recomputed[run.id].held_out

    times = [seconds for run in group.runs for seconds in run.series("step_seconds")[1]]
    ended = [] if group.diverged else group.runs  # a mean over those that survived would flatter
    dense: float | None = sum(first.last(f"mem/saved_bytes/{name}") for name in ("linear inputs", "sketches"))
    return Standing(
        label=label(first.options, exact.runs[0].options, [other.runs[0].options for other in everyone]),
        group=group,
        budget=first.options.get("method.budget"),
        loss=estimate([value(run) for run in ended]) if ended else None,
        by_seed={run.seed: value(run) for run in ended},
        above=None if group is exact else paired(group, exact, value),
        dense=None if first.options["activations.name"] in ("checkpoint", "budget") else dense,
        kept=first.last("mem/saved_bytes"),
        state=first.last("mem/estimator_bytes"),
        share=share_of_inputs(first),
        step=statistics.median(times) if times else None,
        seconds=statistics.fmean([training_seconds(run) for run in ended]) if ended else None,
        quality=_quality(group),
    )


def share_of_inputs(run: RunResult) -> float | None:
    """Bytes kept by the sketched layers over the bytes of their inputs; None if no layer is sketched.

    Inputs are counted layer by layer, in the precision of the run.
    """
    names = run.summary["sketched_layers"]
    if not names:
        return None
    options = {k.removeprefix("model."): v for k, v in run.options.items() if k.startswith("model.")}
    with torch.device("meta"):
        layers = dict(GPT(GPTConfig(**options | {"vocab_size": 1})).named_modules())
    rows = run.options["micro_batch_size"] * run.options["model.block_size"]
    size = 2 if run.options["precision"] == "bfloat16" else 4
    inputs = sum(rows * int(getattr(layers[name], "in_features")) * size for name in names if name != "head")  # noqa: B009
    return run.last("mem/saved_bytes/sketches") / inputs if inputs else None


def training_seconds(run: RunResult) -> float:
    """Sum of the step times: each row's holds for the steps since the row before."""
    steps, seconds = run.series("step_seconds")
    return math.fsum((step - before) * value for before, step, value in zip([0, *steps], steps, seconds, strict=False))


def _quality(group: Group) -> dict[str, float]:
    """Mean over looks and seeds of the relative error and the cosine of all sketched layers' dW together."""
    found = {}
    for name in ("relative_error", "cosine"):
        values = [v for run in group.runs for v in run.series(f"sketch/all/{name}")[1] if math.isfinite(v)]
        if values:
            found[name] = statistics.fmean(values)
    return found


def label(options: Mapping[str, Any], exact: Mapping[str, Any], everyone: Sequence[Mapping[str, Any]]) -> str:
    """ "basis 1/8", "exact, 4 x 3 windows": the method, its budget, options of it that vary, and what else is not as in exact."""
    name, budget, block = options["method.name"], options.get("method.budget"), options["model.block_size"]
    peers = [other for other in everyone if (other["method.name"], other.get("method.budget")) == (name, budget)]
    words = [name, budget] if budget else [name]
    words += [
        f"{option.removeprefix('method.')}={value}"
        for option, value in sorted(options.items())
        if option.startswith("method.") and any(peer.get(option) != value for peer in peers)
    ]
    parts = [" ".join(words)]
    if options["activations.name"] != exact["activations.name"]:
        parts.append(options["activations.name"] + (" selective" if options["activations.selective"] else ""))
    if options["precision"] != exact["precision"]:
        parts.append(options["precision"])
    windows, whole = options["micro_batch_size"], exact["micro_batch_size"]
    batch = (options["tokens_per_step"] or windows * block) // block
    if batch != windows:
        parts.append(f"{batch // windows} x {windows} windows")
    elif windows != whole:
        parts.append(f"{windows} windows")
    if options["steps"] != exact["steps"]:
        parts.append(f"{options['steps']:,} steps")
    return ", ".join(parts)


def ranks(found: Sequence[Standing], jobs: object = None) -> Table:
    """A row per contender, best loss first."""
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
                "dense_ratio": s.dense / exact.dense if s.dense is not None and exact.dense else None,
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
        "Losses in nats per token on held-out text, with 95% intervals over seeds, differences over pairs of equal seed; "
        "p-values are not corrected for the number of rows. Bytes: kept for backward by one micro-batch; state: between steps, "
        "on top. The head keeps no input, whatever the method. Of exact's: above the share of X since exact's dense layers keep "
        "no input of attention's projection, which attention keeps anyway. Training: sum of step times.",
        f"Off budget: where the measured share of X is off by more than {TOLERANCE:.0%} of the budget.",
    ]
    if jobs not in (None, 1):
        notes.append(f"{jobs} runs shared the machine at a time: their seconds are those of a busy machine.")
    if any(s.loss is not None and s.loss.half_width is None for s in found):
        notes.append("A row with one seed carries no interval: nothing is known about other seeds.")
    return Table("arena", "Methods at equal bytes", columns, rows, notes)


def rates(found: Sequence[Standing], groups: Sequence[Group], tuning: Sequence[RunResult]) -> Table:
    """What was tried: a row per contender, a column per learning rate."""
    tried: dict[str, dict[float, list[float]]] = {}
    looked = tuning or [run for group in groups for run in group.runs]
    for run in looked:
        end = math.inf if run.diverged else run.last("val/loss")
        tried.setdefault(contender(run), {}).setdefault(float(run.options["optim.lr"]), []).append(end)
    every = sorted({rate for grid in tried.values() for rate in grid})
    rows = []
    for s in found:
        first = s.group.runs[0]
        grid = {rate: statistics.fmean(ends) for rate, ends in tried.get(contender(first), {}).items()}
        if len(grid) < 2:
            continue
        best = float(first.options["optim.lr"])
        row: dict[str, Any] = {"method": s.label, "chosen": f"{best:g}"}
        row |= {f"{rate:g}": end if math.isfinite(end) else "diverged" for rate, end in grid.items()}
        row["edge"] = "yes" if best in (min(grid), max(grid)) else None
        rows.append(row)
    columns = {"method": Column("method")} | {f"{rate:g}": Column(f"lr {rate:g}", digits=4) for rate in every}
    columns |= {"chosen": Column("chosen"), "edge": Column("at the edge of its grid")}
    notes = [
        "Final validation loss in nats per token of the runs that only tuned, which enter no average; without such runs, means "
        "over the seeds. A choice at the edge: a rate beyond it may be better still. Accumulation and checkpoints take exact's "
        "rate."
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
    notes = ["All sketched layers as one vector, one micro-batch, one draw; means over the looks of a run and over seeds."]
    return Table("arena_quality", "Error of dW and loss", columns, rows, notes)


def refused(ledgers: Sequence[Mapping[str, Any]]) -> Table:
    """What can't keep to a budget."""
    rows = [dict(line) for ledger in ledgers for line in ledger.get("refused", [])]
    columns = {"method": Column("method"), "budget": Column("budget"), "reason": Column("why it has no runs")}
    return Table("arena_refused", "Budgets out of reach", columns, rows)


def conclusions(found: Sequence[Standing], out_of_reach: Table) -> list[str]:
    """One sentence per question, worded from the numbers; *undecided* where an interval covers zero or there is none."""
    sentences = []
    exact = next((s for s in found if s.above is None and s.group.method == "exact"), None)
    if exact is None:
        return []
    budgets = sorted({s.budget for s in found if s.budget}, key=parse_share, reverse=True)
    for budget in budgets:
        sentences += _at_budget(budget, [s for s in found if s.budget == budget], found, exact)
    for budget in sorted({line["budget"] for line in out_of_reach.rows}, key=parse_share, reverse=True):
        names = ", ".join(line["method"] for line in out_of_reach.rows if line["budget"] == budget)
        sentences.append(f"Out of reach at {budget} of the bytes: {names}.")
    for s in found:
        if s.group.method == "zeroth_order" and s.above is not None:
            sentences.append(f"The floor: {s.label} keeps nothing and ends {_nats(s.above)}.")
    pairs = [(s.quality["relative_error"], s.above.mean) for s in found if "relative_error" in s.quality and s.above]
    if len(pairs) >= 4:
        from scipy import stats

        rho, p = stats.spearmanr(*zip(*pairs, strict=True))
        sentences.append(
            f"Over {len(pairs)} contenders the relative error of dW and the loss above exact have a rank correlation of "
            f"{rho:+.2f} (p-value {p_text(float(p))})."
        )
    return sentences


def _at_budget(budget: str, here: Sequence[Standing], found: Sequence[Standing], exact: Standing) -> list[str]:
    """The best at a budget against exact, the next, and what exact does with as many bytes."""
    alive = [s for s in here if s.loss is not None and s.above is not None]
    sentences = [f"At {budget} of the bytes, {s.label} diverged." for s in here if s.loss is None]
    if not alive:
        return sentences
    best = alive[0]  # in order of loss
    assert best.above is not None
    time = f" at {best.step / exact.step:.2f} times its step time" if best.step and exact.step else ""
    sentences.append(f"At {budget} of the bytes, {best.label} ends {_nats(best.above)}{time}.")
    sentences += [f"At {budget}, next is {other.label}: {_against(best, other)}." for other in alive[1:2]]
    if exact.dense:
        limit = parse_share(budget) * (1 + TOLERANCE) * exact.dense
        fitting = [(s.dense, s) for s in found if s.group.method == "exact" and s.dense is not None and s.dense <= limit]
        most = max((size for size, _ in fitting), default=None)
        sentences += [
            f"At {budget}, {best.label} beside {s.label} ({size / exact.dense:.3g} of exact's dense bytes): {_against(best, s)}."
            for size, s in fitting
            if size == most and s.loss is not None
        ]
    return sentences


def _nats(above: Estimate) -> str:
    """ "within 0.020 nats of exact (+0.010 ± 0.010, 3 pairs): undecided which is better"."""
    pairs = "one pair" if above.count == 1 else f"{above.count} pairs"
    shown = f"{above.text(4, sign=True)}, {pairs}"
    if above.half_width is None:
        return f"{above.mean:+.4f} nats from exact ({pairs}): undecided, one pair having no interval"
    if above.low <= 0.0 <= above.high:
        return f"within {max(-above.low, above.high):.4f} nats of exact ({shown}): undecided which is better"
    return f"{abs(above.mean):.4f} nats {'worse' if above.mean > 0 else 'better'} than exact ({shown})"


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


def tables(
    groups: Sequence[Group], tuning: Sequence[RunResult], recomputed: Recomputed, ledgers: Sequence[Mapping[str, Any]]
) -> tuple[list[Standing], list[Table], list[str]]:
    """Standings, tables and sentences; empty without exact runs."""
    found = standings(groups, recomputed)
    out_of_reach = refused(ledgers)
    if not found:
        return [], [out_of_reach], []
    jobs = max((ledger.get("jobs", 1) for ledger in ledgers), default=None)
    made = [ranks(found, jobs), rates(found, groups, tuning), quality(found), out_of_reach]
    return found, made, conclusions(found, out_of_reach)
