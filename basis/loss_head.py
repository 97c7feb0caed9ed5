"""The last dense layer and the cross-entropy as one step: the logits of all rows never exist at
once, and none outlive forward.

At a vocabulary of 50,257 the head is most of a small GPT's step, and its logits are most of what
backward would keep. But the gradient of a mean cross-entropy is known as soon as a row's logits
are,

    dY = (softmax(Y) - onehot(targets)) / B,        Y = X W^T              (B rows, V classes)

so forward takes the rows in blocks of at most `BLOCK_BYTES` of logits, turns each block of Y into
dY in place, forms its rows of dX = dY W (exact), adds what it contributes to dW (by the layer's
estimator, exact or sketched), and lets it go. Backward multiplies dX and dW by the gradient of the
loss, which is 1 in a plain training step. One path for every method, so that comparisons between
methods compare the methods.

dW from blocks: an estimator says X ~ L Z (`Estimator.factors`), so dW = (L^T dY)^T Z, and L^T dY,
(k, V), is a sum over blocks. The exact one has L = X; a sketch has L = S^T with k = R. An estimator
without factors is given dY whole, held in X's precision.

Layout: Y is made vocabulary-major, as W X^T. Its product, the one with L and the one that forms dW
then read W and Y row by row; with few rows (B = 64) that is up to twice as fast as X W^T on a CPU.

What is exact: the loss, dX. What is estimated: dW, if the estimator says so. Kept until backward:
dX (B N elements) and dW (V N, the gradient itself, there a little earlier than usual). Held during
forward: one block of Y in float32 at least, where F.linear and F.cross_entropy hold two Y, and
three in backward. FLOPs: as without it.

With a head tied to an embedding, embedding.py lets dW flow on to it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.embedding import graph_is_released
from basis.estimator import Estimator, State
from basis.estimators.exact import Exact
from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.linear import SketchedLinear, wants_weight_grad
from basis.ops.matrix import (
    cast_for_autocast,
    frobenius_norm,
    has_values,
    in_eager_mode,
    reduce_columns,
    tall_product,
    without_autocast,
)
from basis.state import pack_state, unpack_state

BLOCK_BYTES = 64 * 2**20
"""Most bytes of logits (in float32) that exist at once. Larger blocks gain nothing on a CPU; a row
at least is taken.
"""


_skipping_blocks = False


@contextmanager
def skipping_blocks() -> Iterator[None]:
    """Within, a head goes through the first two and the last of its blocks of rows only.

    For programs that count what a step holds (bench/memory_plan.py) on tensors without values: all
    blocks between those hold the same bytes. The loss and the gradients are meaningless. A head
    whose method needs dY whole takes all blocks, since it collects them.
    """
    global _skipping_blocks
    before, _skipping_blocks = _skipping_blocks, True
    try:
        yield
    finally:
        _skipping_blocks = before


def _blocks(rows: int, classes: int) -> list[slice]:
    """Rows in as few equal blocks as keep to `BLOCK_BYTES`."""
    most = max(BLOCK_BYTES // (4 * classes), 1)
    size = math.ceil(rows / math.ceil(rows / most))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _Targets:
    """The classes of all rows (B,), and what each row counts for in the mean."""

    def __init__(self, targets: Tensor, ignore_index: int | None, dtype: torch.dtype) -> None:
        self.classes, self.rows = targets, len(targets)
        self.counted: Tensor | None = None
        if ignore_index is not None:
            self.counted = targets != ignore_index
            self.classes = targets.where(self.counted, 0)
            self.number = self.counted.sum()
            self.shares = self.counted.to(dtype) / self.number.clamp(min=1)  # 1 / number or 0

    def loss_and_gradient(self, x: Tensor, w: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        """What the block's rows, which are `x`, contribute to the mean of the losses, and dY^T
        (V, block) in the precision of `x`.
        """
        y = w @ x.t()  # (V, N) (N, block) -> (V, block): vocabulary-major
        # The softmax of low-precision logits is taken in float32.
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        # y, the one large tensor, is overwritten: logits, then their exponentials, then dY^T.
        index = self.classes[None, block]
        at_target = y.gather(0, index)[0]
        largest = reduce_columns(torch.amax, y)
        sums = reduce_columns(torch.sum, y.sub_(largest).exp_())
        # cross-entropy of a row: log sum exp(y) - y[target], the largest logit taken out of exp
        losses = sums.log() + largest - at_target
        if self.counted is None:
            loss = losses.sum() / self.rows
            # softmax / rows in all places, and -1 / rows at the target
            y.mul_(1.0 / (sums * self.rows))
            y.scatter_add_(0, index, y.new_full(index.shape, -1.0 / self.rows))
        else:
            # Not times 0: the loss of a row that is ignored may be infinite.
            loss = losses.where(self.counted[block], 0.0).sum() / self.number
            shares = self.shares[block]
            y.mul_(shares / sums).scatter_add_(0, index, -shares[None])
        return loss, y.to(x.dtype)


class _WeightGradient:
    """dW of the head, from blocks of dY^T."""

    def __init__(
        self, estimator: Estimator, x: Tensor, key: Tensor, weight: Tensor, state: State
    ) -> None:
        self.estimator, self.weight = estimator, weight
        with without_autocast(x):
            self.kept = estimator.compress(x, key, state)
        self.factors = estimator.factors(self.kept, x.shape[0])
        self.projected: Tensor | None = None  # (L^T dY)^T, (V, k)
        self.squares: list[Tensor] = []  # |dY|^2 by block
        self.sums: list[Tensor] = []  # of dY's rows, by block
        self.whole: list[Tensor] = []

    def add(self, block: slice, grad_y: Tensor) -> None:
        """Take dY^T (V, block) of these rows."""
        if self.factors is None:
            self.whole.append(grad_y)
            return
        left = self.factors.left[block].to(grad_y.dtype)  # (V, block) (block, k)
        if self.projected is None:
            self.projected = (grad_y @ left).to(
                self.weight.dtype
            )  # summed up in the precision of the weight
        elif self.projected.dtype == grad_y.dtype == left.dtype:
            self.projected.addmm_(grad_y, left)
        else:
            self.projected.add_(grad_y @ left)
        if self.factors.scale is not None:
            self.squares.append(frobenius_norm(grad_y).square())
        if self.factors.mean is not None:
            self.sums.append(grad_y.sum(1).to(self.weight.dtype))

    def result(self) -> Tensor:
        """dW (V, N) in the precision of the weight."""
        if self.factors is None:
            return self.estimator.weight_grad(self.kept, torch.cat(self.whole, 1).t()).to(
                self.weight.dtype
            )
        assert self.projected is not None
        result, right, scale = self.projected, self.factors.right, self.factors.scale
        right = None if right is None else right.to(result.dtype)
        if scale is not None:
            factor = scale(torch.stack(self.squares).sum().sqrt(), frobenius_norm(result)).to(
                result.dtype
            )
            if right is None:
                result = result * factor
            else:
                right = right * factor  # k x N and not V x N numbers
        result = result if right is None else result @ right
        if self.factors.mean is not None:
            result = torch.addr(
                result, torch.stack(self.sums).sum(0), self.factors.mean.to(result.dtype)
            )
        return result


BlockObserver = Callable[[slice, Tensor], None]
"""Called with some rows and their dY^T (V, block), which it must leave as it is."""


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
    """(loss, dX, dW) of the mean cross-entropy of X W^T; the last two are kept for backward, not
    differentiated.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int | None,
        key: Tensor,
        estimator: Estimator,
        needs_weight_grad: bool,
        observers: tuple[BlockObserver, ...],
        *state: Any,  # as pack_state gives it
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = x.shape[0]
        w = weight.to(x.dtype)
        gradient = (
            _WeightGradient(estimator, x, key, weight, unpack_state(*state))
            if needs_weight_grad
            else None
        )
        counted = _Targets(targets, ignore_index, torch.promote_types(x.dtype, torch.float32))
        losses, grad_x = [], torch.empty_like(x)
        blocks = _blocks(rows, weight.shape[0])
        collected = gradient is not None and gradient.factors is None
        if _skipping_blocks and not collected and len(blocks) > 3:
            blocks = [*blocks[:2], blocks[-1]]
        for block in blocks:
            loss, grad_y = counted.loss_and_gradient(x[block], w, block)
            losses.append(loss)
            grad_x[block] = tall_product(grad_y, w)
            if gradient is not None:
                gradient.add(block, grad_y)
            for observe in observers:
                observe(block, grad_y)
            del grad_y  # before the next block's logits are made
        grad_weight = None if gradient is None else gradient.result()
        return torch.stack(losses).sum(), grad_x, grad_weight

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]
    ) -> None:
        refuse_nested_transforms()
        x, weight, *_ = inputs
        _, grad_x, grad_weight = output
        ctx.inputs = len(inputs)
        ctx.mark_non_differentiable(*(grad for grad in (grad_x, grad_weight) if grad is not None))
        ctx.set_materialize_grads(False)
        ctx.transformed = in_transform()
        ctx.save_for_backward(
            grad_x if ctx.needs_input_grad[0] else None, grad_weight, link(x), link(weight)
        )

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_loss: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, *_ = ctx.saved_tensors
        if grad_loss is None:
            return (None,) * ctx.inputs
        # A look at the value spares a pass over dW. Not on a GPU, where looking waits for it, nor
        # where there is no value.
        may_look = (
            type(grad_loss) is Tensor
            and grad_loss.device.type == "cpu"
            and not torch.compiler.is_compiling()
        )
        if not (may_look and float(grad_loss) == 1.0):
            multiply = Tensor.mul_ if graph_is_released() else Tensor.mul
            grad_x = None if grad_x is None else multiply(grad_x, grad_loss.to(grad_x.dtype))
            grad_weight = (
                None
                if grad_weight is None
                else multiply(grad_weight, grad_loss.to(grad_weight.dtype))
            )
        return grad_x, grad_weight, *(None,) * (ctx.inputs - 2)


def linear_cross_entropy(
    layer: nn.Linear,
    input: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
) -> Tensor:
    """`F.cross_entropy(layer(input), targets)` in nats, a scalar, with dW by the layer's estimator.

    layer: nn.Linear or SketchedLinear, N to V features; input (..., N); targets (...) int64 in [0,
    V), or `ignore_index`: such rows do not count in the mean, and their gradient is zero. Where no
    row counts the loss is NaN and the gradients are zero. `ignore_index=None` says that all rows
    count, and saves a GPU a few launches. Without gradients to form, where the layer has a bias or
    hooks that must see its output (all but `HeadHook`s), in float16 (whose small gradients live by
    a scaled loss, and the scale is not known in forward), and for an input without rows or on the
    meta device, PyTorch's own functions do it, from whole logits. weight: what `tied_embedding`
    returned, through which dW then flows. Raises ValueError if the shapes do not fit, and for other
    targets; on a GPU, where a look would wait for it, PyTorch's own assertion of the device meets
    these.
    """
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
    fusible = type(layer) in (nn.Linear, SketchedLinear) and layer.bias is None and not hooked
    needs_grad = torch.is_grad_enabled() and (input.requires_grad or layer.weight.requires_grad)
    x = cast_for_autocast(input)
    if not fusible or not needs_grad or x.dtype == torch.float16 or not has_values(x):
        logits = layer(input).flatten(0, -2)
        return F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            targets.flatten(),
            ignore_index=-100 if ignore_index is None else ignore_index,
        )
    wanted = wants_weight_grad(layer.weight)
    state: State = {}
    if isinstance(layer, SketchedLinear):
        estimator, key = layer.estimator, layer.key_for(input)
        state = layer.learn(input, key) if wanted else layer.state
    else:
        estimator, key = Exact(), torch.zeros((), dtype=torch.int64, device=input.device)
    x = x.flatten(0, -2)
    watched = [hook.fused(x.detach()) for hook in hooks]
    loss, _, _ = _LinearCrossEntropyFunction.apply(
        x,
        layer.weight if weight is None else weight,
        targets.flatten(),
        ignore_index,
        key,
        estimator,
        wanted,
        tuple(observe for observe, _ in watched),
        *pack_state(state),
    )
    for _, on_gradient in watched:
        loss.register_hook(on_gradient)
    return loss
