"""Timing of alternatives against each other: interleaved in one process, medians with quartiles,
machine in every row.

Absolute times wander on shared machines, by more than what is to be measured. So the alternatives
take turns, A B C A B C ..., and what is reported is the ratio of medians, with quartiles of the
single times beside. The first turns are left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from harness.provenance import provenance


@dataclass(frozen=True)
class Timing:
    """Seconds of one alternative: median and quartiles over `count` turns."""

    median: float
    low: float
    high: float
    count: int


def interleaved(
    alternatives: Mapping[str, Callable[[], object]],
    *,
    turns: int,
    warm_up: int = 2,
    synchronize: Callable[[], None] = lambda: None,
    progress: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time `alternatives` in turns. synchronize: waits for the device. Raises ValueError if `turns`
    is less than 2.

    clock: in seconds. time.process_time counts what this process computes, of all its threads: with
    one thread it is the time that an idle machine would take, but for the caches that it shares
    with others.
    """
    if turns < 2:
        raise ValueError(f"turns={turns}: must be at least 2 for a median with quartiles")
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    rounds: Iterable[int] = range(turns + warm_up)
    if progress:
        from tqdm import tqdm  # here, so that timing needs torch alone

        rounds = tqdm(rounds, unit="turn", leave=False, disable=None)
    for turn in rounds:
        for name, run in alternatives.items():
            synchronize()
            start = clock()
            run()
            synchronize()
            if turn >= warm_up:
                seconds[name].append(clock() - start)
    return {name: summarise(values) for name, values in seconds.items()}


def summarise(values: list[float]) -> Timing:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))


def machine() -> dict[str, str]:
    """What a row of a benchmark says of where it was measured: processor or GPU, threads, versions,
    commit.
    """
    made_by = provenance()
    place = made_by["machine"]
    where = place["gpu"] or f"{place['processor']}, {torch.get_num_threads()} threads"
    return {
        "machine": where,
        "torch": made_by["versions"]["torch"],
        "commit": str(made_by["commit"]),
    }


def made_by(command: str) -> str:
    """The sentence below a table: command, commit, machine and version."""
    where = machine()
    place = f"commit {where['commit']} on {where['machine']}, torch {where['torch']}"
    return f"Made by `{command}` at {place}."
