"""Causal attention with an exact forward and SUS's backward: the autograd Function, and the module
that draws its key.

Kept between forward and backward: q, k, v, the output, and the key of the mask. Forward is
PyTorch's `F.scaled_dot_product_attention`, whatever kernel it picks; the probabilities are formed
again in backward, in float32. The mask is a function of the key, so a block that is computed again
under activation checkpointing draws the same one.

Backward goes over blocks of rows in a Python loop, which a compiled graph would have to unroll. So
there it is one operator of the graph, `basis::sus_gradients`. Second derivatives are refused.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from basis.exchange import StandIn, refuse_hooks, refuse_replaced_forward
from basis.first_order import first_order, in_transform, refuse_nested_transforms
from basis.noise_key import HasNoiseKey
from basis.ops.matrix import cast_for_autocast
from basis.ops.rounding import restore_all, round_all
from basis.sus.blocks import Heads
from basis.sus.dense import dense_gradients
from basis.sus.sparse import sparse_gradients

MODES = {"dense": dense_gradients, "sparse": sparse_gradients}


Triple = tuple[Tensor, Tensor, Tensor]


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, grad: Tensor, key: Tensor, c: float, mode: str
) -> Triple:
    """dq, dk and dv, contiguous, in the shapes and dtypes of q, k and v."""
    heads = Heads.of(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        grads = MODES[mode](heads, heads.like_q(output), heads.like_q(grad), key, c)
    dq, dk, dv = (g.view(x.shape).to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


@torch.library.custom_op("basis::sus_gradients", mutates_args=())
def _gradients_op(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, grad: Tensor, key: Tensor, c: float, mode: str
) -> Triple:
    """`_gradients` as one operator of a compiled graph: its loop over blocks is not unrolled."""
    return _gradients(q, k, v, output, grad, key, c, mode)


@_gradients_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Triple:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), *(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)
    )  # type: ignore[return-value]


class _SusAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, key: Tensor, c: float, mode: str, round_key: Tensor | None
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, key, ctx.c, ctx.mode, round_key = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        kept = (q, k, v, output)
        ctx.dtypes = None if round_key is None else [x.dtype for x in kept]
        ctx.save_for_backward(key, *(kept if round_key is None else round_all(kept, round_key)))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        key, *kept = ctx.saved_tensors
        q, k, v, output = kept if ctx.dtypes is None else restore_all(kept, ctx.dtypes)
        form = _gradients_op if torch.compiler.is_compiling() else _gradients
        return (*form(q, k, v, output, grad_output, key, ctx.c, ctx.mode), *(None,) * 4)


def check_options(c: float, mode: str) -> None:
    """Raise ValueError that begins with the name of the wrong option."""
    if not (c > 0.0 and math.isfinite(c)):
        raise ValueError(f"c={c}: must be positive, a number of entries to follow in each row")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")


def sus_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor,
    *,
    c: float,
    mode: str = "sparse",
    round_key: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + causal mask) v, with SUS's gradients (arXiv 2505.15080).

    q (b, h, T, d); k (b, h_kv, T, d) and v (b, h_kv, T, d_v), of which each head serves h / h_kv
    query heads; key: 0-dimensional int64 (ops/noise.py). c: entries of a row that are followed, at
    most and on average. round_key: q, k, v and the output are kept in 8 bits, with the noise of
    this key (basis/lean); None keeps them as they are. Returns (b, h, T, d_v). Raises ValueError
    for a wrong `c` or `mode` and for shapes that do not fit.
    """
    check_options(c, mode)
    fits = (
        q.ndim == k.ndim == v.ndim == 4
        and q.shape[1] % k.shape[1] == 0
        and k.shape[:3] == v.shape[:3]
    )
    if not fits or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"sus attention: q, k, v of shapes {shapes} do not fit (b, h, T, d), (b, h_kv, T, d), "
            "(b, h_kv, T, d_v)"
        )
    q, k, v = (cast_for_autocast(x) for x in (q, k, v))
    return cast(Tensor, _SusAttentionFunction.apply(q, k, v, key, c, mode, round_key))


class SusAttention(StandIn, HasNoiseKey):
    """Stands in for a module `attend(q, k, v)` of causal attention without dropout, (b, h, T, d)
    each; for the key see noise_key.py.

    c: positive, entries of a row that are followed, at most and on average. mode: "sparse", or
    "dense" for the reference. Raises ValueError that begins with the name of the wrong option.
    """

    def __init__(self, attend: nn.Module, c: float = 25.0, mode: str = "sparse") -> None:
        super().__init__()
        check_options(c, mode)
        self.attend, self.c, self.mode = attend, c, mode

    def original(self) -> nn.Module:
        refuse_hooks(self)
        refuse_replaced_forward(self)
        return self.attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, round_key: Tensor | None = None) -> Tensor:
        """`round_key`: see `sus_attention`; lean attention around this one gives it."""
        if isinstance(q, Proxy):
            return cast(Tensor, self.node(q, k, v))
        if self.for_inference():
            return cast(Tensor, self.attend(q, k, v))
        if self.training or torch.is_grad_enabled():
            # Before the look at the grad mode: a reentrant checkpoint runs its first forward
            # without, see SketchedLinear.key_for.
            key = self.fixed_or_fresh_key(q.device)
            if torch.is_grad_enabled():
                return sus_attention(q, k, v, key, c=self.c, mode=self.mode, round_key=round_key)
        return cast(Tensor, self.attend(q, k, v))

    def extra_repr(self) -> str:
        return f"c={self.c:g}, mode={self.mode}"
