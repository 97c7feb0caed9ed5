"""What the arena adds to a report: methods ranked at their bytes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from experiments.arena import figures, step_times, tables
from experiments.arena.ledger import LEDGER, read_ledger
from experiments.arena.standings import is_arena, standings, unranked
from report.section import Evidence, Section, Study


def study(*, compare: bool = False, times: Path | None = None) -> Study:
    """compare: rank in any case, and not only where runs have budgets or are of several methods.
    times: a table of scripts/bench_step.py to take seconds from.
    """
    return Study(partial(section, compare=compare, times=times))


def section(found: Evidence, *, compare: bool, times: Path | None) -> Section:
    """The ranking, its sentences and figures. Without exact runs to compare with there is nothing
    but a sentence that says so.

    Raises ValueError if `times` is no table of steps.
    """
    if not compare and not is_arena(found.groups):
        return Section()
    ledgers = [
        read_ledger(file.parent)
        for folder in found.folders
        for file in sorted(folder.rglob(LEDGER))
    ]
    clock, timed = step_times.choose(ledgers, times)
    ranked = standings(found.groups, found.losses, clock)
    refused = tables.refused(ledgers)
    left_out = unranked(found.groups)
    if not ranked:
        return Section([refused], left_out, leads=True)
    return Section(
        tables=[
            tables.ranks(ranked, timed),
            tables.rates(ranked, found.groups, found.tuning),
            tables.quality(ranked),
            refused,
        ],
        sentences=tables.conclusions(ranked, refused) + left_out,
        figures=[figures.costs(ranked), figures.quality(ranked)],
        leads=True,
        compares_settings=True,
    )
