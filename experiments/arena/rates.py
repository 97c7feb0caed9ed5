"""Which learning rate a contender of an arena takes, from the runs that tune it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.arena.plan import Cell


def best_rate(cells: Sequence[Cell]) -> float | None:
    """The rate of the lowest final validation loss among a contender's tuning runs; None if all
    diverged.
    """
    losses = {c.rate: c.loss() for c in cells}
    best = min(losses, key=lambda rate: losses[rate])
    return best if math.isfinite(losses[best]) else None


def next_rate(cells: Sequence[Cell]) -> float | None:
    """A rate beyond a contender's tuning runs, as far as theirs lie apart, if the best of them is
    at the edge; else None.
    """
    best, rates = best_rate(cells), sorted(c.rate for c in cells)
    if best is None or len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    beyond = best * rates[-1] / rates[-2] if best == rates[-1] else best * rates[0] / rates[1]
    return float(f"{beyond:.2g}")
