"""Dropout that keeps one bit a number: whether it was left.

PyTorch keeps a byte a number on CUDA, and on the CPU the factor itself, in the precision of the
input. Backward needs nothing but which of two factors it was, 0 or 1 / (1 - p).

What is exact: everything. The numbers that are dropped are those that nn.Dropout would drop, drawn
from PyTorch's default generator, and the gradient is the same to rounding. Kept: one bit a number.
In a compiled graph the compiler draws, as it does for nn.Dropout.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from basis.exchange import StandIn, take_over
from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.ops import step_code


class _OneBitDropout(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
        output, left = torch.native_dropout(x, p, True)
        return output, step_code.encode(left.to(x.dtype), 1, (0.5,))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, p = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        ctx.levels = (0.0, 1.0 / (1.0 - p))
        _, packed = output
        ctx.mark_non_differentiable(packed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(packed, link(x))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        if grad_output is None:
            return None, None
        packed, _ = ctx.saved_tensors
        return step_code.times_levels(grad_output, packed, 1, ctx.levels), None


class LeanDropout(StandIn, nn.Dropout):
    """nn.Dropout that keeps one bit a number."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return cast(Tensor, self.node(input))
        drops = self.training and 0.0 < self.p < 1.0 and input.numel() > 0
        if not (drops and torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        return cast(Tensor, _OneBitDropout.apply(input, self.p)[0])

    @classmethod
    def from_dropout(cls, dropout: nn.Dropout) -> LeanDropout:
        """The same dropout with the same hooks and attributes."""
        return take_over(cls(dropout.p), dropout)

    def original(self) -> nn.Dropout:
        return take_over(nn.Dropout(self.p), self)

    @staticmethod
    def supports(dropout: nn.Dropout) -> bool:
        """Whether there is anything to gain: it drops something, and not in place."""
        return dropout.p > 0.0 and not dropout.inplace
