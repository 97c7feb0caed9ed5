"""The loss of a head by its rows: what each counts for, and in which place its gradient is formed.

    loss   sum over the rows that count of their losses, over a number
    rows   all, or those whose target is not `ignore_index`
    number of rows that count ("mean"), 1 ("sum"), or one that is given

A number that is given is that of all micro-batches of a step: then their losses and gradients add
up to those of the step as one batch, whatever the share of ignored targets in each. A mean over
each micro-batch would not do: their sum is as many times too large as there are micro-batches.

A row's loss is the cross-entropy with the other terms of basis/ops/softmax.py, of logits times a
scale. All of it is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from basis.checks import whole_number
from basis.ops.matrix import at_least_float32, reduce_columns
from basis.ops.softmax import Terms, soft_cap_


@dataclass(frozen=True)
class Rule(Terms):
    """How logits become a loss. scale: of the logits, before a soft cap. summed: not a mean.

    All its fields are numbers: Dynamo of PyTorch 2.11 makes no dataclass with another one in it.
    """

    scale: float = 1.0
    summed: bool = False

    def of_logits(
        self, logits: Tensor, targets: Tensor, ignore_index: int | None, number: Tensor | None
    ) -> Tensor:
        """The loss by PyTorch's own functions, from whole logits (B, V); targets (B,)."""
        logits = logits.to(at_least_float32(logits.dtype))
        if self.scale != 1.0:
            logits = logits * self.scale
        if cap := self.softcap:
            logits = cap * torch.tanh(logits / cap)
        ignored = -100 if ignore_index is None else ignore_index
        loss = F.cross_entropy(
            logits,
            targets,
            ignore_index=ignored,
            reduction="mean" if number is None and not self.summed else "sum",
            label_smoothing=self.label_smoothing,
        )
        if self.z_loss:
            counted = targets != ignored
            squares = logits.logsumexp(1).square().where(counted, 0.0).sum()
            if number is None and not self.summed:
                squares = squares / counted.sum()
            loss = loss + self.z_loss * squares
        return loss if number is None else loss / number


def rule_of(
    label_smoothing: Any, z_loss: Any, softcap: Any, logit_scale: Any, reduction: Any, number: Any
) -> Rule:
    """The rule that these options of `linear_cross_entropy` ask for.

    Raises ValueError that names a wrong one.
    """
    smoothing = _real("label_smoothing", label_smoothing)
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing!r}: must lie in [0, 1]")
    coefficient = _real("z_loss", z_loss)
    if coefficient < 0.0:
        raise ValueError(f"z_loss={z_loss!r}: must be at least 0")
    cap = 0.0 if softcap is None else _real("softcap", softcap)
    if softcap is not None and cap <= 0.0:
        raise ValueError(f"softcap={softcap!r}: must be above 0, or None")
    scale = _real("logit_scale", logit_scale)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: must be 'mean' or 'sum'")
    if number is not None and reduction == "sum":
        raise ValueError(
            f"num_items_in_batch={number!r}: divides the sum already; leave reduction as it is"
        )
    return Rule(smoothing, coefficient, cap, scale, reduction == "sum")


def number_of(
    given: int | Tensor | None, losses: torch.dtype, device: torch.device
) -> Tensor | None:
    """`num_items_in_batch` as a 0-dimensional tensor of the precision of the losses.

    Raises ValueError for a whole number below 1 and for a tensor of several numbers.
    """
    if given is None:
        return None
    if isinstance(given, Tensor):
        if given.numel() != 1:
            raise ValueError(
                f"num_items_in_batch: must be one number, got a tensor of shape "
                f"{tuple(given.shape)}"
            )
        return given.detach().reshape(()).to(device, losses)
    if not torch.compiler.is_compiling():  # a look would compile a graph for each number
        whole_number("num_items_in_batch", given, 1)
    return torch.full((), given, dtype=losses, device=device)


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: must be a number")
    return float(value)


class RowLosses:
    """The classes of all rows (B,), and what each row counts for in the loss.

    shares (B,): the factor of each row's gradient; None where all rows have the same, `share`.
    """

    def __init__(
        self,
        targets: Tensor,
        ignore_index: int | None,
        dtype: torch.dtype,
        rule: Rule,
        number: Tensor | None,
    ) -> None:
        self.classes, self.dtype, self.rule = targets, dtype, rule
        self.counted: Tensor | None = None
        self.shares: Tensor | None = None
        self.number: Tensor | int = len(targets)
        if ignore_index is not None:
            self.counted = targets != ignore_index
            self.classes = targets.where(self.counted, 0)
        if number is not None:
            self.number = number
        elif rule.summed:
            self.number = 1
        elif self.counted is not None:
            self.number = self.counted.sum()
        if self.counted is not None:
            shares = self.counted.to(dtype)
            if isinstance(self.number, Tensor):
                shares = shares / self.number.clamp(min=1)  # 1 / number or 0
            self.shares = shares * rule.scale if rule.scale != 1.0 else shares
        elif isinstance(self.number, Tensor):
            self.shares = (rule.scale / self.number).expand(len(targets))

    @property
    def share(self) -> float:
        assert not isinstance(self.number, Tensor)
        return self.rule.scale / self.number

    def reduced(self, losses: Tensor, block: slice) -> Tensor:
        """What the losses of the block's rows contribute to the loss."""
        if self.counted is None:
            return losses.sum() / self.number
        # Not times 0: the loss of a row that is ignored may be infinite.
        return losses.where(self.counted[block], 0.0).sum() / self.number

    def loss_and_gradient(self, y: Tensor, block: slice) -> Tensor:
        """The block's part of the loss from its logits y (V, block), which become dY^T."""
        # y, the one large tensor, is overwritten: logits, then their exponentials, then dY^T.
        rule, classes = self.rule, y.shape[0]
        index = self.classes[None, block]
        if rule.scale != 1.0:
            y.mul_(rule.scale)
        slope = soft_cap_(y, rule.softcap) if rule.softcap else None
        at_target = y.gather(0, index)[0]
        totals = reduce_columns(torch.sum, y) if rule.label_smoothing else None
        largest = reduce_columns(torch.amax, y)
        sums = reduce_columns(torch.sum, y.sub_(largest).exp_())
        # cross-entropy of a row: log sum exp(y) - y[target], the largest logit taken out of exp
        log_sums = sums.log() + largest
        losses = rule.losses(log_sums, at_target, totals, classes)
        hit, each = 1.0 - rule.label_smoothing, rule.label_smoothing / classes
        if self.shares is None:
            # softmax / rows in all places, and -1 / rows at the target
            factor = rule.scale / (sums * self.number)
            lower: Tensor | float = self.share * each
            at = y.new_full(index.shape, -self.share * hit)
        else:
            shares = self.shares[block]
            factor = shares / sums
            lower = shares * each if each else 0.0
            at = -shares[None]
            if each:
                at = at * hit
        if rule.z_loss:
            factor = factor * (1.0 + 2.0 * rule.z_loss * log_sums)
        y.mul_(factor)
        if each:
            y.sub_(lower)
        y.scatter_add_(0, index, at)
        if slope is not None:
            y.mul_(slope)
        return self.reduced(losses, block)
