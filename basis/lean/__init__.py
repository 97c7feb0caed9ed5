"""Lean layers: everything except the dense layers in as few bytes as keeps training intact, and no
matrix product computed twice.

    basis.convert(model, basis.Lean(attention=CausalAttention))   # LayerNorm, GELU, this class
    basis.revert(model)

Of the 16 B x T x C tensors that a GPT block keeps in float32, 10 are not inputs of sketched layers:

| kept for | plain | lean | how | error of the gradient |
|---|---|---|---|---|
| two LayerNorms | 2 | 0.53 | 8 bits, unbiased (norm.py) | noise, 1% |
| GELU | 4 | 0.25 | 2 bits: the derivative in four steps (gelu.py) | 13% of its dX in norm, fixed |
| attention: q, k, v, output | 4 | 1.06 | 8 bits, unbiased (attention.py) | noise, 1% |

Modules are replaced in place and keep their parameters. Forward is exact in all of them.

Beside them stand two ways to compute again: recompute.py, exact, for plain dense layers behind
LayerNorm and GELU; and boundary.py, a checkpoint around a block that keeps its input in few bits,
which does compute products twice.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from basis.checks import check_types, module_classes
from basis.exchange import Exchange, StandIn
from basis.lean.attention import LeanAttention
from basis.lean.gelu import LeanGELU, check_bits
from basis.lean.norm import LeanLayerNorm

__all__ = ["Lean", "LeanAttention", "LeanGELU", "LeanLayerNorm"]


@dataclass(frozen=True)
class Lean(Exchange):
    """For `basis.convert`: LayerNorm, GELU and attention that keep few bits a number.

    norm: whether nn.LayerNorm over the last dimension is replaced. gelu_bits: 1, 2 or 4 bits that
    nn.GELU keeps of each number; None leaves GELU as it is. attention: the class of modules that
    take q, k, v (b, h, T, d) and return the output, or a tuple of such classes. What an attention
    module holds is not replaced itself; one that says `is_causal = True` and has no dropout stays
    within one graph of torch.compile. Raises ValueError that begins with the name of the wrong
    option.
    """

    kind: ClassVar[str] = "module to make lean"

    norm: bool = True
    gelu_bits: int | None = 2
    attention: type[nn.Module] | tuple[type[nn.Module], ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        if self.gelu_bits is not None:
            check_bits(self.gelu_bits)
        module_classes("attention", self.attention)

    def accepts(self, module: nn.Module) -> bool:
        if isinstance(module, LeanAttention):
            module = module.attend
        return (
            type(module) in module_classes("attention", self.attention)
            or (self.norm and type(module) is nn.LayerNorm and LeanLayerNorm.supports(module))
            or (self.norm and type(module) is LeanLayerNorm)
            or (self.gelu_bits is not None and type(module) in (nn.GELU, LeanGELU))
        )

    def stand_in(self, name: str, module: nn.Module) -> StandIn:
        if isinstance(module, nn.LayerNorm):
            return LeanLayerNorm.from_norm(module)
        if isinstance(module, nn.GELU):
            assert self.gelu_bits is not None
            return LeanGELU.from_gelu(module, self.gelu_bits)
        return LeanAttention(module.original() if isinstance(module, LeanAttention) else module)


def convert(model: nn.Module, **options: Any) -> list[str]:
    """Deprecated: `basis.convert(model, basis.Lean(...))`."""
    from basis.convert import convert

    warnings.warn(
        "basis.lean.convert(model, ...) is now basis.convert(model, basis.Lean(...))",
        DeprecationWarning,
        stacklevel=2,
    )
    return convert(model, Lean(**options))


def revert(model: nn.Module) -> list[str]:
    """Deprecated: `basis.revert(model)`, which reverts sketched and SUS modules too."""
    from basis.convert import put_back

    warnings.warn(
        "basis.lean.revert(model) is now basis.revert(model), which reverts sketched and SUS "
        "modules too",
        DeprecationWarning,
        stacklevel=2,
    )
    return put_back(model, (LeanLayerNorm, LeanGELU, LeanAttention))
