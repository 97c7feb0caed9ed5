"""Attention with sinks (gpt-oss): a learned logit a head, which takes part in the softmax and in no
sum of values; queries, keys and values are kept in 8 bits.

    P = softmax([s q k^T + mask, c]),   O = P[:, :-1] v,   c one number for each head
    dP = dO v^T,  D = rowsum(dP P[:, :-1]),  dU = P (dP - D),  dc = - sum of P_c D

PyTorch's attention has no such logit. transformers writes it out, one way in each family: an added
column, or the output times sigmoid(logsumexp - c), which is the same in exact arithmetic. Autograd
keeps scores, probabilities and what lies between them. Here forward calls the family's own function
on tensors that have no gradient, and backward forms the scores again by the formula (scores.py),
some rows of queries at a time. So a function need not compute the formula to the last bit; it is
tried in float64 with small numbers, and must come as near as float32 does.

What is exact: the output, by the function itself. What is noisy: dq, dk, dv and dc, by 1 to 4% in
norm, with a bias of the order of the rounding's variance, as in scores.py. Kept: 1.06 bytes a
number of q, k and v, k and v with the heads that they have, and the mask as it was given, once for
all layers that share it. With dropout the family's function runs as it is: what it dropped can't be
told from its output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.lean.scores import Scores, gradients
from basis.ops.rounding import restore_all, round_all
from basis.trial import agree, real_numbers

WrittenOut = Callable[..., Any]
"""A function for attention, of a module, q, k, v and mask; it returns the output (b, T, h, d)."""
_NEAR = 1e-5


@dataclass
class _Module:
    """What a function may read of the module that it is given."""

    num_key_value_groups: int
    sinks: Tensor
    training: bool = False  # there is no dropout


def _run(
    plain: WrittenOut, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, s: float
) -> Tensor:
    """What `plain` gives, (b, h, T, d)."""
    module = _Module(q.shape[1] // k.shape[1], sinks)
    return cast(Tensor, plain(module, q, k, v, mask, scaling=s, dropout=0.0)[0].transpose(1, 2))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        mask: Tensor | None,
        key: Tensor,
        plain: WrittenOut,
        scale: float,
    ) -> Tensor:
        return _run(plain, q, k, v, sinks, mask, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, sinks, mask, key, _, ctx.scale = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        ctx.dtypes = [x.dtype for x in (k, q, v)]
        ctx.save_for_backward(sinks, mask, link(q), *round_all((k, q, v), key))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sinks, mask, _, *rounded = ctx.saved_tensors
        k, q, v = restore_all(rounded, ctx.dtypes)
        how = Scores(ctx.scale, written_out=True)
        dq, dk, dv, _, dsinks = gradients(q, k, v, None, mask, None, grad, how, sinks=sinks)
        return dq, dk, dv, dsinks, *(None,) * 4


def lean_sinks(
    plain: WrittenOut,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    mask: Tensor | None,
    key: Tensor,
    scale: float,
) -> Tensor:
    """Attention of q (b, h, T, d), k and v (b, g, S, d), g a divisor of h, with `sinks` (h,), by
    `plain`, of which `has_sinks` holds: (b, h, T, d). mask: numbers that are broadcast to
    (b, h, T, S) and added. key: int64, of the noise.
    """
    return cast(Tensor, _Attention.apply(q, k, v, sinks, mask, key, plain, scale))


@functools.cache
def has_sinks(plain: WrittenOut) -> bool:
    """Whether a function for attention computes the formula above, with the sinks of the module
    that it is given, and reads nothing else of the module.
    """
    with real_numbers():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 8, 5, 8, generator=generator, dtype=torch.float64)
        mask = torch.randn(2, 1, 5, 5, generator=generator, dtype=torch.float64)
        sinks = torch.randn(4, generator=generator, dtype=torch.float64)

        def found(x: Tensor) -> Tensor:
            q, k, v = x.split((4, 2, 2), 1)
            return _run(plain, q, k, v, sinks, mask, 0.3).to(x.dtype)

        def formula(x: Tensor) -> Tensor:
            q, k, v = x.split((4, 2, 2), 1)
            k, v = (y.repeat_interleave(2, 1) for y in (k, v))
            z = torch.cat((0.3 * q @ k.mT + mask, sinks.view(4, 1, 1).expand(2, 4, 5, 1)), -1)
            return z.softmax(-1)[..., :-1] @ v

        return agree(found, formula, x, 3 * x, near=_NEAR)


def sinks_of(module: nn.Module) -> Tensor | None:
    """The sinks of a module of attention; None if it has none."""
    return module._parameters.get("sinks")
