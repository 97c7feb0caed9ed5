"""Everything besides the dense layers in as few bytes as keeps training intact, and no matrix
product computed twice.

    basis.lean.convert(model, norm=True, attention=True, gelu_bits=2)
    basis.lean.revert(model)

Of the 16 B x T x C tensors that a GPT block keeps in float32, 10 are not inputs of sketched layers:

| kept for | plain | lean | how | error of the gradient |
|---|---|---|---|---|
| two LayerNorms | 2 | 0.53 | 8 bits, unbiased (norm.py) | noise, 1% |
| GELU | 4 | 0.25 | 2 bits: the derivative in four steps (gelu.py) | 13% of dX of the GELU in norm, fixed |
| attention: q, k, v, output | 4 | 1.06 | 8 bits, unbiased (attention.py) | noise, 1% |

Layers are exchanged in place by type and keep their parameters. Forward is exact in all of them.
"""

from __future__ import annotations

from torch import nn

from basis.lean.attention import LeanAttention
from basis.lean.gelu import LeanGELU
from basis.lean.norm import LeanLayerNorm
from basis.linear import take_over

__all__ = ["LeanAttention", "LeanGELU", "LeanLayerNorm", "convert", "revert"]


def convert(
    model: nn.Module,
    *,
    norm: bool = True,
    gelu_bits: int | None = 2,
    attention: type[nn.Module] | tuple[type[nn.Module], ...] = (),
) -> list[str]:
    """Exchange nn.LayerNorm, nn.GELU and modules of the type or types `attention` (q, k, v ->
    output). Returns the names changed.

    gelu_bits: 1, 2 or 4; None leaves GELU alone. Raises ValueError for another number.
    """
    kinds = attention if isinstance(attention, tuple) else (attention,)
    changed = []
    within: tuple[
        str, ...
    ] = ()  # what an exchanged attention holds stays as it is: SUS holds the exact one
    for name, module in list(model.named_modules()):
        new: nn.Module
        if name.startswith(within):
            continue
        if norm and type(module) is nn.LayerNorm and LeanLayerNorm.supports(module):
            new = LeanLayerNorm(module.normalized_shape, module.eps, device="meta")
            take_over(new, module)
        elif gelu_bits is not None and type(module) is nn.GELU:
            new = LeanGELU(module.approximate, gelu_bits)
        elif type(module) in kinds:
            new = LeanAttention(module)
            within = (*within, f"{name}.")
        else:
            continue
        _replace(model, name, new)
        changed.append(name)
    return changed


def revert(model: nn.Module) -> list[str]:
    """Put the plain layers back. Returns the names changed."""
    changed = []
    for name, module in list(model.named_modules()):
        old: nn.Module
        if isinstance(module, LeanLayerNorm):
            old = nn.LayerNorm(module.normalized_shape, module.eps, device="meta")
            take_over(old, module)
        elif isinstance(module, LeanGELU):
            old = nn.GELU(module.approximate)
        elif isinstance(module, LeanAttention):
            old = module.attend
        else:
            continue
        _replace(model, name, old)
        changed.append(name)
    return changed


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
