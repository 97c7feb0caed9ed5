"""Means over seeds with 95% intervals and p-values, by Student's t, since seeds are few.

An interval says how far the mean over *other seeds* may lie from this one: initial weights and
sketch noise drawn anew, the same text. One seed gives none, and then nothing is claimed. P-values
are not corrected for the number of rows they stand in.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. half_width: of its 95% interval, None for a single value; p: of the
    hypothesis that it is 0.
    """

    mean: float
    half_width: float | None
    count: int
    p: float | None = None

    @property
    def low(self) -> float:
        """Lower end of the interval; minus infinity where there is none."""
        return -math.inf if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval; infinity where there is none."""
        return math.inf if self.half_width is None else self.mean + self.half_width

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """ "6.850 ± 0.012", or "6.850" for a single value."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.{digits}f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, interval and two-sided p-value (t-test against 0) of at least one value; of infinities
    and NaN no interval.
    """
    count = len(values)
    mean = sum(values) / count
    if count < 2 or not math.isfinite(mean):
        return Estimate(mean, None, count)
    mean = statistics.fmean(values)
    from scipy import stats

    error = statistics.stdev(values) / math.sqrt(count)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, count - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1)) if error > 0 else float(mean == 0)
    return Estimate(mean, half, count, p)


def p_text(p: float) -> str:
    """ "0.03", or "< 0.0001"."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"
