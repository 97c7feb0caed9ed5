"""Methods at equal bytes: who loses how much, for how many bytes and seconds, and what can't be
said.

A *contender* is all that is the same in a set of runs but seed and learning rate. Of several rates
the one counts that was run on the most seeds, of those the one with the lowest mean loss; runs made
for tuning alone (results.py) only show what was tried. All are compared with *exact*: the methods'
precision, everything kept, the largest batch. Differences are over pairs of equal seed, which start
from basis.estimators import ESTIMATORS
from the same weights; of equal batches they also read the same text.

- *share of X*: bytes that the sketched layers keep, over the bytes of their inputs X: what
  method.budget promises layer by layer.
- *dense bytes*: what dense layers keep, inputs and sketches together, and as a ratio to exact's.
  That ratio is larger than the share: the input of attention's projection is kept by attention
  anyway, so exact's dense layers keep 6 tensors of a block's width where the methods sketch 7.
  Recomputed blocks have no such number.
- *state*: what a method remembers between steps. It comes on top of what is kept.
- *seconds*: sum of step times, without evaluation, diagnostics and checkpoints; of runs that shared
  a machine only by a benchmark (step_times.py).
- *front*: nothing else is at most as costly and at most as bad; by dense bytes, all bytes with
  state, and seconds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from basis.diagnostics.budget import parse_share
from basis.estimators import ESTIMATORS
from experiments.arena.step_times import Clock, own
from models import ModelConfig, build
from report.losses import Recomputed, paired
from report.results import Group, RunResult, contender, model_and_text
from report.statistics import Estimate, estimate

AGAIN = ("recompute", "checkpoint", "budget")
"""Activations under which a dense layer does not keep its input, or not it alone."""

TOLERANCE = 0.1
"""How far, as a part of the budget, the measured share of X may be off before it is flagged."""


@dataclass
class Standing:
    """A contender with its numbers. Bytes of one micro-batch, seconds of a whole run; None: not
    known or not defined.
    """

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
        return (
            None
            if self.share is None or self.budget is None
            else self.share / parse_share(self.budget) - 1.0
        )


def is_arena(groups: Sequence[Group]) -> bool:
    """Whether runs compare methods at budgets, or several methods: then these tables are made
    without being asked for.
    """
    return (
        any(group.runs[0].options.get("method.budget") for group in groups)
        or len({g.method for g in groups}) > 2
    )


def _precision(groups: Sequence[Group]) -> str:
    """Of the runs to compare with: that of the methods that have a budget, which all share; without
    any float32.
    """
    return next(
        (
            str(g.runs[0].options["precision"])
            for g in groups
            if g.runs[0].options.get("method.budget")
        ),
        "float32",
    )


def unranked(groups: Sequence[Group]) -> list[str]:
    """Sentences about what the ranking had to leave out, all of it or some rows; none if every
    group is in it.
    """
    exact = reference(groups)
    if exact is None:
        return [
            "No ranking of methods at their bytes: it needs finished runs of exact backpropagation "
            "to compare with, of the same model and text, and here are none of method=exact "
            f"activations=plain precision={_precision(groups)} tokens_per_step=null."
        ]
    others = [
        group.label
        for group in groups
        if model_and_text(group.runs[0]) != model_and_text(exact.runs[0])
    ]
    if not others:
        return []
    return [f"Not ranked, being of another model or text than {exact.label}: {', '.join(others)}."]


def reference(groups: Sequence[Group]) -> Group | None:
    """The runs of plain exact backpropagation with the largest batch, of several lengths the
    shortest; their best rate.
    """
    precision = _precision(groups)

    def plain(group: Group) -> bool:
        o = group.runs[0].options
        whole = o["tokens_per_step"] in (None, o["micro_batch_size"] * o["model.block_size"])
        return (
            group.method == "exact"
            and o["activations.name"] == "plain"
            and o["precision"] == precision
            and whole
        )

    found = [group for group in groups if plain(group)]
    if not found:
        return None
    first = min(
        found, key=lambda g: (-g.runs[0].options["micro_batch_size"], g.runs[0].options["steps"])
    )
    return _chosen(
        [group for group in found if contender(group.runs[0]) == contender(first.runs[0])]
    )


def _chosen(rates: Sequence[Group]) -> Group:
    """Of one contender's groups, one per rate, the one that counts."""

    def mean(group: Group) -> float:
        ends = [math.inf if run.diverged else run.last("val/loss") for run in group.runs]
        return statistics.fmean(ends)

    return min(rates, key=lambda group: (-len(group.runs), mean(group)))


def standings(
    groups: Sequence[Group], recomputed: Recomputed, clock: Clock = own
) -> list[Standing]:
    """All contenders in order of loss, those that diverged last; an empty list without exact runs
    to compare with.

    clock: where seconds come from.
    """
    exact = reference(groups)
    if exact is None:
        return []
    by_contender: dict[str, list[Group]] = {}
    for group in groups:
        if model_and_text(group.runs[0]) == model_and_text(exact.runs[0]):
            by_contender.setdefault(contender(group.runs[0]), []).append(group)
    chosen = [_chosen(rates) for rates in by_contender.values()]
    found = [_standing(group, exact, chosen, recomputed, clock) for group in chosen]
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
    """Those that no other beats or equals in both cost and loss (and beats in one), in order of
    cost.
    """
    points = [
        (c, s.loss.mean, s) for s in found if s.loss is not None and (c := cost(s)) is not None
    ]
    best = [
        (c, s)
        for c, loss, s in points
        if not any(d <= c and other <= loss and (d, other) != (c, loss) for d, other, _ in points)
    ]
    return [s for _, s in sorted(best, key=lambda pair: pair[0])]


def _standing(
    group: Group, exact: Group, everyone: Sequence[Group], recomputed: Recomputed, clock: Clock
) -> Standing:
    first = group.runs[0]

    def value(run: RunResult) -> float:
        return recomputed[run.id].held_out

    times = clock(group)
    ended = [] if group.diverged else group.runs  # a mean over those that survived would flatter
    dense: float | None = sum(
        first.last(f"mem/saved_bytes/{name}") for name in ("linear inputs", "sketches")
    )
    return Standing(
        label=label(
            first.options, exact.runs[0].options, [other.runs[0].options for other in everyone]
        ),
        group=group,
        budget=first.options.get("method.budget"),
        loss=estimate([value(run) for run in ended]) if ended else None,
        by_seed={run.seed: value(run) for run in ended},
        above=None if group is exact else paired(group, exact, value),
        dense=None if first.options["activations.name"] in AGAIN else dense,
        kept=first.last("mem/saved_bytes"),
        state=first.last("mem/estimator_bytes"),
        share=share_of_inputs(first),
        step=times.step,
        seconds=times.training,
        quality=_quality(group),
    )


def share_of_inputs(run: RunResult) -> float | None:
    """Bytes kept by the sketched layers over the bytes of their inputs; None if no layer is
    sketched.

    State is not among them, unless it stands in for the input (EMA sketches), as in
    basis/diagnostics/budget.py. Inputs are counted layer by layer, in the precision of the run.
    """
    names = run.summary["sketched_layers"]
    if not names:
        return None
    options = {
        k.removeprefix("model."): v for k, v in run.options.items() if k.startswith("model.")
    }
    with torch.device("meta"):
        layers = dict(build(ModelConfig(**options | {"vocab_size": 1})).named_modules())
    rows = run.options["micro_batch_size"] * run.options["model.block_size"]
    size = 2 if run.options["precision"] == "bfloat16" else 4
    inputs = sum(rows * int(layers[name].in_features) * size for name in names if name != "head")
    kept = run.last("mem/saved_bytes/sketches")
    if ESTIMATORS[run.options["method.name"]].state_replaces_input:
        kept += run.last("mem/estimator_bytes")
    return kept / inputs if inputs else None


def _quality(group: Group) -> dict[str, float]:
    """Mean over looks and seeds of the relative error and the cosine of all sketched layers' dW
    together.
    """
    found = {}
    for name in ("relative_error", "cosine"):
        values = [
            v for run in group.runs for v in run.series(f"sketch/all/{name}")[1] if math.isfinite(v)
        ]
        if values:
            found[name] = statistics.fmean(values)
    return found


def label(
    options: Mapping[str, Any], exact: Mapping[str, Any], everyone: Sequence[Mapping[str, Any]]
) -> str:
    """What a contender is called, such as "basis 1/8" or "exact, 4 x 3 windows": the method, its
    budget, options of it that vary, and what else is not as in exact.
    """
    name, budget, block = (
        options["method.name"],
        options.get("method.budget"),
        options["model.block_size"],
    )
    peers = [
        other
        for other in everyone
        if (other["method.name"], other.get("method.budget")) == (name, budget)
    ]
    words = [name, budget] if budget else [name]
    words += [
        f"{option.removeprefix('method.')}={value}"
        for option, value in sorted(options.items())
        if option.startswith("method.") and any(peer.get(option) != value for peer in peers)
    ]
    parts = [" ".join(words)]
    if options["activations.name"] != exact["activations.name"]:
        bits = options.get("activations.boundary")  # older runs do not have it
        parts.append(
            options["activations.name"]
            + (" selective" if options["activations.selective"] else "")
            + (f" {bits} bits" if bits is not None else "")
        )
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
