"""What the paper claims, and what the given runs say to it: one or two sentences each, worded from the numbers.

A claim is *supported* if the 95% interval over seeds lies wholly on its side, *contradicted* if wholly on the other, and else
*not supported by these runs*, which is not the same as false. Without a second seed there is no interval, and nothing is decided.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from harness.report import losses, stability
from harness.report.losses import Recomputed, paired
from harness.report.paper import TABLE_3, published_row
from harness.report.statistics import Estimate
from harness.results import Group, setting


def claims(groups: Sequence[Group], recomputed: Recomputed) -> list[str]:
    """Sentences about those claims for which there are runs; an empty list if there are none."""
    sentences: list[str] = []
    by_setting: dict[str, list[Group]] = {}
    for group in groups:
        by_setting.setdefault(setting(group.runs[0]), []).append(group)
    for members in by_setting.values():
        rows = {group.rank: group for group in members if published_row(group)}
        above = {
            rank: difference
            for rank, group in rows.items()
            if rank is not None and (difference := paired(group, members, lambda run: recomputed[run.id].held_out))
        }
        where = f" ({rows[min(above)].runs[0].summary['step']:,} steps)" if above else ""
        sentences += [sentence + where + "." for sentence in _about_ranks(above)]
        sentences += _about_r1(rows.get(1))
        sentences += _about_scalars(members) + _about_hashing(members)
    return sentences


def _verdict(difference: Estimate, wanted_negative: bool) -> str:
    """ "supported", "contradicted" or "not supported by these runs" for a claim that `difference` is negative (positive)."""
    if difference.half_width is None:
        return "undecided: one pair has no interval"
    below, above = difference.high < 0, difference.low > 0
    if below or above:
        return "supported" if below == wanted_negative else "contradicted"
    return "not supported by these runs: the interval holds 0"


def _nats(difference: Estimate) -> str:
    pairs = "1 pair" if difference.count == 1 else f"{difference.count} pairs"
    p = "" if difference.p is None else f", p = {difference.p:.2g}"
    return f"{difference.text(sign=True)} nats above exact, {pairs}{p}"


def _about_ranks(above: dict[int, Estimate]) -> list[str]:
    sentences = []
    exact = TABLE_3[None].val_loss
    if 64 in above:
        sentences.append(
            f"R = 64 keeps every row, so only the shrinkage of 0.01 is left: {_nats(above[64])}; the paper's single runs "
            f"differ by {TABLE_3[64].val_loss - exact:+.3f}, which measures its run-to-run noise"
        )
    if 32 in above:
        sentences.append(
            f'"R = 32 acts as an implicit regulariser" is {_verdict(above[32], wanted_negative=True)} ({_nats(above[32])}; paper '
            f"{TABLE_3[32].val_loss - exact:+.3f})"
        )
    ladder = [rank for rank in (32, 16, 8, 1) if rank in above]
    if len(ladder) >= 2:
        means = [above[rank].mean for rank in ladder]
        ordered = all(lower < higher for lower, higher in itertools.pairwise(means))
        steps = ", ".join(f"{above[rank].text(sign=True)} at R = {rank}" for rank in ladder)
        sentences.append(
            f'"Graceful degradation": {steps}; the loss {"rises" if ordered else "does not rise"} with every cut of R here'
            f" (paper: {', '.join(f'{TABLE_3[rank].val_loss - exact:+.3f}' for rank in ladder)})"
        )
    return sentences


def _about_r1(group: Group | None) -> list[str]:
    if group is None or group.diverged:
        return []
    shares = [share for run in group.runs if (share := stability.share_worse(run)) is not None]
    evaluations = sum(len(stability.rises(run)) for run in group.runs)
    largest = max(stability.largest_rise(run) or 0.0 for run in group.runs)
    if not evaluations:
        return []
    worse = round(sum(share * len(stability.rises(run)) for share, run in zip(shares, group.runs, strict=True)))
    found = "supported" if worse == 0 else "not literally so"
    return [
        f'"Smooth, monotonic convergence at R = 1" is {found}: {worse} of {evaluations} evaluations got worse, by at most '
        f"{largest:.3f} nats ({group.runs[0].summary['step']:,} steps, {len(group.runs)} seed{'s' * (len(group.runs) > 1)})."
    ]


def _pair(groups: Sequence[Group], option: str, values: tuple[object, object], rank: int) -> tuple[Group, Group] | None:
    """The two groups of BASIS at `rank` that have these values of `option` and are otherwise alike."""

    def others(group: Group) -> dict[str, object]:
        options = group.runs[0].options
        return {k: v for k, v in options.items() if k.startswith("method.") and k != f"method.{option}"}

    basis = [group for group in groups if group.method == "basis" and group.rank == rank]
    for first in basis:
        for second in basis:
            wanted = [group.runs[0].options[f"method.{option}"] for group in (first, second)]
            if wanted == list(values) and others(first) == others(second):
                return first, second
    return None


def _about_scalars(groups: Sequence[Group]) -> list[str]:
    pair = _pair(groups, "invariant_scalars", (True, False), rank=1)
    return [] if pair is None else [f"Invariant Scalars at R = 1, {_rate(pair[0])}: {_compare(*pair, 'with', 'without')}"]


def _about_hashing(groups: Sequence[Group]) -> list[str]:
    pair = _pair(groups, "hashing", ("balanced", "uniform"), rank=8)
    return [] if pair is None else [f"Balanced Hashing at R = 8, {_rate(pair[0])}: {_compare(*pair, 'balanced', 'uniform')}"]


def _rate(group: Group) -> str:
    return f"learning rate {group.runs[0].options['optim.lr']:g}"


def _compare(first: Group, second: Group, name: str, other: str) -> str:
    """Both groups' stability in one sentence, and which of them was the steadier."""
    parts = []
    for group, label in ((first, name), (second, other)):
        if group.diverged:
            parts.append(f"{label}, {len(group.diverged)} of {len(group.runs)} runs diverged")
            continue
        worst = max(stability.largest_rise(run) or 0.0 for run in group.runs)
        share = sum(stability.share_worse(run) or 0.0 for run in group.runs) / len(group.runs)
        final = losses.estimate([run.last("val/loss") for run in group.runs])
        parts.append(f"{label}, {share:.0%} of evaluations got worse, by at most {worst:.3f} nats, last loss {final.text()}")
    if bool(first.diverged) != bool(second.diverged):
        needed = name if second.diverged else other
        return "; ".join(parts) + f". Only {needed} is stable here."
    return "; ".join(parts) + "."
