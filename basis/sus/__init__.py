"""SUS backpropagation: attention whose backward follows about c of a row's T entries (arXiv
2505.15080).

    basis.sus.convert(model, CausalAttention, c=25)     # modules of this type: q, k, v -> output, causal
    basis.sus.revert(model)
    basis.sus.kept_statistics(model, forward)           # entries kept a row, expected and drawn
    basis.sus.mask_variance(q, k, v, grad_output, c=25) # the gradients' variance, from the formula

Forward is exact, dense, causal attention: W = softmax(q k^T / sqrt(d)), O = W V. In backward each
entry of W is kept with probability q_ij = min(c W_ij, 1) and stands for W_ij / q_ij = max(W_ij,
1/c) then (section numbers of the paper's rule are in masks.py and gradients in dense.py). A row
keeps at most c entries on average, and dq, dk, dv have the exact ones as their mean.

| mode | mask | backward | for |
|---|---|---|---|
| dense | each entry by itself, as in the paper | all entries, masked: O(T^2 d) | reference: variance, bias |
| sparse | systematic along a row, equal probabilities: never more than ceil(c) + 1 | O(T c d), after sampling | training |

What it saves is time, not bytes: kept are q, k, v, the output and a key, as flash attention keeps
q, k, v, the output and the log-sum-exp. To draw a sample one must know W, so the product q k^T is
formed again in backward: of the five products of flash attention's backward one is left, and work
that grows as T c. (Drawing in forward would keep 6 c bytes a token and head, and would still form
that product twice, as long as the forward kernel does not sample itself.)
"""

from __future__ import annotations

from torch import nn

from basis.sus.attention import MODES, SusAttention, sus_attention
from basis.sus.statistics import Kept, kept_statistics
from basis.sus.variance import Variance, mask_variance

__all__ = [
    "MODES",
    "Kept",
    "SusAttention",
    "Variance",
    "convert",
    "kept_statistics",
    "mask_variance",
    "revert",
    "sus_attention",
]


def convert(
    model: nn.Module, attention: type[nn.Module], *, c: float, mode: str = "sparse"
) -> list[str]:
    """Exchange modules of exactly the type `attention` (q, k, v -> output, causal) in place.
    Returns the names changed.

    Raises ValueError for a wrong `c` or `mode` (see SusAttention), for a module whose attribute
    `dropout` is not 0, since its mask would have to be known in backward, and if no module is of
    that type. Nothing is changed then.
    """
    found = {name: module for name, module in model.named_modules() if type(module) is attention}
    if not found:
        raise ValueError(f"attention={attention.__name__}: the model has no module of this type")
    made = {name: SusAttention(module, c, mode) for name, module in found.items()}
    for name, module in found.items():
        if getattr(module, "dropout", 0.0):
            raise ValueError(
                f"dropout={module.dropout}: must be 0 in {name}, SUS knows no dropout of attention"
            )
    for name, new in made.items():
        _replace(model, name, new)
    return list(made)


def revert(model: nn.Module) -> list[str]:
    """Put the exact modules back. Returns the names changed."""
    found = {
        name: module for name, module in model.named_modules() if isinstance(module, SusAttention)
    }
    for name, module in found.items():
        _replace(model, name, module.attend)
    return list(found)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
