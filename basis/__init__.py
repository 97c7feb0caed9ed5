"""basis: backpropagation that keeps a sketch of each dense layer's input instead of the input.
Needs torch alone.

    import basis

    basis.convert(model, basis.BalancedSketch(rank=32), include=["blocks.*.mlp.*", "head"])
    basis.convert(model, basis.Lean())               # norms, activations, ... in few bits, or:
    basis.convert(model, basis.Recompute())          # their outputs made again in backward, exactly
    ...                 # train as before: only the weight gradients of these layers are estimates
    basis.revert(model)                              # a plain model again, the same parameters

`convert` takes an estimator (one of the ten methods below), which replaces nn.Linear layers, or
`Lean`, which replaces norms, activations, gated MLPs, dropout and attention, or `Recompute`, which
replaces LayerNorm, GELU and the plain nn.Linear layers behind them, or `SUS`, which replaces
attention. Noise comes from PyTorch's default generator, or, after `set_noise_key(model, seed=,
step=, ...)`, is a pure function of those numbers. `linear_cross_entropy` is a model's last layer
and its loss without whole logits; `fuse_head` puts it into a language model of transformers.
`gradient_quality` compares estimated with exact gradients.

Everything else has its place one level down:

    basis.estimator     Estimator, the base class of methods
    basis.estimators    the ten methods, by name in ESTIMATORS
    basis.linear        SketchedLinear, and BASIS as a formula: basis_linear
    basis.embedding     an embedding tied to the head
    basis.lean          what a block keeps besides, and checkpoints, in few bits; recomputation
    basis.sus           SUS attention and its statistics
    basis.diagnostics   budgets, monitor, adaptive rank
    basis.ops           the mathematics: noise, codes, products

Source of the method the library is named after: V. Khasia, BASIS, arXiv 2604.16324.
"""

from typing import TYPE_CHECKING

from basis.apply import apply
from basis.causal_lm import fuse_head, unfuse_head
from basis.convert import convert, revert, sketched_layers
from basis.diagnostics.quality import gradient_quality
from basis.estimators import (
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
from basis.lean import Lean
from basis.lean.recompute import Recompute
from basis.loss_head import linear_cross_entropy
from basis.noise_key import set_noise_key
from basis.sus import SUS

__all__ = [
    "SUS",
    "BalancedSketch",
    "CountSketch",
    "EMASketch",
    "Exact",
    "Gaussian",
    "Lean",
    "LowRank",
    "Quantized",
    "Recompute",
    "RowSampling",
    "Subspace",
    "Transform",
    "apply",
    "convert",
    "fuse_head",
    "gradient_quality",
    "linear_cross_entropy",
    "revert",
    "set_noise_key",
    "sketched_layers",
    "unfuse_head",
]

__version__ = "0.4.0"

if not TYPE_CHECKING:  # a type checker is to know the names above alone
    from basis.moved import __getattr__  # noqa: F401
