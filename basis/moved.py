"""Names that `import basis` had before version 0.2: each still works, and warns of its new place."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

MOVED = {
    "AdaptiveRank": "basis.diagnostics.adaptive_rank.AdaptiveRank",
    "ESTIMATORS": "basis.estimators.ESTIMATORS",
    "Estimator": "basis.estimator.Estimator",
    "LearningEstimator": "basis.estimator.LearningEstimator",
    "Monitor": "basis.diagnostics.monitor.Monitor",
    "Quality": "basis.diagnostics.quality.Quality",
    "SketchedLinear": "basis.linear.SketchedLinear",
    "basis_linear": "basis.linear.basis_linear",
    "encode_hashing": "basis.ops.noise.encode_hashing",
    "fit": "basis.diagnostics.budget.fit_budget",
    "kept_bytes": "basis.diagnostics.budget.kept_bytes",
    "not_learning": "basis.convert.not_learning",
    "sketched_linear": "basis.linear.sketched_linear",
    "tied_embedding": "basis.embedding.tied_embedding",
    "within_budget": "basis.diagnostics.budget.within_budget",
}
"""Old name in `basis` -> new place."""


def __getattr__(name: str) -> Any:
    """`basis.<name>` for a name that has moved; AttributeError for one that never was there."""
    if name not in MOVED:
        raise AttributeError(f"module 'basis' has no attribute {name!r}")
    module, _, new = MOVED[name].rpartition(".")
    warnings.warn(
        f"basis.{name} has moved: from {module} import {new}", DeprecationWarning, stacklevel=2
    )
    return getattr(importlib.import_module(module), new)
