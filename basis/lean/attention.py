"""Attention that keeps queries, keys, values and output in 8 bits.

`F.scaled_dot_product_attention` keeps q, k, v, its output and the log-sum-exp of each row for a
backward that forms the attention probabilities again. Here the four large tensors are rounded to 8
bits (rounding.py) and restored in backward. No product is computed twice. There are two ways to it:

- In eager mode the wrapped module runs as it is, whatever kernel it picks, and hooks on what
  autograd saves do the rounding.
- torch.compile can't trace such hooks inside a graph. So in a compiled graph an autograd Function
  calls the kernel and its backward by name: PyTorch's flash attention on the CPU and, in low
  precision, on CUDA; its memory-efficient attention on CUDA in float32. That is done for a wrapped
  module that says `is_causal = True` and has no dropout: its output is that of
  `F.scaled_dot_product_attention(q, k, v, is_causal=True)`. With another one the hooks stay, and
  the graph breaks.

What is exact: the output. What is noisy: dq, dk, dv; each kept number is unbiased, the gradients
are not linear in them, so a bias of the order of the rounding's variance is left. Kept: 4 x 0.27 of
a B x T x C tensor in float32, instead of 4, and the log-sum-exp.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from basis.diagnostics.saved import announce
from basis.exchange import StandIn, refuse_hooks, refuse_replaced_forward
from basis.first_order import (
    first_order,
    in_transform,
    refuse_graph_of_backward,
    refuse_nested_transforms,
)
from basis.noise_key import HasNoiseKey
from basis.ops.matrix import cast_for_autocast
from basis.ops.rounding import Rounded, restore, restore_all, round_all, round_to_int8
from basis.sus.attention import SusAttention

_FLASH_WIDTH = 256
"""The widest head that flash attention takes on CUDA."""


def _kernel(q: Tensor) -> str | None:
    """Which of PyTorch's kernels a compiled graph calls; None: there is none to call by name."""
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type != "cuda":
        return None
    width = q.shape[-1]
    if q.dtype in (torch.float16, torch.bfloat16) and width <= _FLASH_WIDTH and width % 8 == 0:
        return "flash"
    return "efficient" if width * q.dtype.itemsize % 16 == 0 else None


class _LeanCausalAttention(torch.autograd.Function):
    """Causal attention of q, k, v (b, h, T, d) by a kernel called by name.

    Returns the output (b, h, T, d) and what else the kernel's backward wants, not differentiated.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, key: Tensor, kernel: str) -> tuple[Any, ...]:
        aten = torch.ops.aten
        if kernel == "cpu":
            made = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        elif kernel == "flash":
            made = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        else:
            made = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)
        return tuple(made)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        q, k, v, key, ctx.kernel = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        out, *others = output
        kept = (k, q, v, out)  # in the order in which autograd saves them, to have the same noise
        ctx.dtypes = [x.dtype for x in kept]
        rounded = round_all(kept, key)
        tensors = [x for x in others if isinstance(x, Tensor)]
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in others]
        ctx.mark_non_differentiable(*tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rounded, *tensors)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        kept = ctx.saved_tensors
        k, q, v, out = restore_all(kept[:8], ctx.dtypes)
        tensors = iter(kept[8:])
        others = [next(tensors) if number is None else number for number in ctx.numbers]
        aten = torch.ops.aten
        if ctx.kernel == "cpu":
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, *others, 0.0, True
            )
        elif ctx.kernel == "flash":
            lse, cum_q, cum_k, max_q, max_k, seed, offset, *_debug = others
            grads = aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset
            )
        else:
            lse, seed, offset = others
            grads = aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, None, out, lse, seed, offset, 0.0, [True] * 3 + [False], True
            )
        return (*grads[:3], None, None)


class LeanAttention(StandIn, HasNoiseKey):
    """Wraps a module `attend(q, k, v)`, (b, h, T, d) each, whose floating-point 4-dimensional
    savings are rounded.
    """

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.attend = attend

    def original(self) -> nn.Module:
        refuse_hooks(self)
        refuse_replaced_forward(self)
        return self.attend

    def _is_plain(self) -> bool:
        """Whether the wrapped module is known to be causal attention and nothing else."""
        dropout = getattr(self.attend, "dropout", 0.0)
        return getattr(self.attend, "is_causal", False) is True and not dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if isinstance(q, Proxy):
            return cast(Tensor, self.node(q, k, v))
        if self.for_inference() or not torch.is_grad_enabled():
            self.pass_without_grad(q.device)
            return cast(Tensor, self.attend(q, k, v))
        key = self.fixed_or_fresh_key(q.device)
        if torch.compiler.is_compiling() and isinstance(self.attend, SusAttention):
            return cast(Tensor, self.attend(q, k, v, round_key=key))
        if torch.compiler.is_compiling() and self._is_plain():
            q, k, v = (cast_for_autocast(x) for x in (q, k, v))
            if (kernel := _kernel(q)) is not None:
                return cast(Tensor, _LeanCausalAttention.apply(q, k, v, key, kernel)[0])
        width = q.shape[
            -1
        ]  # not q itself in `pack`: autograd holds the hook until backward, and q with it
        saved = 0

        def pack(tensor: Tensor) -> Tensor | tuple[Rounded, torch.dtype]:
            nonlocal saved
            if tensor.ndim != 4 or not tensor.is_floating_point() or tensor.shape[-1] != width:
                announce(tensor)
                return tensor
            rounded = round_to_int8(tensor, key, saved)
            saved += 1  # each tensor has noise of its own
            announce(*rounded)
            return rounded, tensor.dtype

        def unpack(kept: Tensor | tuple[Rounded, torch.dtype]) -> Tensor:
            refuse_graph_of_backward()
            return kept if isinstance(kept, Tensor) else restore(*kept)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            # No call after this one: PyTorch 2.11 would try to compile it, and warn.
            attended: Tensor = self.attend(q, k, v)
        return attended
