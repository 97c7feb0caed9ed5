"""`activations`: what is kept besides the inputs of dense layers. It is independent of the method,
and changes the model from outside.

| name | what it does | costs |
|---|---|---|
| plain | PyTorch's own: everything in full precision | |
| lean | LayerNorm input and attention in 8 bits, GELU in 2 | elementwise passes, biased gradients |
| checkpoint | a block keeps its input and is computed again in backward | a forward |
| checkpoint, selective | products and attention are kept, the rest is computed again | little |
| budget | torch.compile keeps this share of bytes, computes the rest again | up to a forward |

lean stands in basis/lean/, and each of its parts can be switched off; checkpoint is that of
torch.utils. A block that is computed again draws the same sketch noise, since noise is a function
of the step and the layer's name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import basis
from basis.diagnostics.saved import announce
from basis.lean.gelu import BITS
from basis.sus import SusAttention
from models import GPT
from models.gpt import CausalAttention

NAMES = ("plain", "lean", "checkpoint", "budget")


@dataclass(frozen=True)
class ActivationsOptions:
    """The group `activations`. Raises ValueError naming the option.

    norm, attention and gelu_bits belong to lean, selective to checkpoint, budget (a share, 0 to 1)
    to budget.
    """

    name: str = "plain"
    norm: bool = True
    attention: bool = True
    gelu_bits: int | None = 2
    selective: bool = False
    budget: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"activations.name={self.name!r}: must be one of {', '.join(NAMES)}")
        if self.gelu_bits not in (None, *BITS):
            allowed = ", ".join(map(str, BITS))
            raise ValueError(
                f"activations.gelu_bits={self.gelu_bits}: must be one of {allowed}, or "
                "null for plain GELU"
            )
        if not 0.0 <= self.budget <= 1.0:
            raise ValueError(f"activations.budget={self.budget}: must be in [0, 1]")


def apply(model: GPT, options: ActivationsOptions) -> None:
    """Change `model` in place as `options` say; `budget` takes effect in `compiled` instead."""
    if options.name == "lean":
        lean = basis.Lean(
            norm=options.norm,
            gelu_bits=options.gelu_bits,
            attention=(CausalAttention, SusAttention) if options.attention else (),
        )
        if lean != basis.Lean(norm=False, gelu_bits=None):  # else there is nothing to replace
            basis.convert(model, lean)
    elif options.name == "checkpoint":
        for block in model.blocks:
            block.forward = _checkpointed(block.forward, options.selective)


def _checkpointed(
    forward: Callable[[Tensor], Tensor], selective: bool
) -> Callable[[Tensor], Tensor]:
    contexts: dict[str, Any] = {}
    if selective:
        contexts["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)

    def run(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            announce(x)  # held by the checkpoint, unseen by hooks on saved tensors
        result: Tensor = checkpoint(forward, x, use_reentrant=False, **contexts)
        return result

    return run


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE if operator in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
    )


def compiled(model: Callable[..., Tensor], options: ActivationsOptions) -> Callable[..., Tensor]:
    """torch.compile(model), of a model or a function, with the activation memory budget if that
    was asked for.
    """
    if options.name != "budget":
        run: Callable[..., Tensor] = torch.compile(model)
        return run
    import torch._functorch.config as functorch

    def run_with_budget(*args: Any) -> Tensor:
        with functorch.patch(
            activation_memory_budget=options.budget
        ):  # read when a graph is compiled
            result: Tensor = within(*args)
            return result

    within = torch.compile(model)
    return run_with_budget
