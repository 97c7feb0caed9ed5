"""What the paper claims, and what the given runs say to it, worded from the numbers.

A claim about a difference is *supported* if the 95% interval over seeds lies wholly on its side,
*contradicted* if wholly on the other, and else *not supported by these runs*, which is not the same
as false. Without a second seed there is no interval, and it is *undecided*. A run that diverged
contradicts every claim that its row converges. Sentences name rows by R; the rows of the tables
hold the run ids.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from experiments.paper import stability
from experiments.paper.published import TABLE_3, published_row
from report.losses import Recomputed, paired
from report.results import Group, RunResult, differing_options, setting
from report.statistics import Estimate, p_text

ENOUGH_EVALUATIONS = 20
"""Fewer say little about monotony."""


def claims(groups: Sequence[Group], recomputed: Recomputed) -> list[str]:
    """Sentences about those claims for which there are runs; an empty list if there are none."""

    def value(run: RunResult) -> float:
        return recomputed[run.id].held_out

    by_setting: dict[str, list[Group]] = {}
    for group in groups:
        by_setting.setdefault(setting(group.runs[0]), []).append(group)
    labels = differing_options([members[0].runs[0] for members in by_setting.values()])
    sentences: list[str] = []
    for label, members in sorted(
        zip(labels, by_setting.values(), strict=True), key=lambda pair: pair[0]
    ):
        rows = {
            group.rank if group.method == "basis" else None: group
            for group in members
            if published_row(group)
        }
        found = _about_ranks(rows, value) + _about_r1(rows)
        found += _about_switch(
            members,
            value,
            "Invariant Scalars",
            "invariant_scalars",
            {True: "with", False: "without"},
            1,
        )
        found += _about_switch(
            members,
            value,
            "Balanced Hashing",
            "hashing",
            {"balanced": "balanced", "uniform": "uniform"},
            8,
        )
        sentences += [f"{label}: {sentence}" if label else sentence for sentence in found]
    return sentences


def _verdict(difference: Estimate, wanted_negative: bool) -> str:
    """For a claim that `difference` is negative (or positive)."""
    if difference.half_width is None:
        return "undecided, one pair having no interval"
    below, above = difference.high < 0, difference.low > 0
    if below or above:
        return "supported" if below == wanted_negative else "contradicted"
    return "not supported by these runs, the interval holding 0"


def _nats(difference: Estimate) -> str:
    pairs = "1 pair" if difference.count == 1 else f"{difference.count} pairs"
    p = "" if difference.p is None else f", p = {p_text(difference.p)}".replace("= <", "<")
    return f"{difference.text(sign=True)} nats above exact, {pairs}{p}"


def _diverged(group: Group) -> str:
    first = min(run.diverged_at for run in group.diverged)
    return f"{len(group.diverged)} of {len(group.runs)} runs diverged, the first at step {first:,}"


def _about_ranks(rows: dict[int | None, Group], value: Callable[[RunResult], float]) -> list[str]:
    exact = rows.get(None)
    if exact is None or exact.diverged:
        return []
    published = {rank: row.val_loss - TABLE_3[None].val_loss for rank, row in TABLE_3.items()}
    above = {
        r: found
        for r, g in rows.items()
        if r is not None and (found := paired(g, exact, value)) is not None
    }
    sentences = []
    if 64 in above:
        sentences.append(
            "R = 64 keeps every row, so only the shrinkage of 0.01 is left of the method: "
            f"{_nats(above[64])}. The paper's single runs differ by {published[64]:+.3f}, which "
            "says how far two runs of its setting lie apart by chance."
        )
    if 32 in above:
        verdict = _verdict(above[32], wanted_negative=True)
        sentences.append(
            f'"R = 32 acts as an implicit regulariser" is {verdict}: {_nats(above[32])} '
            f"(paper: {published[32]:+.3f})."
        )
    ladder = [rank for rank in (32, 16, 8, 1) if rank in above]
    if len(ladder) >= 2:
        costs = ", ".join(
            f"{above[rank].text(sign=True)} at R = {rank} (paper: {published[rank]:+.3f})"
            for rank in ladder
        )
        steps = [(a, b, paired(rows[b], rows[a], value)) for a, b in itertools.pairwise(ladder)]
        cuts = [
            (f"{a} to {b}", _verdict(cost, wanted_negative=False))
            for a, b, cost in steps
            if cost is not None
        ]
        said = "; ".join(f"that {cut} costs something is {verdict}" for cut, verdict in cuts)
        sentences.append(f'"Graceful degradation", nats above exact: {costs}. Cut by cut, {said}.')
    lost = [rank for rank in (64, 32, 16, 8) if rank in rows and rows[rank].diverged]
    claim = "trains like exact backpropagation is contradicted"
    return sentences + [f"That R = {rank} {claim}: {_diverged(rows[rank])}." for rank in lost]


def _about_r1(rows: dict[int | None, Group]) -> list[str]:
    group = rows.get(1)
    if group is None:
        return []
    claim = '"Smooth, monotonic convergence at R = 1"'
    if group.diverged:
        return [f"{claim} is contradicted: {_diverged(group)}."]
    worse, evaluations = stability.worse_count(group)
    if not evaluations:
        return []
    largest = max(stability.largest_rise(run) or 0.0 for run in group.runs)
    if worse:
        verdict = "not literally so"
    elif evaluations < ENOUGH_EVALUATIONS or len(group.runs) < 2:
        verdict = "undecided, with so few evaluations or seeds"
    else:
        verdict = "supported"
    seeds = "1 seed" if len(group.runs) == 1 else f"{len(group.runs)} seeds"
    sentence = (
        f"{claim} is {verdict}: {worse} of {evaluations} evaluations got worse, by at most "
        f"{largest:.3f} nats ({seeds})"
    )
    exact = rows.get(None)
    if exact is not None and not exact.diverged:
        exact_worse, exact_evaluations = stability.worse_count(exact)
        sentence += f"; of exact backpropagation, {exact_worse} of {exact_evaluations}"
    return [sentence + "."]


def unstable(run: RunResult) -> bool:
    """Whether a run diverged, or ended with a higher validation loss than it began with."""
    losses = run.series("val/loss")[1]
    return run.diverged or (len(losses) > 1 and not losses[-1] < losses[0])


def _about_switch(
    groups: Sequence[Group],
    value: Callable[[RunResult], float],
    feature: str,
    option: str,
    names: dict[object, str],
    rank: int,
) -> list[str]:
    """Whether `feature` is what keeps BASIS at `rank` stable: the two groups that differ in
    `option` alone.
    """
    (on, on_name), (off, off_name) = names.items()

    def others(group: Group) -> dict[str, object]:
        options = group.runs[0].options
        return {
            k: v for k, v in options.items() if k.startswith("method.") and k != f"method.{option}"
        }

    basis = [group for group in groups if group.method == "basis" and group.rank == rank]
    pairs = [
        (first, second)
        for first, second in itertools.permutations(basis, 2)
        if (first.runs[0].options[f"method.{option}"], second.runs[0].options[f"method.{option}"])
        == (on, off)
        and others(first) == others(second)
    ]
    return [
        f"{feature} at R = {rank}: {_compare(*pair, on_name, off_name, feature, value)}"
        for pair in pairs
    ]


def _compare(
    first: Group,
    second: Group,
    name: str,
    other: str,
    feature: str,
    value: Callable[[RunResult], float],
) -> str:
    """Both groups' stability, and what follows from it for the feature that `first` has and
    `second` lacks.
    """
    parts = []
    for group, label in ((first, name), (second, other)):
        worse, evaluations = stability.worse_count(group)
        if group.diverged:
            parts.append(f"{label}, {_diverged(group)}")
        elif evaluations:
            largest = max(stability.largest_rise(run) or 0.0 for run in group.runs)
            ended = sum(unstable(run) for run in group.runs)
            rose = (
                f", {ended} of {len(group.runs)} runs ended above their first loss" if ended else ""
            )
            parts.append(
                f"{label}, {worse} of {evaluations} evaluations got worse, by at most "
                f"{largest:.3f} "
                f"nats{rose}"
            )
    shares = [
        sum(unstable(run) for run in group.runs) / len(group.runs) for group in (first, second)
    ]
    if shares == [0, 1]:
        verdict = f"Only the runs {name} are stable: here stability comes from {feature}."
    elif shares == [1, 0]:
        verdict = f"Only the runs {other} are stable: here harm comes from {feature}."
    elif shares == [0, 0]:
        verdict = f"Both are stable: these runs do not show {feature} to be what makes it so."
    elif shares == [1, 1]:
        verdict = f"Neither is stable, {feature} or not."
    else:
        verdict = "Some runs of one or both are unstable: no clear answer."
    difference = paired(first, second, value)
    if difference is not None and math.isfinite(difference.mean):
        verdict += f" Last loss {name} less that {other}: {difference.text(sign=True)} nats"
        verdict += " (one pair)." if difference.count == 1 else f" ({difference.count} pairs)."
    if len(first.runs) == 1 or len(second.runs) == 1:
        verdict += " One seed."
    return "; ".join(parts) + ". " + verdict
