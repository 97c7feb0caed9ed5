"""basis: backpropagation that keeps a sketch of each dense layer's input instead of the input.
Needs torch alone.

    import basis

    basis.convert(model, basis.BalancedSketch(rank=32), include=["blocks.*.mlp.*", "head"])
    ...train as before: forward, input gradients and bias gradients are exact, weight gradients are estimates...
    basis.revert(model)                              # a plain model again, the same parameters

`convert` swaps nn.Linear layers by name; `SketchedLinear` is one such layer; `basis_linear` is the
bare formula. A method is an `Estimator`: what to keep of X, and how to form dW from it. Noise comes
from PyTorch's default generator, or, after `set_noise_key(model, seed=, step=, ...)`, is a pure
function of those numbers.

Source of the method the library is named after: V. Khasia, BASIS, arXiv 2604.16324.
"""

from basis.convert import convert, not_learning, revert, set_noise_key, sketched_layers
from basis.diagnostics.adaptive_rank import AdaptiveRank
from basis.diagnostics.budget import fit, kept_bytes, within_budget
from basis.diagnostics.monitor import Monitor
from basis.diagnostics.quality import Quality, gradient_quality
from basis.embedding import tied_embedding
from basis.estimator import Estimator, LearningEstimator
from basis.estimators import (
    ESTIMATORS,
    BalancedSketch,
    CountSketch,
    EMASketch,
    Exact,
    Gaussian,
    LowRank,
    Quantized,
    RowSampling,
    Subspace,
    Transform,
)
from basis.linear import SketchedLinear, basis_linear, sketched_linear
from basis.loss_head import linear_cross_entropy
from basis.ops.noise import encode_hashing

__all__ = [
    "ESTIMATORS",
    "AdaptiveRank",
    "BalancedSketch",
    "CountSketch",
    "EMASketch",
    "Estimator",
    "Exact",
    "Gaussian",
    "LearningEstimator",
    "LowRank",
    "Monitor",
    "Quality",
    "Quantized",
    "RowSampling",
    "SketchedLinear",
    "Subspace",
    "Transform",
    "basis_linear",
    "convert",
    "encode_hashing",
    "fit",
    "gradient_quality",
    "kept_bytes",
    "linear_cross_entropy",
    "not_learning",
    "revert",
    "set_noise_key",
    "sketched_layers",
    "sketched_linear",
    "tied_embedding",
    "within_budget",
]
