"""What the loss head does with its rows, a block at a time: the logits Y = W X^T + b of a block,
from them dY in their place, and what dY adds to dX and to dW (loss_head.py says what for).

From X (B, N), W (V, N), b (V,), targets and the left factor L (B, k) of a method come

    loss            of all rows as loss_rows.py has it, 0-dimensional
    dX   (B, N)     dY W, exact
    P    (V, k)     dY^T L; without L but with `whole`, dY^T (V, B) itself
    |dY|^2          0-dimensional, if a method asks for it
    sums (V,)       of dY's rows, if a method asks for them, or the bias, whose gradient they are

in one of two ways, by the device.

*CPU: small blocks, vocabulary-major.* Logits are float32 at least. Y lies as W X^T; its product,
the one with L and the one that forms dW then read W and Y row by row; with few rows (B = 64) that
is up to twice as fast as X W^T on a CPU.

*CUDA: large blocks, row-major, in the run's precision.* Under autocast Y is bfloat16, as the logits
of an unfused head are; its softmax is taken in float32, row by row, and rounded once, to dY. There
is one buffer: all blocks write their logits into it, and dY over them. dX is written where it
stays, and P added up in float32 inside the product (`addmm` with `out_dtype`), without a copy in
low precision.

How many rows a block has stands in head_sizes.py.

Held meanwhile, beside dX and P: one block, W in the run's precision, a few numbers a row. In
float32 on CUDA W is not copied and nothing is padded.

In a graph of torch.compile the walk is one operator, `basis::head_sums`: unrolled, 16,384 rows of
GPT-2 were 49 blocks in the graph, each with buffers of its own, and 2 GB more at the peak. Where
the CPU has one block alone it stays visible, for the compiler to fuse. Observers (`HeadHook`) are
functions of the host and need the loop itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from basis.head_sizes import blocks_of_rows, by_rows, most_rows, padded_classes
from basis.loss_rows import RowLosses, Rule
from basis.ops.matrix import at_least_float32, frobenius_norm, tall_product, without_autocast
from basis.ops.softmax import add_product, softmax_gradient_

_MEAN = Rule()
BlockObserver = Callable[[slice, Tensor], None]
"""Called with some rows and their dY^T (V, block), which it must leave as it is."""


@dataclass(frozen=True)
class Sums:
    """The module's table. product, squares and sums are empty where they were not asked for."""

    loss: Tensor
    grad_x: Tensor
    product: Tensor
    squares: Tensor
    sums: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.loss, self.grad_x, self.product, self.squares, self.sums


@dataclass(frozen=True)
class Wanted:
    """What dW needs. whole: dY^T, if there is no left factor. squares, sums: of dY, see there."""

    whole: bool = False
    squares: bool = False
    sums: bool = False


def head_sums(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int | None,
    left: Tensor | None,
    wanted: Wanted,
    observers: tuple[BlockObserver, ...] = (),
    bias: Tensor | None = None,
    rule: Rule = _MEAN,
    number: Tensor | None = None,
) -> Sums:
    """The module's table for x (B, N), of the run's precision; weight (V, N); targets (B,); left
    (B, k); number: what the sum of the losses is divided by, if it is given. P and sums are in the
    precision of the weight, of CUDA's blocks in float32 at least.
    """
    form = _by_row if by_rows(x.device) else _by_class
    if torch.compiler.is_compiling() and not observers:
        if by_rows(x.device) or x.shape[0] > most_rows(weight.shape[0], x.dtype, x.device):
            flags = (wanted.whole, wanted.squares, wanted.sums)
            own = (bias, number, *_flat(rule))
            return Sums(*_operator(x, weight, targets, ignore_index, left, *flags, *own))
        losses = RowLosses(targets, ignore_index, at_least_float32(x.dtype), rule, number)
        return form(x, weight, bias, losses, left, wanted, ())
    with without_autocast(x):
        losses = RowLosses(targets, ignore_index, at_least_float32(x.dtype), rule, number)
        return form(x, weight, bias, losses, left, wanted, observers)


def _flat(rule: Rule) -> tuple[float, float, float, float, bool]:
    """What an operator can take of a rule: numbers."""
    return rule.label_smoothing, rule.z_loss, rule.softcap, rule.scale, rule.summed


def _by_class(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: RowLosses,
    left: Tensor | None,
    wanted: Wanted,
    observers: tuple[BlockObserver, ...],
) -> Sums:
    """`head_sums` in vocabulary-major blocks of float32, for the CPU."""
    w = weight.to(x.dtype)
    b = None if bias is None else bias.to(x.dtype)[:, None]
    grad_x = x.new_empty(x.shape)
    product: Tensor | None = None
    losses: list[Tensor] = []
    squares: list[Tensor] = []
    sums: list[Tensor] = []
    whole: list[Tensor] = []
    for block in blocks_of_rows(x, weight.shape[0], wanted.whole):
        # (V, N) (N, block) -> (V, block). The softmax of low-precision logits is taken in float32.
        columns = x[block].t()
        y = (w @ columns if b is None else torch.addmm(b, w, columns)).to(count.dtype)
        losses.append(count.loss_and_gradient(y, block))
        grad_y = y.to(x.dtype)
        del y
        grad_x[block] = tall_product(grad_y, w)
        if wanted.whole:
            whole.append(grad_y)
        if left is not None:
            part = left[block].to(grad_y.dtype)  # (V, block) (block, k)
            if product is None:  # summed up in the precision of the weight
                product = (grad_y @ part).to(weight.dtype)
            else:
                add_product(product, grad_y, part)
        if wanted.squares:
            squares.append(frobenius_norm(grad_y).square())
        if wanted.sums:
            sums.append(grad_y.sum(1).to(weight.dtype))
        for observe in observers:
            observe(block, grad_y)
        del grad_y  # before the next block's logits are made
    if wanted.whole:
        product = torch.cat(whole, 1)
    return Sums(
        torch.stack(losses).sum(),
        grad_x,
        x.new_empty(0) if product is None else product,
        torch.stack(squares).sum() if squares else x.new_empty(0),
        torch.stack(sums).sum(0) if sums else x.new_empty(0),
    )


def _by_row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: RowLosses,
    left: Tensor | None,
    wanted: Wanted,
    observers: tuple[BlockObserver, ...],
) -> Sums:
    """`head_sums` in row-major blocks of the run's precision, for CUDA."""
    (rows, width), classes = x.shape, weight.shape[0]
    precise, rule = count.dtype, count.rule
    shares = count.shares
    if shares is None:
        shares = x.new_full((rows,), count.share, dtype=precise)
    padded = padded_classes(classes, x.dtype)
    w = weight.to(x.dtype)
    if padded > classes:
        w = x.new_empty(padded, width)
        w[:classes] = weight  # cast and copied at once
        w[classes:] = 0
    b: Tensor | None = None
    if bias is not None:
        b = torch.nn.functional.pad(bias.to(x.dtype), (0, padded - classes))
    blocks = blocks_of_rows(x, classes, wanted.whole)
    buffer = x.new_empty(rows if wanted.whole else blocks[0].stop, padded)
    grad_x = x.new_empty(x.shape)
    losses, squares = x.new_zeros(2, rows, dtype=precise)
    product, sums = x.new_empty(0), x.new_empty(0)  # two: an operator's results share no memory
    sum_dtype = torch.promote_types(weight.dtype, torch.float32)
    if left is not None:
        product = x.new_zeros(padded, left.shape[1], dtype=sum_dtype)
    if wanted.sums:
        sums = x.new_zeros(padded, dtype=sum_dtype)
    for block in blocks:
        y = buffer[block] if wanted.whole else buffer[: block.stop - block.start]
        # (block, N) (N, V) -> (block, V)
        if b is None and rule.scale == 1.0:
            torch.mm(x[block], w.t(), out=y)
        else:  # rounded once, to scale (X W^T + b)
            added = (y, 0.0) if b is None else (b, rule.scale)
            torch.addmm(added[0], x[block], w.t(), beta=added[1], alpha=rule.scale, out=y)
        found = losses[block], squares[block]
        softmax_gradient_(y, classes, count.classes[block], shares[block], *found, rule)
        torch.mm(y, w, out=grad_x[block])  # y is dY now: (block, V) (V, N) -> (block, N)
        if left is not None:
            add_product(product, y.t(), left[block].to(y.dtype))  # (V, block) (block, k)
        if wanted.sums:
            sums += y.sum(0, dtype=sum_dtype)
        for observe in observers:
            observe(block, y[:, :classes].t())
    return Sums(
        count.reduced(losses, slice(0, rows)),
        grad_x,
        buffer[:, :classes].t() if wanted.whole else product[:classes],
        squares.sum() if wanted.squares else x.new_empty(0),
        sums[:classes],
    )


Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("basis::head_sums", mutates_args=())
def _operator(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int | None,
    left: Tensor | None,
    whole: bool,
    squares: bool,
    sums: bool,
    bias: Tensor | None = None,
    number: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    scale: float = 1.0,
    summed: bool = False,
) -> Tensors:
    """`head_sums` as one operator of a compiled graph."""
    wanted = Wanted(whole, squares, sums)
    rule = Rule(label_smoothing, z_loss, softcap, scale, summed)
    found = head_sums(x, weight, targets, ignore_index, left, wanted, (), bias, rule, number)
    return found.tensors()


@_operator.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int | None,
    left: Tensor | None,
    whole: bool,
    squares: bool,
    sums: bool,
    bias: Tensor | None = None,
    number: Tensor | None = None,
    *_: float,
) -> Tensors:
    row_major, classes = by_rows(x.device), weight.shape[0]
    precise = torch.promote_types(x.dtype, torch.float32)
    sum_dtype = torch.promote_types(weight.dtype, torch.float32) if row_major else weight.dtype
    product = x.new_empty(0)
    if whole and row_major:
        product = x.new_empty(x.shape[0], padded_classes(classes, x.dtype))[:, :classes].t()
    elif whole:
        product = x.new_empty(classes, x.shape[0])
    elif left is not None:
        product = x.new_empty(classes, left.shape[1], dtype=sum_dtype)
    return (
        x.new_empty((), dtype=precise),
        x.new_empty(x.shape),
        product,
        x.new_empty((), dtype=precise) if squares else x.new_empty(0),
        x.new_empty(classes, dtype=sum_dtype) if sums else x.new_empty(0),
    )


@register_flop_formula(torch.ops.basis.head_sums)
def _flops(
    x: Any, weight: Any, targets: Any, ignore_index: Any, left: Any, *_: Any, **__: Any
) -> int:
    """FLOPs from shapes: Y, dX and P. Else a compiler that may compute again what costs little
    would take the head for free.
    """
    (rows, width), classes = x, weight[0]
    return 2 * rows * classes * (2 * width + (0 if left is None else left[1]))
