"""Subclasses of nn.Linear: those that inherit its forward, and those of transformers that write the
same product down once more, such as Falcon's.

The stand-in is an instance of a subclass of the layer's own class, so that isinstance, attributes
and methods go on as they were. Its forward is that of a sketched layer (sketched.py). Falcon adds
the bias after the product, which rounds twice in bfloat16; so does its stand-in, and the output is
the same to the last bit.

A forward of anybody else's may do more than can be seen in its output, such as count or log. Such a
class is left as it is, and so is one that gives anything else than the product (trial.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from basis.estimator import Estimator
from basis.exchange import StandInOfClass, blank, is_sharded_itself, standing_in, take_over
from basis.ops.shared_noise import Passes
from basis.sketched import Sketched
from basis.trial import agree, plain_class, real_numbers, takes_one

_NOT_OURS = (NonDynamicallyQuantizableLinear, nn.LazyLinear)
"""The first one's attention uses its weight and does not call it, the second has none yet."""


class SketchedSubclass(StandInOfClass, Sketched):
    """A subclass of nn.Linear that keeps what `estimator` makes of its input instead of the input.
    Same parameters, same forward, same state_dict as SketchedLinear has them.
    """

    bias: Tensor | None
    bias_comes_after = False
    """Whether the bias is added to the rounded product."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return cast(Tensor, self.node(input))
        if self.for_inference():
            return cast(Tensor, super().forward(input))
        if self.bias_comes_after and self.bias is not None:
            return self.product(input, self.weight, None) + self.bias
        return self.product(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, estimator={self.estimator}"


def is_subclass(module: nn.Module) -> bool:
    """Whether `module` is a dense layer of a subclass of nn.Linear that can be sketched, or stands
    in for one.
    """
    if isinstance(module, SketchedSubclass):
        return True
    kind = type(module)
    if kind is nn.Linear or not isinstance(module, nn.Linear) or isinstance(module, _NOT_OURS):
        return False
    if isinstance(module, Sketched) or is_sharded_itself(module):
        return False
    if nn.utils.parametrize.is_parametrized(module) or kind.__call__ is not nn.Module.__call__:
        return False
    return kind.forward is nn.Linear.forward or _of_transformers(kind) is not None


_TRIED: dict[type[nn.Module], bool | None] = {}


def _of_transformers(kind: type[nn.Module]) -> bool | None:
    """For a class of transformers whose forward is the product: whether it adds the bias after it.
    None for any other class.
    """
    if not kind.__module__.startswith("transformers."):
        return None
    if kind not in _TRIED:
        dtypes = torch.float32, torch.bfloat16
        fits = (
            after
            for after, formula in ((False, F.linear), (True, _bias_after))
            if all(_computes(kind, formula, dtype) for dtype in dtypes)
        )
        _TRIED[kind] = next(fits, None)
    return _TRIED[kind]


def _bias_after(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


def _computes(kind: type[nn.Module], formula: Callable[..., Tensor], dtype: torch.dtype) -> bool:
    """Whether layers of class `kind`, with and without a bias, compute `formula` in `dtype`."""
    with real_numbers():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 9, 24, generator=generator).to(dtype)
        for has_bias in (True, False):
            plain = nn.Linear(24, 16, has_bias)
            for p in plain.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
            plain.to(dtype)
            trial = take_over(blank(kind), plain)
            if not takes_one(trial):
                return False
            if not agree(trial, partial(formula, weight=plain.weight, bias=plain.bias), x):
                return False
    return True


def sketched_subclass(module: nn.Linear, estimator: Estimator) -> SketchedSubclass:
    """What stands in for `module`, of a subclass of nn.Linear, with the same Parameters.

    Raises ValueError if the weight is computed by a hook, and where `take_over` does.
    """
    if module._parameters.get("weight") is None:
        raise ValueError(
            "sketched linear: the layer's weight is computed by a hook, not a parameter"
        )
    new = standing_in(SketchedSubclass, module)
    new.in_features, new.estimator, new.passes = module.in_features, estimator, (Passes(1), 0)
    new.forget(module.weight.device)
    take_over(new, module)
    new.bias_comes_after = bool(_of_transformers(plain_class(module)))
    return new
