"""Logits that nobody forms: what a fused head returns in their place (causal_lm.py).

A model does a few things to its logits before the loss: it scales and caps them, flattens them,
drops the last position, casts them, and hands them to F.cross_entropy. `UnformedLogits` notes all
that on the head's input, and F.cross_entropy of it is `linear_cross_entropy`. What else a model may
ask of its logits raises `WholeLogitsNeeded`, which names it.

What is exact: the loss, and the gradients that loss_head.py says. What is kept: no logits.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.loss_head import linear_cross_entropy
from basis.ops.matrix import cast_for_autocast


@dataclass
class Switch:
    """What the model's forward and the head's tell each other. wanted: form no logits now. used:
    a loss was taken from logits that were not formed.
    """

    labels: int  # place of `labels` in the model's forward
    wanted: bool = False
    used: bool = False


class WholeLogitsNeeded(ValueError, AttributeError):
    """A model asks of its logits what can't be had without forming them. (An AttributeError, so
    that hasattr works.)
    """


def _needed(what: str) -> WholeLogitsNeeded:
    return WholeLogitsNeeded(
        f"fuse_head: the model's forward takes {what} of its logits, which a fused head never "
        "forms; call basis.unfuse_head(model), or train without head=True"
    )


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: UnformedLogits, *args: Any, **kwargs: Any) -> Any:
        raise _needed(name)

    return refuse


class UnformedLogits:
    """Logits layer(input) (..., V), scaled, capped and scaled again, that nobody forms.

    It does what a model does to logits before the loss: a change of scale, tanh, views that leave
    the last dimension alone, casts to a floating-point dtype (the loss is taken in float32 at
    least), and F.cross_entropy, over rows. Everything else raises WholeLogitsNeeded.
    """

    requires_grad = False  # so that hooks that wait for gradients leave it alone

    def __init__(
        self,
        layer: nn.Linear,
        input: Tensor,
        switch: Switch,
        inner: float = 1.0,
        outer: float | None = None,  # behind a tanh; None: there is none
    ) -> None:
        self.layer, self.input, self.switch = layer, input, switch
        self.inner, self.outer = inner, outer

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.input.shape[:-1], self.layer.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.input.device

    @property
    def dtype(self) -> torch.dtype:
        return cast_for_autocast(self.input).dtype

    @property
    def ndim(self) -> int:
        return self.input.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.input.ndim

    def __getattr__(self, name: str) -> Any:
        raise _needed(f"`{name}`")

    def _with(self, **changes: Any) -> UnformedLogits:
        now = {"input": self.input, "inner": self.inner, "outer": self.outer, **changes}
        return UnformedLogits(self.layer, switch=self.switch, **now)

    # Of the values: scale and tanh.

    def __mul__(self, factor: float) -> UnformedLogits:
        if isinstance(factor, Tensor | UnformedLogits):
            raise _needed("a product with a tensor")
        if self.outer is None:
            return self._with(inner=self.inner * float(factor))
        return self._with(outer=self.outer * float(factor))

    __rmul__ = mul = __mul__

    def __truediv__(self, divisor: float) -> UnformedLogits:
        if isinstance(divisor, Tensor | UnformedLogits):
            raise _needed("a quotient with a tensor")
        return self * (1.0 / float(divisor))

    div = __truediv__

    def tanh(self) -> UnformedLogits:
        if self.outer is not None:
            raise _needed("tanh of tanh")
        return self._with(outer=1.0)

    # Of the shape: all but the last dimension is that of the input.

    def view(self, *shape: Any) -> UnformedLogits:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if sizes[-1] not in (self.shape[-1], -1):
            raise _needed(f"a view {tuple(sizes)}")
        width = self.input.shape[-1]
        if sizes[-1] == -1:
            rows = functools.reduce(lambda a, b: a * b, sizes[:-1], 1)
            if rows * width != self.input.numel():
                raise _needed(f"a view {tuple(sizes)}")
        return self._with(input=self.input.reshape(*sizes[:-1], width))

    reshape = view

    def flatten(self, start: int = 0, end: int = -1) -> UnformedLogits:
        last = end % self.ndim
        if last == self.ndim - 1 and start % self.ndim != last:
            raise _needed("a view that joins rows")
        return (
            self if start % self.ndim == last else self._with(input=self.input.flatten(start, end))
        )

    def contiguous(self) -> UnformedLogits:
        return self

    def __getitem__(self, index: Any) -> UnformedLogits:
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis for part in parts):
            place = next(i for i, part in enumerate(parts) if part is Ellipsis)
            missing = self.ndim - (len(parts) - 1)
            parts = (*parts[:place], *(slice(None),) * missing, *parts[place + 1 :])
        whole = len(parts) < self.ndim or parts[-1] == slice(None)
        if not whole or not all(isinstance(part, slice | int) for part in parts):
            raise _needed("a part")
        return self._with(input=self.input[parts])

    # Of the precision: the loss is taken in float32 at least.

    def float(self) -> UnformedLogits:
        return self

    double = upcast = float

    def to(self, *args: Any, **kwargs: Any) -> UnformedLogits:
        for value in (*args, *kwargs.values()):
            dtype = value.dtype if isinstance(value, Tensor) else value
            if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
                raise _needed(f"a cast to {dtype}")
            device = value.device if isinstance(value, Tensor) else value
            if isinstance(device, str | torch.device) and torch.device(device) != self.device:
                raise _needed(f"a copy on {device}")
        return self

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        if function in (torch.tanh, F.tanh) and not kwargs:
            return args[0].tanh()
        raise _needed(f"`{getattr(function, '__name__', function)}`")


for _name in ("add", "radd", "sub", "rsub", "rtruediv", "pow", "neg", "matmul", "setitem", "iter",
              "len", "lt", "gt", "le", "ge"):  # fmt: skip
    setattr(UnformedLogits, f"__{_name}__", _refusal(f"`{_name}`"))


def _cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """F.cross_entropy of logits that are not formed."""
    if not isinstance(input, UnformedLogits):
        raise _needed("a cross-entropy of other logits")
    if weight is not None or size_average is not None or reduce is not None:
        raise _needed("a cross-entropy with class weights")
    if reduction not in ("mean", "sum") or input.ndim != 2 or target.is_floating_point():
        raise _needed(f"a cross-entropy with reduction={reduction!r} and {input.ndim} dimensions")
    switch = input.switch
    softcap = scale = None
    scale = input.inner
    if input.outer is not None:  # outer tanh(inner y) = c tanh(s y / c)
        softcap, scale = abs(input.outer), input.inner * input.outer
    if input.dtype == torch.float16:
        warnings.warn(
            "fuse_head: in float16 the logits are formed whole; train in bfloat16", stacklevel=2
        )
    switch.wanted, switch.used = False, True
    try:
        loss = linear_cross_entropy(
            input.layer,
            input.input,
            target,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap,
            logit_scale=scale,
            reduction="sum" if reduction == "sum" else "mean",
        )
    finally:
        switch.wanted = True
    return loss
