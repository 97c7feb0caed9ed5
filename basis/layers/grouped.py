"""A product of each segment of rows with the weights of its expert, within one graph.

    Y_e = X_e W_e^T + b_e,   dX_e = dY_e W_e,   dW_e = dY_e^T X^_e

How many rows an expert has is known when the graph runs, and no sketch of so many rows can be part
of it. A method that keeps each row by itself does not mind: `Quantized` rounds all rows at once,
before they are sorted by expert, and backward picks an expert's rows from what it restores. So
tokens that go to k experts are kept once, not k times, and bits that are no whole number are spread
over the experts as the tokens are.

The three products are operators of their own, a loop over experts that a graph calls and does not
look into; PyTorch's grouped product is for bfloat16 alone there, in 2.11 to 2.13. The ends of the
segments lie on the host: their copy is the one time in a forward that the host waits for a GPU.

`basis.gradient_quality` puts another method in the place of a layer's own, so it sees sketches of
segments: of the same errors on average, from other noise.

What is exact: Y, dX and the gradient of b; what is estimated: dW, as `Quantized` does. Kept: a
sketch of all rows, where they belong and the ends of segments. Rows behind the last end belong to
no expert; what comes of them is zero.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from basis.estimator import kept_of
from basis.estimators.quantized import Quantized
from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.ops.matrix import in_eager_mode, without_autocast


def _segments(ends: Tensor) -> list[tuple[int, slice]]:
    """The experts that have rows, and which these are."""
    found, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            found.append((expert, slice(start, end)))
        start = end
    return found


def _product(x: Tensor, weights: Tensor, biases: Tensor | None, ends: Tensor) -> Tensor:
    """x (S, N), weights (E, M, N), biases (E, M) -> (S, M)."""
    y = x.new_zeros(len(x), weights.shape[1])
    for expert, rows in _segments(ends):
        torch.mm(x[rows], weights[expert].to(x.dtype).t(), out=y[rows])
        if biases is not None:
            y[rows] += biases[expert].to(x.dtype)
    return y


def _product_fake(x: Tensor, weights: Tensor, biases: Tensor | None, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[1])


def _gradients(grad: Tensor, x: Tensor, index: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """grad (S, M), whose rows belong to the rows `index` of x (R, N) -> (E, M, N), (E, M)."""
    experts = len(ends)
    weights = grad.new_zeros(experts, grad.shape[1], x.shape[1])
    biases = grad.new_zeros(experts, grad.shape[1])
    for expert, rows in _segments(ends):
        torch.mm(grad[rows].t(), x[index[rows]], out=weights[expert])
        biases[expert] = grad[rows].sum(0)
    return weights, biases


def _gradients_fake(grad: Tensor, x: Tensor, index: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    experts = ends.shape[0]
    weights = grad.new_empty(experts, grad.shape[1], x.shape[1])
    return weights, grad.new_empty(experts, grad.shape[1])


_PRODUCT = torch.library.custom_op(
    "basis::grouped_product",
    _product,
    mutates_args=(),
    schema="(Tensor x, Tensor weights, Tensor? biases, Tensor ends) -> Tensor",
)
_PRODUCT.register_fake(_product_fake)
_GRADIENTS = torch.library.custom_op(
    "basis::grouped_gradients",
    _gradients,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor index, Tensor ends) -> (Tensor, Tensor)",
)
_GRADIENTS.register_fake(_gradients_fake)


class _GroupedLinear(torch.autograd.Function):
    """See `grouped_linear`."""

    @staticmethod
    def forward(
        x: Tensor,
        weights: Tensor,
        biases: Tensor | None,
        source: Tensor,
        index: Tensor,
        ends: Tensor,
        key: Tensor,
        estimator: Quantized,
    ) -> Tensor:
        product = _product if in_eager_mode(x) else _PRODUCT
        with without_autocast(x):
            return cast(Tensor, product(x, weights, biases, ends))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weights, biases, source, index, ends, key, ctx.estimator = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        ctx.rows, ctx.bias_dtype = source.shape[0], None if biases is None else biases.dtype
        kept: tuple[Tensor, ...] | None = ()
        if ctx.needs_input_grad[1]:
            with without_autocast(source):
                kept = kept_of(ctx.estimator, source, key, {})
        ctx.keeps_input = kept is None
        kept = (source,) if kept is None else kept
        ctx.save_for_backward(weights, index, ends, link(x), *kept)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, index, ends, _, *kept = ctx.saved_tensors
        eager = in_eager_mode(grad)
        grad = grad.contiguous()
        grad_x = grad_weights = grad_biases = None
        if ctx.needs_input_grad[0]:
            grad_x = (_product if eager else _PRODUCT)(grad, weights.mT, None, ends)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            if not ctx.needs_input_grad[1]:
                x = grad.new_empty(ctx.rows, 0)
            elif ctx.keeps_input:
                x = kept[0]
            else:
                x = ctx.estimator.factors(tuple(kept), ctx.rows).left
            gradients = _gradients if eager else _GRADIENTS
            grad_weights, grad_biases = gradients(grad, x.to(grad.dtype), index, ends)
            grad_weights = grad_weights.to(weights.dtype) if ctx.needs_input_grad[1] else None
            wanted = ctx.needs_input_grad[2]
            grad_biases = grad_biases.to(ctx.bias_dtype) if wanted else None
        return grad_x, grad_weights, grad_biases, None, None, None, None, None


def grouped_linear(
    x: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    source: Tensor,
    index: Tensor,
    ends: Tensor,
    key: Tensor,
    estimator: Quantized,
) -> Tensor:
    """The rows x (S, N), sorted by expert, times the weights (E, M, N) of their experts: (S, M).

    x is `source[index]`, and `source` (R, N) what is kept in few bits. biases (E, M) or None; ends
    (E,): where each expert's rows end, on the host; key: int64, of the noise.
    """
    made = _GroupedLinear.apply(x, weights, biases, source.detach(), index, ends, key, estimator)
    return cast(Tensor, made)
