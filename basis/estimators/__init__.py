"""The methods, one file each. To add one: a file with a frozen dataclass, and a line in ESTIMATORS.

The dataclass's fields are the method's options everywhere: in Python, in `conf/method/<name>.yaml`
and on the command line.
"""

from basis.estimator import Estimator
from basis.estimators.balanced_sketch import BalancedSketch
from basis.estimators.count_sketch import CountSketch
from basis.estimators.ema_sketch import EMASketch
from basis.estimators.exact import Exact
from basis.estimators.gaussian import Gaussian
from basis.estimators.low_rank import LowRank
from basis.estimators.quantized import Quantized
from basis.estimators.row_sampling import RowSampling
from basis.estimators.subspace import Subspace
from basis.estimators.transform import Transform

ESTIMATORS: dict[str, type[Estimator]] = {
    "exact": Exact,
    "basis": BalancedSketch,
    "count_sketch": CountSketch,
    "gaussian": Gaussian,
    "row_sampling": RowSampling,
    "quantized": Quantized,
    "low_rank": LowRank,
    "ema_sketch": EMASketch,
    "subspace": Subspace,
    "transform": Transform,
}
"""Configuration name -> estimator class."""

__all__ = [
    "ESTIMATORS",
    "BalancedSketch",
    "CountSketch",
    "EMASketch",
    "Exact",
    "Gaussian",
    "LowRank",
    "Quantized",
    "RowSampling",
    "Subspace",
    "Transform",
]
