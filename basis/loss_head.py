"""The last dense layer and the cross-entropy as one step: the logits of all rows never exist at
once, and none outlive forward.

At a vocabulary of 50,257 the head is most of a small GPT's step, and its logits are most of what
backward would keep. But the gradient of a mean cross-entropy is known as soon as a row's logits
are,

    dY = (softmax(Y) - onehot(targets)) / B,        Y = X W^T              (B rows, V classes)

so forward takes the rows in blocks (head_sizes.py says of how many rows, head_blocks.py in which
layout), turns each block of Y into dY in place, forms its rows of dX = dY W (exact), adds what it
contributes to dW (by the layer's estimator, exact or sketched), and lets it go. Backward multiplies
dX and dW by the gradient of the loss, which is 1 in a plain training step. One path for every
method, so that comparisons between methods compare the methods.

dW from blocks: an estimator says X ~ L Z (`Estimator.factors`), so dW = (L^T dY)^T Z, and L^T dY,
(k, V), is a sum over blocks. The exact one has L = X; a sketch has L = S^T with k = R. An estimator
without factors is given dY whole, held in X's precision.

What is exact: the loss, dX, db. What is estimated: dW, if the estimator says so. Kept until
backward: dX (B N numbers) and dW (V N, the gradient itself, there a little earlier than usual) or,
if they are fewer, the two factors of dW, k (V + N), whose product backward forms. Held during
forward: one block, where F.linear and F.cross_entropy hold all of Y once or twice, and two or three
times in backward. FLOPs: as without it.

So the peak beyond what the layers below keep is, in forward, a block, dX and dW or its factors; at
the start of backward dX and dW. An exact dW cannot wait: it needs every dY. It is what remains as a
gradient, but it is there while all activations are; a sketched one comes when the block is gone.

Label smoothing, a z-loss, a soft cap of the logits, a bias, a sum and a number that the sum is
divided by change what a block does with its logits (loss_rows.py), and not what is kept.

With a head tied to an embedding, embedding.py lets dW flow on to it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from basis.embedding import graph_is_released
from basis.estimator import Estimator, Factors, State, kept_of
from basis.estimators.exact import Exact
from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.head_blocks import BlockObserver, Sums, Wanted, head_sums
from basis.lean.recompute import RecomputingLinear
from basis.linear import SketchedLinear
from basis.loss_rows import Rule, number_of, rule_of
from basis.ops.matrix import (
    at_least_float32,
    cast_for_autocast,
    frobenius_norm,
    has_values,
    in_eager_mode,
    without_autocast,
)
from basis.sketched import wants_weight_grad
from basis.state import pack_state, unpack_state

_EXACT = Exact()  # not made within a graph: Dynamo of PyTorch 2.11 can't


def _dense(parts: tuple[Tensor, ...], factor: Tensor | None = None) -> Tensor:
    """dW (V, N), times `factor`, from (P, Z): P Z; from (P, Z, sums, mean): P Z + sums mean^T."""
    product, right, *outer = parts
    if factor is not None:
        right = right * factor.to(right.dtype)  # k x N and not V x N numbers
    grad_weight = product @ right  # (V, k) (k, N)
    if outer:
        sums, mean = outer
        grad_weight.addr_(sums if factor is None else sums * factor.to(sums.dtype), mean)
    return grad_weight


def _weight_gradient(
    estimator: Estimator, kept: tuple[Tensor, ...], factors: Factors | None, found: Sums, w: Tensor
) -> tuple[Tensor, ...]:
    """dW (V, N) in the precision of the weight `w`, or what `_dense` forms it from if that is
    less.
    """
    if factors is None:
        return (estimator.weight_grad(kept, found.product.t()).to(w.dtype),)
    product = found.product.to(w.dtype)
    right = None if factors.right is None else factors.right.to(w.dtype)
    if factors.scale is not None:
        scale = factors.scale(found.squares.sqrt(), frobenius_norm(product)).to(w.dtype)
        if right is None:
            product = product * scale
        else:
            right = right * scale
    outer: tuple[Tensor, ...] = ()
    if factors.mean is not None:
        outer = (found.sums.to(w.dtype), factors.mean.to(w.dtype))
    if right is None:
        return (torch.addr(product, *outer) if outer else product,)
    parts = (product, right, *outer)
    return parts if sum(part.numel() for part in parts) < w.numel() else (_dense(parts),)


def _bias_gradient(found: Sums, bias: Tensor | None, wanted: bool) -> tuple[Tensor, ...]:
    """db (V,) in the precision of the bias, or nothing."""
    if bias is None or not wanted:
        return ()
    # A copy: a centred method keeps the sums as well, and backward multiplies each in place.
    return (found.sums.to(bias.dtype, copy=True),)


class HeadHook(abc.ABC):
    """A forward hook for a layer that may be fused with its loss: called as any hook where it is
    not, and as `fused` where it is.

    Other hooks must see the layer's output, which a fused head never has whole: with them the head
    runs unfused.
    """

    @abc.abstractmethod
    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """After a forward that is not fused."""

    @abc.abstractmethod
    def fused(self, x: Tensor) -> tuple[BlockObserver, Callable[[Tensor], None]]:
        """Before a fused forward on `x` (B, N). The first function is shown dY block by block, for
        a loss whose gradient is 1; the second one the gradient of the loss, in backward.
        """


class _LinearCrossEntropyFunction(torch.autograd.Function):
    """(loss, dX, db if there is a bias that wants it, dW or its parts) of the cross-entropy of
    X W^T + b; all but the loss are kept for backward, not differentiated.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs_weight_grad: bool,
        needs_bias_grad: bool,
        targets: Tensor,
        ignore_index: int | None,
        rule: Rule,
        number: Tensor | None,
        key: Tensor,
        estimator: Estimator,
        observers: tuple[BlockObserver, ...],
        *state: Any,  # as pack_state gives it
    ) -> tuple[Tensor, ...]:
        loss_of = (observers, bias, rule, number)
        if not needs_weight_grad:
            wanted = Wanted(sums=needs_bias_grad)
            found = head_sums(x, weight, targets, ignore_index, None, wanted, *loss_of)
            return found.loss, found.grad_x, *_bias_gradient(found, bias, needs_bias_grad)
        with without_autocast(x):
            kept = kept_of(estimator, x, key, unpack_state(*state))
            if kept is None:
                estimator, kept = _EXACT, (x,)
            factors = estimator.factors(kept, x.shape[0])
            if factors is None:
                left, wanted = None, Wanted(whole=True, sums=needs_bias_grad)
            else:
                left = factors.left
                wanted = Wanted(
                    squares=factors.scale is not None,
                    sums=factors.mean is not None or needs_bias_grad,
                )
            found = head_sums(x, weight, targets, ignore_index, left, wanted, *loss_of)
            parts = _weight_gradient(estimator, kept, factors, found, weight)
        grad_bias = _bias_gradient(found, bias, needs_bias_grad)
        return found.loss, found.grad_x, *grad_bias, *parts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        refuse_nested_transforms()
        x, weight, bias, _, ctx.has_bias_grad, *_ = inputs
        _, grad_x, *gradients = output
        ctx.inputs = len(inputs)
        ctx.mark_non_differentiable(grad_x, *gradients)
        ctx.set_materialize_grads(False)
        ctx.transformed = in_transform()
        ctx.save_for_backward(
            grad_x if ctx.needs_input_grad[0] else None,
            link(x),
            link(weight),
            None if bias is None else link(bias),
            *gradients,
        )

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_loss: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_x, _, _, _, *gradients = ctx.saved_tensors
        grad_bias = gradients[0] if ctx.has_bias_grad else None
        parts = gradients[1:] if ctx.has_bias_grad else gradients
        if grad_loss is None:
            return (None,) * ctx.inputs
        # A look at the value spares a pass over dW. Not on a GPU, where looking waits for it, nor
        # where there is no value.
        may_look = (
            type(grad_loss) is Tensor
            and grad_loss.device.type == "cpu"
            and not torch.compiler.is_compiling()
        )
        factor = None if may_look and float(grad_loss) == 1.0 else grad_loss
        grad_weight = parts[0] if len(parts) == 1 else None
        if factor is not None:
            multiply = Tensor.mul_ if graph_is_released() else Tensor.mul
            grad_x = None if grad_x is None else multiply(grad_x, factor.to(grad_x.dtype))
            if grad_bias is not None:
                grad_bias = multiply(grad_bias, factor.to(grad_bias.dtype))
            if grad_weight is not None:
                grad_weight = multiply(grad_weight, factor.to(grad_weight.dtype))
        if len(parts) > 1:
            grad_weight = _dense(tuple(parts), factor)
        return grad_x, grad_weight, grad_bias, *(None,) * (ctx.inputs - 3)


def fusible_kinds() -> tuple[type[nn.Module], ...]:
    """The layers whose forward a fused head knows."""
    return nn.Linear, RecomputingLinear, SketchedLinear


def linear_cross_entropy(
    layer: nn.Linear,
    input: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """`F.cross_entropy(layer(input), targets)` in nats, a scalar, with dW by the layer's estimator.

    layer: nn.Linear or SketchedLinear, N to V features, with or without a bias; input (..., N);
    targets (...) int64 in [0, V), or `ignore_index`: such rows do not count, and their gradient is
    zero. Where no row counts a mean is NaN and the gradients are zero. `ignore_index=None` says
    that all rows count, and saves a GPU a few launches. weight: what `tied_embedding` returned,
    through which dW then flows.

    What else there may be in the loss, all of it exact:

    - label_smoothing in [0, 1], as F.cross_entropy has it;
    - z_loss: this coefficient times the square of log sum exp of a row's logits;
    - softcap: logits are softcap tanh(logits / softcap), after they were multiplied by logit_scale;
    - reduction: "mean" over the rows that count, or their "sum";
    - num_items_in_batch: the sum is divided by it, a whole number or a tensor of one number. For
      gradient accumulation it is the number of targets that count in all micro-batches of a step,
      whose losses and gradients then add up to those of one batch. Means do not: with 4
      micro-batches their gradients add up to 4 times those of one batch.

    Without gradients to form, where the layer has hooks that must see its output (all but
    `HeadHook`s), in float16 (whose small gradients live by a scaled loss, and the scale is not
    known in forward), and for an input without rows or on the meta device, PyTorch's own functions
    do it, from whole logits.

    Raises ValueError if the shapes do not fit, for an option out of range, and for other targets;
    on a GPU, where a look would wait for it, PyTorch's own assertion of the device meets these.
    """
    rule = rule_of(label_smoothing, z_loss, softcap, logit_scale, reduction, num_items_in_batch)
    if input.shape[:-1] != targets.shape:
        raise ValueError(
            f"linear_cross_entropy: targets {tuple(targets.shape)} do not fit the rows of input "
            f"{tuple(input.shape)}"
        )
    classes = layer.weight.shape[0]
    if targets.device.type == "cpu" and in_eager_mode(targets):
        wrong = (targets < 0) | (targets >= classes)
        if ignore_index is not None:
            wrong &= targets != ignore_index
        if wrong.any():
            but = "" if ignore_index is None else f" or be ignore_index={ignore_index}"
            raise ValueError(
                f"linear_cross_entropy: targets must lie in [0, {classes}){but}, "
                f"got {int(targets[wrong][0])}"
            )
    hooks = [hook for hook in layer._forward_hooks.values() if isinstance(hook, HeadHook)]
    others = len(layer._forward_hooks) > len(hooks)
    hooked = (
        others or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )
    fusible = type(layer) in fusible_kinds() and not hooked
    bias = layer.bias if fusible else None
    bias_wanted = bias is not None and wants_weight_grad(bias)
    needs_grad = bias_wanted or (
        torch.is_grad_enabled() and (input.requires_grad or layer.weight.requires_grad)
    )
    x = cast_for_autocast(input)
    number = number_of(num_items_in_batch, at_least_float32(x.dtype), input.device)
    if not fusible or not needs_grad or x.dtype == torch.float16 or not has_values(x):
        logits = layer(input).flatten(0, -2)
        return rule.of_logits(logits, targets.flatten(), ignore_index, number)
    wanted = wants_weight_grad(layer.weight)
    state: State = {}
    if isinstance(layer, SketchedLinear):
        estimator = layer.estimator
        key, state = layer.prepare(x)
    else:
        estimator, key = _EXACT, torch.zeros((), dtype=torch.int64, device=input.device)
    x = x.flatten(0, -2)
    watched = [hook.fused(x.detach()) for hook in hooks]
    loss: Tensor
    loss, *_ = _LinearCrossEntropyFunction.apply(
        x,
        layer.weight if weight is None else weight,
        bias,
        wanted,
        bias_wanted,
        targets.flatten(),
        ignore_index,
        rule,
        number,
        key,
        estimator,
        tuple(observe for observe, _ in watched),
        *pack_state(state),
    )
    for _, on_gradient in watched:
        loss.register_hook(on_gradient)
    return loss
