"""The methods, one file each. To add one: a file with a frozen dataclass, and a line in ESTIMATORS.

The dataclass's fields are the method's options everywhere: in Python, in `conf/method/<name>.yaml` and on the command line.
"""

from basis.estimator import Estimator
from basis.estimators.balanced_sketch import BalancedSketch
from basis.estimators.ema_sketch import EMASketch
from basis.estimators.exact import Exact

ESTIMATORS: dict[str, type[Estimator]] = {
    "exact": Exact,
    "basis": BalancedSketch,
    "ema_sketch": EMASketch,
}
"""Configuration name -> estimator class."""

__all__ = ["ESTIMATORS", "BalancedSketch", "EMASketch", "Exact"]
