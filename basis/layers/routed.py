"""Rows of experts, each times its routing weight, summed for each token.

    out_t = sum over the experts e of token t of w_te y_te
    dy_te = w_te dout_t,   dw_te = <dout_t, y_te>

PyTorch keeps every y for dw, and the product w y besides, since `index_copy` keeps its source. Here
y alone is kept, and with `bits` it is y rounded at random (ops/group_code.py): dw is linear in y
and E[y^] = y, so dw has no bias, and dy is exact.

The other way to dw is <dh, h> / w, from what the backward of the second product has at hand. It
needs the h that went into that product, of which a sketch alone is kept: of 2 bits where y has 4,
and of mixed rows for methods that sketch by rows.

What is exact: the output, by the operations of the plain module; dy; and dw, without `bits`. What
is noisy: dw, by what 4 bits leave of y, 12% in norm, spread over its numbers: of an inner product
of C numbers that is 12% of |dout| |y| / sqrt(C). Kept: y, whole or in 4.25 bits a number, the
routing weights and the order of the rows.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.ops import group_code

BITS = 4
GROUP = 128


class _Combine(torch.autograd.Function):
    """See `sum_of_experts`; `key` is None to keep y as it is."""

    @staticmethod
    def forward(
        y: Tensor, weights: Tensor, order: Tensor, dtype: torch.dtype, key: Tensor | None
    ) -> Tensor:
        tokens, k = weights.shape
        rows = y * weights.flatten()[order].unsqueeze(-1)
        every = rows.new_zeros(tokens * k, y.shape[-1]).index_copy(0, order, rows)
        total = every.unflatten(0, (tokens, k)).sum(1)
        # Not a cast that does nothing: in a graph of PyTorch 2.11 the gradient would be lost.
        return total if total.dtype == dtype else total.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, weights, order, _, key = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        ctx.dtype, ctx.rounded = y.dtype, key is not None
        kept: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1]:
            kept = (y,) if key is None else (*group_code.encode(y, key, BITS, GROUP), key)
        ctx.save_for_backward(weights, order, link(y), *kept)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weights, order, _, *kept = ctx.saved_tensors
        _, k = weights.shape
        wide = torch.promote_types(ctx.dtype, weights.dtype)
        grad_rows = grad_output[order // k].to(wide)  # (S, C)
        grad_y = grad_weights = None
        if ctx.needs_input_grad[1]:
            y = kept[0]
            if ctx.rounded:
                codes, ranges, key = kept
                form = group_code.Form(BITS, GROUP, True, ctx.dtype)
                y = group_code.decode(codes, ranges, key, form)
            each = (grad_rows * y).sum(-1)
            grad_weights = each.new_zeros(weights.numel()).index_copy(0, order, each)
            grad_weights = grad_weights.view(weights.shape).to(weights.dtype)
        if ctx.needs_input_grad[0]:
            grad_y = (grad_rows * weights.flatten()[order].unsqueeze(-1)).to(ctx.dtype)
        return grad_y, grad_weights, None, None, None


def sum_of_experts(
    y: Tensor, weights: Tensor, order: Tensor, dtype: torch.dtype, key: Tensor | None = None
) -> Tensor:
    """The sum for each token (T, C), in `dtype`, of rows `y` (S, C) of its experts times `weights`
    (T, k). order (S,): of the numbers 0 to T k - 1, the one that each row belongs to.

    key: int64, of the noise of rounding what is kept of y; None keeps it as it is.
    """
    return cast(Tensor, _Combine.apply(y, weights, order, dtype, key))
