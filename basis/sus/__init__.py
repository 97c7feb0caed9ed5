"""SUS backpropagation: attention whose backward follows about c of a row's T entries (arXiv
2505.15080).

    basis.convert(model, basis.SUS(CausalAttention, c=25))   # this class: q, k, v -> output, causal
    basis.revert(model)
    basis.sus.kept_statistics(model, forward)           # entries kept a row, expected and drawn
    basis.sus.mask_variance(q, k, v, grad_output, c=25) # the gradients' variance, from the formula

Forward is exact, dense, causal attention: W = softmax(q k^T / sqrt(d)), O = W V. In backward each
entry of W is kept with probability q_ij = min(c W_ij, 1) and stands for W_ij / q_ij = max(W_ij,
1/c) then (section numbers of the paper's rule are in masks.py and gradients in dense.py). A row
keeps at most c entries on average, and dq, dk, dv have the exact ones as their mean.

| mode | mask | backward | for |
|---|---|---|---|
| dense | each entry by itself, as in the paper | all entries, masked: O(T^2 d) | reference |
| sparse | systematic along a row: at most ceil(c) + 1 | O(T c d), after sampling | training |

What it saves is time, not bytes: kept are q, k, v, the output and a key, as flash attention keeps
q, k, v, the output and the log-sum-exp. To draw a sample one must know W, so the product q k^T is
formed again in backward: of the five products of flash attention's backward one is left, and work
that grows as T c. (Drawing in forward would keep 6 c bytes a token and head, and would still form
that product twice, as long as the forward kernel does not sample itself.)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from basis.checks import check_types, module_classes
from basis.exchange import Exchange, refuse_hooks, refuse_replaced_forward
from basis.sus.attention import MODES, SusAttention, check_options, sus_attention
from basis.sus.statistics import Kept, kept_statistics
from basis.sus.variance import Variance, mask_variance

__all__ = [
    "MODES",
    "SUS",
    "Kept",
    "SusAttention",
    "Variance",
    "kept_statistics",
    "mask_variance",
    "sus_attention",
]


@dataclass(frozen=True)
class SUS(Exchange):
    """For `basis.convert`: causal attention whose backward follows about `c` entries of each row.

    attention: the class of modules that are replaced (or a tuple of classes), exactly these and no
    subclasses: q, k, v -> output, causal, without dropout, whose mask would have to be known in
    backward. c: positive, entries of a row that are followed, at most and on average. mode:
    "sparse", or "dense" for the reference. Raises ValueError that begins with the name of the wrong
    option.
    """

    kind: ClassVar[str] = "attention module of the type given"

    attention: type[nn.Module] | tuple[type[nn.Module], ...]
    c: float = 25.0
    mode: str = "sparse"

    def __post_init__(self) -> None:
        check_types(self)
        if not module_classes("attention", self.attention):
            raise ValueError("attention=(): must name at least one class of modules")
        check_options(self.c, self.mode)

    def accepts(self, module: nn.Module) -> bool:
        if isinstance(module, SusAttention):
            module = module.attend
        return type(module) in module_classes("attention", self.attention)

    def stand_in(self, name: str, module: nn.Module) -> SusAttention:
        if isinstance(module, SusAttention):
            module = module.original()
        # In training the module itself is not called.
        refuse_hooks(module)
        refuse_replaced_forward(module)
        if getattr(module, "dropout", 0.0):
            raise ValueError(
                f"dropout={module.dropout}: must be 0 in {name}, SUS knows no dropout of attention"
            )
        return SusAttention(module, self.c, self.mode)


def convert(model: nn.Module, attention: type[nn.Module], **options: Any) -> list[str]:
    """Deprecated: `basis.convert(model, basis.SUS(attention, ...))`."""
    from basis.convert import convert

    warnings.warn(
        "basis.sus.convert(model, ...) is now basis.convert(model, basis.SUS(...))",
        DeprecationWarning,
        stacklevel=2,
    )
    return convert(model, SUS(attention, **options))


def revert(model: nn.Module) -> list[str]:
    """Deprecated: `basis.revert(model)`, which reverts sketched and lean modules too."""
    from basis.convert import put_back

    warnings.warn(
        "basis.sus.revert(model) is now basis.revert(model), which reverts sketched and lean "
        "modules too",
        DeprecationWarning,
        stacklevel=2,
    )
    return put_back(model, (SusAttention,))
