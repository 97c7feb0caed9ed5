"""LayerNorm that keeps its input in 8 bits.

Backward needs the normalised input x^ = (x - mean) / deviation. It is formed again from 8 bits a
number (rounding.py) and the two exact float32 numbers a row that PyTorch keeps anyway, and
PyTorch's own backward does the rest.

What is exact: the output, the bias gradient. What is noisy: the weight gradient, sum of dY x^,
without bias, and of dX = (dY w - mean(dY w) - x^ mean(dY w x^)) / deviation the last term, with a
bias of the order of the rounding's variance. Kept: 0.27 of the input in float32. The input itself
is the residual stream, which nothing else keeps.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from basis.exchange import StandIn, take_over
from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.noise_key import HasNoiseKey
from basis.ops.rounding import Rounded, restore, round_to_int8


def norm_of_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, single: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., N), mean and 1 / deviation (..., 1) of x (..., N). single: in single operations, as
    some libraries write it out, without a bias.
    """
    if single:
        assert bias is None
        mean = x.mean(-1, keepdim=True)
        inverse = torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + eps)
        return weight * ((x - mean) * inverse), mean, inverse
    y, mean, inverse = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
    return y, mean, inverse


class _LeanLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, single: bool, key: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return norm_of_rows(x, weight, bias, eps, single)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, weight, bias, _, _, key = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        _, mean, deviation = output
        ctx.mark_non_differentiable(mean, deviation)
        ctx.set_materialize_grads(False)
        ctx.has_bias, ctx.dtype = bias is not None, x.dtype
        ctx.save_for_backward(*round_to_int8(x, key), mean, deviation, weight, link(x))

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_output: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 6
        codes, scales, mean, deviation, weight, _ = ctx.saved_tensors
        x = restore(Rounded(codes, scales), ctx.dtype)
        needed = [
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1],
            ctx.has_bias and ctx.needs_input_grad[2],
        ]
        bias = weight if ctx.has_bias else None  # only its presence is looked at
        grads = torch.ops.aten.native_layer_norm_backward(
            grad_output, x, weight.shape, mean, deviation, weight, bias, needed
        )
        return (*grads, None, None, None)


def normalized(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, single: bool = False, *, key: Tensor
) -> Tensor:
    """y of `norm_of_rows`, for which x is kept in 8 bits. key: int64, of their noise."""
    y, *_ = _LeanLayerNorm.apply(x, weight, bias, eps, single, key)
    # One of several results of an operation takes no attribute in a graph, and a sketched layer
    # leaves one on what it reads (shared_input.py).
    if torch.compiler.is_compiling():
        y = torch.ops.aten._unsafe_view(y, y.shape)
    return cast(Tensor, y)


class LeanLayerNorm(StandIn, HasNoiseKey, nn.LayerNorm):
    """nn.LayerNorm over the last dimension whose kept input is rounded to 8 bits. Same parameters,
    same output.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return cast(Tensor, self.node(input))
        if self.for_inference() or not (
            torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        ):
            if self.weight.requires_grad:
                self.pass_without_grad(input.device)
            return super().forward(input)
        key = self.fixed_or_fresh_key(input.device)
        device = input.device.type
        if torch.is_autocast_enabled(device):  # as F.layer_norm does under autocast
            input = input.to(torch.promote_types(input.dtype, torch.float32))
        return normalized(input, self.weight, self.bias, self.eps, key=key)

    @classmethod
    def from_norm(cls, norm: nn.LayerNorm) -> LeanLayerNorm:
        """The same norm, sharing `norm`'s parameters and hooks."""
        return take_over(cls(norm.normalized_shape, norm.eps, device="meta"), norm)

    def original(self) -> nn.LayerNorm:
        return take_over(nn.LayerNorm(self.normalized_shape, self.eps, device="meta"), self)

    @staticmethod
    def supports(norm: nn.LayerNorm) -> bool:
        """Whether a norm can be exchanged: over one dimension, with a weight."""
        return len(norm.normalized_shape) == 1 and norm.weight is not None
