"""`activations`: what is kept besides the inputs of dense layers. It is independent of the method,
and changes the model from outside.

| name | what it does | costs |
|---|---|---|
| plain | PyTorch's own: everything in full precision | |
| lean | LayerNorm input and attention in 8 bits, GELU in 2 | elementwise passes, biased gradients |
| recompute | LayerNorm's and GELU's outputs are computed again in backward | elementwise passes |
| checkpoint | a block keeps its input and is computed again in backward | a forward |
| checkpoint, boundary | that input in 8 or 4 bits | a forward, noisy gradients |
| checkpoint, selective | products and attention are kept, the rest is computed again | little |
| budget | torch.compile keeps this share of bytes, computes the rest again | up to a forward |

lean, recompute and boundary stand in basis/lean/, and each part of lean can be switched off;
checkpoint is that of torch.utils. A block that is computed again draws the same sketch noise, since
noise is a function of the step and the layer's name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import basis
from basis.diagnostics.saved import announce, is_observed
from basis.lean import recompute
from basis.lean.boundary import Boundary, check_bits, compiling_blocks
from basis.lean.gelu import BITS
from basis.sus import SusAttention
from models import HF, LanguageModel
from models.base import CausalAttention

NAMES = ("plain", "lean", "recompute", "checkpoint", "budget")
MOST_GRAPHS = 256
"""Of one block's code; a model may have as many blocks."""


@dataclass(frozen=True)
class ActivationsOptions:
    """The group `activations`. Raises ValueError naming the option.

    norm, attention and gelu_bits belong to lean, selective and boundary (8 or 4 bits, None: the
    block's input as it is) to checkpoint, budget (a share, 0 to 1) to budget.
    """

    name: str = "plain"
    norm: bool = True
    attention: bool = True
    gelu_bits: int | None = 2
    selective: bool = False
    boundary: int | None = None
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
        try:
            check_bits(self.boundary)
        except ValueError as error:
            raise ValueError(f"activations.{error}") from None
        if self.boundary is not None and self.selective:
            raise ValueError(
                f"activations.boundary={self.boundary}: not with activations.selective=true, which "
                "keeps more than a block's input; give one of the two"
            )
        if not 0.0 <= self.budget <= 1.0:
            raise ValueError(f"activations.budget={self.budget}: must be in [0, 1]")


def apply(model: LanguageModel, options: ActivationsOptions) -> None:
    """Change `model` in place as `options` say; `budget` takes effect in `compiled` instead."""
    if options.name == "lean":
        lean = basis.Lean(
            norm=options.norm,
            gelu_bits=options.gelu_bits,
            attention=_attention(model) if options.attention else (),
        )
        if lean != basis.Lean(norm=False, gelu_bits=None):  # else there is nothing to replace
            basis.convert(model, lean)
    elif options.name == "recompute":
        basis.convert(model, basis.Recompute())
    elif options.name == "checkpoint":
        for block in model.blocks:
            if options.boundary is None:
                block.forward = _checkpointed(block.forward, options.selective)
            else:  # a module of the block's, so that its noise has a name
                block.boundary = Boundary(block, options.boundary)
                block.forward = block.boundary.forward


def _attention(model: LanguageModel) -> Any:
    """What attends in `model`, as basis.Lean names it."""
    return "sdpa" if isinstance(model, HF) else (CausalAttention, SusAttention)


def _checkpointed(forward: Callable[..., Tensor], selective: bool) -> Callable[..., Tensor]:
    """`forward` of a block's input x, and of what all blocks share (positions, a mask)."""
    contexts: dict[str, Any] = {}
    if selective:
        contexts["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)

    def watched(x: Tensor, *shared: Any, **named: Any) -> Tensor:
        with _Products() as products:
            result = forward(x, *shared, **named)
        announce(*products.results)  # now, as the block's: they are no layer's
        return result

    def run(x: Tensor, *shared: Any, **named: Any) -> Tensor:
        inner = forward
        if torch.is_grad_enabled():
            announce(x)  # held by the checkpoint, unseen by hooks on saved tensors
            if selective and is_observed() and not torch.compiler.is_compiling():
                inner = watched
        if shared or named:
            inner = functools.partial(_with, inner, shared, named)
        result: Tensor = checkpoint(inner, x, use_reentrant=False, **contexts)
        return result

    return run


def _with(forward: Callable[..., Tensor], shared: Any, named: Any, x: Tensor) -> Tensor:
    return forward(x, *shared, **named)


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


class _Products(TorchDispatchMode):
    """Collects the results of the operators that a selective checkpoint keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _PRODUCTS:
            self.results += (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE if operator in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
    )


def compile_blocks(model: LanguageModel, options: ActivationsOptions) -> None:
    """Let each block of `model` be compiled by itself where it runs in what `by_blocks` returns."""
    if options.name == "checkpoint" and options.boundary is not None:
        return  # it compiles its blocks itself
    for block in model.blocks:
        block.forward = _switched(block.forward)


_by_blocks = False


def _switched(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    within = torch.compile(forward)
    return lambda *x, **named: (within if _by_blocks else forward)(*x, **named)


def by_blocks(model: Callable[..., Tensor], options: ActivationsOptions) -> Callable[..., Tensor]:
    """`model`, around blocks of `compile_blocks`, with these compiled as `options` say."""
    import torch._dynamo.config as dynamo

    settings = _compiler_settings(options)

    def run(*args: Any) -> Tensor:
        global _by_blocks
        _by_blocks = True
        try:
            # A block's place among layers that share noise is a constant of its graph.
            with (
                dynamo.patch(recompile_limit=MOST_GRAPHS),
                _patched(settings),
                compiling_blocks(),
            ):
                return model(*args)
        finally:
            _by_blocks = False

    return run


def compiled(model: Callable[..., Tensor], options: ActivationsOptions) -> Callable[..., Tensor]:
    """torch.compile(model), of a model or a function, told what to compute again if `options` leave
    that to the compiler. With compressed boundaries each block is compiled by itself.
    """
    if options.name == "checkpoint" and options.boundary is not None:

        def run_by_blocks(*args: Any) -> Tensor:
            with compiling_blocks():
                return model(*args)

        return run_by_blocks
    within: Callable[..., Tensor] = torch.compile(model)
    settings = _compiler_settings(options)
    if not settings:
        return within

    def run_with_settings(*args: Any) -> Tensor:
        with _patched(settings):
            return within(*args)

    return run_with_settings


def _compiler_settings(options: ActivationsOptions) -> dict[str, Any]:
    """What the compiler is told about computing again."""
    if options.name == "budget":
        return {"activation_memory_budget": options.budget}
    return recompute.COMPILER if options.name == "recompute" else {}


def _patched(settings: dict[str, Any]) -> AbstractContextManager[object]:
    """A context in which graphs are compiled with `settings`."""
    import torch._functorch.config as functorch

    return functorch.patch(settings)
