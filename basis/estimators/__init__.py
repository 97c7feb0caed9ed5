"""The methods, one file each. To add one: a file with a frozen dataclass, and a line in ESTIMATORS.

The dataclass's fields are the method's options everywhere: in Python, in `conf/method/<name>.yaml` and on the command line.
"""

from basis.estimator import Estimator
from basis.estimators.balanced_sketch import BalancedSketch
from basis.estimators.exact import Exact
from basis.estimators.subspace import Subspace
from basis.estimators.transform import Transform

ESTIMATORS: dict[str, type[Estimator]] = {
    "exact": Exact,
    "basis": BalancedSketch,
    "subspace": Subspace,
    "transform": Transform,
}
"""Configuration name -> estimator class."""

__all__ = ["ESTIMATORS", "BalancedSketch", "Exact", "Subspace", "Transform"]
