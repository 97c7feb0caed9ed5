"""Where the seconds beside a loss come from: the runs themselves, a benchmark, or nowhere.

Runs that had the machine to themselves time themselves. Runs that shared it, as with
`scripts/arena.py --jobs 2` on one processor, don't: their seconds say how busy it was. No ratio,
front or sentence is made of them. Alternatives that took turns in one process,
scripts/bench_step.py, can be compared: `eval.py times=step.csv` puts their times beside the runs'
losses.

A row of the benchmark is a run's if all options of the method, the activations, precision and
tokens of a step are the same. The column `config` holds these options as JSON, by dotted name; a
row without them is no run's. The table does not say which model was timed: give one of the same
size.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from report.results import Group, RunResult


class Times(NamedTuple):
    """Seconds of a step and of the whole training; None: not known."""

    step: float | None
    training: float | None


Clock = Callable[[Group], Times]

UNKNOWN = Times(None, None)


def own(group: Group) -> Times:
    """The median step of the runs themselves, and the mean of what their steps took in all, if none
    diverged.
    """
    times = [seconds for run in group.runs for seconds in run.series("step_seconds")[1]]
    training = (
        None if group.diverged else statistics.fmean([training_seconds(run) for run in group.runs])
    )
    return Times(statistics.median(times) if times else None, training)


def unknown(group: Group) -> Times:
    """No times: those of runs that shared a machine say how busy it was."""
    return UNKNOWN


def training_seconds(run: RunResult) -> float:
    """Sum of the step times: each row's holds for the steps since the row before."""
    steps, seconds = run.series("step_seconds")
    return math.fsum(
        (step - before) * value
        for before, step, value in zip([0, *steps], steps, seconds, strict=False)
    )


def shared(ledgers: Sequence[Mapping[str, Any]]) -> int:
    """How many runs had to share a processor or GPU, by what the arenas noted; 1: none."""
    return max(
        (-(-ledger.get("jobs", 1) // max(ledger.get("devices", 0), 1)) for ledger in ledgers),
        default=1,
    )


def choose(ledgers: Sequence[Mapping[str, Any]], times: Path | None) -> tuple[Clock, str]:
    """Where seconds come from, and a sentence about it for the notes: from the table `times`, from
    the runs if they shared no machine, else from nowhere.

    Raises ValueError if `times` is no table of steps.
    """
    if times is not None:
        return benchmarked(times), (
            f"Times of a step are those of {times}, where it has such a step; training: that times "
            "the steps."
        )
    busy = shared(ledgers)
    if busy > 1:
        return unknown, (
            f"{busy} runs shared the machine at a time, so their seconds are not shown; eval.py "
            "times= takes a benchmark's."
        )
    return own, ""


def benchmarked(path: Path) -> Clock:
    """Times by a table of scripts/bench_step.py. Raises ValueError, beginning with `times=`, for
    anything else.
    """
    try:
        with path.open(newline="") as file:
            rows = [
                row
                for row in csv.DictReader(file)
                if {"config", "tokens", "milliseconds", "precision"} <= row.keys()
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"times={path}: must be a .csv of scripts/bench_step.py: {error}"
        ) from None
    if not rows:
        raise ValueError(
            f"times={path}: must be a .csv of scripts/bench_step.py, with columns config, tokens, "
            "milliseconds, precision"
        )
    try:
        known = [(json.loads(row["config"]), row) for row in rows if row["config"]]
    except ValueError as error:
        raise ValueError(f"times={path}: its column config is not JSON ({error})") from None

    def clock(group: Group) -> Times:
        options = group.runs[0].options
        tokens = (
            options["tokens_per_step"] or options["micro_batch_size"] * options["model.block_size"]
        )
        # Of several micro-batches a step has another time than one of as many tokens at once.
        whole = options["micro_batch_size"] * options["model.block_size"] == tokens
        for named, row in known:
            same = all(options[name] == value for name, value in named.items() if name in options)
            if (
                whole
                and same
                and tokens == int(row["tokens"])
                and options["precision"] == row["precision"]
            ):
                step = float(row["milliseconds"]) / 1000
                return Times(step, None if group.diverged else step * options["steps"])
        return UNKNOWN

    return clock
