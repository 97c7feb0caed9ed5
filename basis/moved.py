"""Names that `basis` had before version 0.2: each still works, and warns of its new place."""

from __future__ import annotations

import abc
import importlib
import warnings
from typing import Any

from torch import Tensor

from basis.estimator import Estimator, State

MOVED = {
    "AdaptiveRank": "basis.diagnostics.adaptive_rank.AdaptiveRank",
    "ESTIMATORS": "basis.estimators.ESTIMATORS",
    "Estimator": "basis.estimator.Estimator",
    "LearningEstimator": "basis.estimator.Estimator",
    "Monitor": "basis.diagnostics.monitor.Monitor",
    "Quality": "basis.diagnostics.quality.Quality",
    "SketchedLinear": "basis.linear.SketchedLinear",
    "basis_linear": "basis.linear.basis_linear",
    "encode_hashing": "basis.ops.noise.encode_hashing",
    "fit": "basis.diagnostics.budget.fit_budget",
    "kept_bytes": "basis.diagnostics.budget.kept_bytes",
    "not_learning": "basis.convert.not_learning",
    "sketched_linear": "basis.sketched.sketched_linear",
    "tied_embedding": "basis.embedding.tied_embedding",
    "within_budget": "basis.diagnostics.budget.within_budget",
}
"""Old name in `basis` -> new place."""


class LearningEstimator(Estimator):
    """The older base of methods that learn, whose `compress_with` is `compress` now."""

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        return self.compress_with(x, key, state)

    @abc.abstractmethod
    def compress_with(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]: ...


def __getattr__(name: str) -> Any:
    """`basis.<name>` for a name that has moved; AttributeError for one that never was there."""
    if name not in MOVED:
        raise AttributeError(f"module 'basis' has no attribute {name!r}")
    module, _, new = MOVED[name].rpartition(".")
    warnings.warn(
        f"basis.{name} has moved: from {module} import {new}", DeprecationWarning, stacklevel=2
    )
    if name == "LearningEstimator":
        return LearningEstimator
    return getattr(importlib.import_module(module), new)
