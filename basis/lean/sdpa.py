"""PyTorch's scaled dot-product attention by an autograd Function that keeps queries, keys, values
and output in 8 bits.

The Function calls PyTorch's kernels and their backward by name. They keep q, k, v, the output and
the log-sum-exp of each row, and form the probabilities again:

    P = exp(s Q K^T - lse),   dV = P^T dO,   dP = dO V^T,   D = rowsum(dO O)
    dS = P (dP - D),   dQ = s dS K,   dK = s dS^T Q

| kernel | where | grouped queries | mask | dropout |
|---|---|---|---|---|
| cpu: flash attention for the CPU | CPU | as they are | yes | - |
| flash | CUDA, low precision | as they are | - | by seed |
| efficient | CUDA | keys and values repeated while it runs | yes | by seed |
| again | all else, such as dropout on the CPU | as PyTorch does | yes | by the generator's state |

`again` runs PyTorch's attention once more in backward, from q^, k^, v^: its products are computed
twice, and neither output nor probabilities are kept. Which kernel PyTorch would take is asked for
in eager mode; in a compiled graph a rule decides (`kernel_by_rule`), and what would be `again` is
left to the compiler.

What is exact: the output. What is noisy: dq, dk, dv, by 1 to 2% in norm for normal numbers, 4%
where the probabilities are sharp. V and O stand in linear places: rounding them leaves no bias. Q
and K are in the exponent too: a bias of the order of the rounding's variance is left. Kept: 1.06
bytes a number of q and the output, and of k and v with the heads that they have, not repeated; 4
bytes a row and head. An output that is kept whole anyway, as the input of a plain dense layer, is
not rounded besides. A mask is kept as it was given, once for all layers that share it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.ops.rounding import restore_all, round_all

_FLASH_WIDTH = 256
"""The widest head that flash attention takes on CUDA."""
_CHOICES = {1: "flash", 2: "efficient"}  # of torch.nn.attention.SDPBackend


def kernel_by_rule(q: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> str | None:
    """Which of PyTorch's kernels a compiled graph calls; None: there is none to call by name."""
    if q.device.type == "cpu":
        return "cpu" if dropout == 0.0 else None
    if q.device.type != "cuda":
        return None
    width = q.shape[-1]
    low = q.dtype in (torch.float16, torch.bfloat16)
    if low and mask is None and width <= _FLASH_WIDTH and width % 8 == 0:
        return "flash"
    return "efficient" if width * q.dtype.itemsize % 16 == 0 else None


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float
) -> str | None:
    """Which kernel serves; None: the plain operator has to."""
    if torch.compiler.is_compiling() or in_transform():
        same = q.shape[-1] == v.shape[-1]
        return kernel_by_rule(q, mask, dropout) if same else None
    if isinstance(q, FakeTensor):  # of which PyTorch's choice is not the real one's
        return kernel_by_rule(q, mask, dropout) or "again"
    grouped = q.shape[1] != k.shape[1]
    choice = torch._fused_sdp_choice(
        q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped
    )
    if q.device.type == "cpu":
        return "cpu" if choice == 1 else "again"
    if q.device.type == "cuda" and grouped and choice not in _CHOICES:
        return kernel_by_rule(q, mask) or "again"
    if choice == 3:  # cuDNN's, whose backward has no name that is kept
        return kernel_by_rule(q, mask) or "again"
    if choice == 1 and q.shape[-1] % 8:  # PyTorch would pad the heads
        return "again"
    return _CHOICES.get(choice, "again")


def _as_bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the products, for a mask: True where a key is seen, or such numbers."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), float("-inf"))


def _aligned(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """`bias` (b, h, T, S) as the memory-efficient kernel wants it: rows of a multiple of 16."""
    if bias is None:
        return None
    length = k.shape[-2]
    if missing := -length % 16:
        bias = F.pad(bias, (0, missing))[..., :length]
    return bias.expand(q.shape[0], q.shape[1], q.shape[-2], length)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values for each of `heads` queries."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of what `_repeated` was given."""
    if grad.shape[1] == like.shape[1]:
        return grad
    return grad.unflatten(1, (like.shape[1], -1)).sum(2)


class _LeanSDPA(torch.autograd.Function):
    """Attention of q (b, h, T, d), k, v (b, h or a divisor, S, d) by a kernel called by name.

    Returns the output (b, h, T, d) and what else the kernel's backward wants, not differentiated.
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        key: Tensor,
        kernel: str,
        causal: bool,
        dropout: float,
        scale: float,
        whole: bool,
    ) -> tuple[Any, ...]:
        aten, bias = torch.ops.aten, _as_bias(mask, q)
        if kernel == "cpu":
            made = aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, attn_mask=bias, scale=scale
            )
        elif kernel == "flash":
            made = aten._scaled_dot_product_flash_attention(q, k, v, dropout, causal, scale=scale)
        else:
            k, v = (_repeated(x, q.shape[1]) for x in (k, v))
            made = aten._scaled_dot_product_efficient_attention(
                q, k, v, _aligned(bias, q, k), True, dropout, causal, scale=scale
            )
        return tuple(made)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        q, k, v, mask, key, ctx.kernel, ctx.causal, ctx.dropout, ctx.scale, whole = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        out, *others = output
        kept = [k, q, v]  # in the order in which autograd saves them, to have the same noise
        if not whole:
            kept.append(out)
        ctx.dtypes = [x.dtype for x in kept]
        tensors = [x for x in others if isinstance(x, Tensor)]
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in others]
        ctx.mark_non_differentiable(*tensors)
        ctx.set_materialize_grads(False)
        rounded = round_all(kept, key)
        ctx.save_for_backward(out if whole else None, mask, link(q), *tensors, *rounded)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        whole, mask, _, *kept = ctx.saved_tensors
        tensors = iter(kept)
        others = [next(tensors) if number is None else number for number in ctx.numbers]
        k, q, v, *rounded_out = restore_all(list(tensors), ctx.dtypes)
        (out,) = rounded_out or [whole]
        aten, bias = torch.ops.aten, _as_bias(mask, q)
        if ctx.kernel == "cpu":
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, *others, 0.0, ctx.causal, attn_mask=bias, scale=ctx.scale
            )
        elif ctx.kernel == "flash":
            lse, cum_q, cum_k, max_q, max_k, seed, offset, *_debug = others
            grads = aten._scaled_dot_product_flash_attention_backward(
                *(grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k),
                *(ctx.dropout, ctx.causal, seed, offset),
                scale=ctx.scale,
            )
        else:
            lse, seed, offset = others
            every_k, every_v = (_repeated(x, q.shape[1]) for x in (k, v))
            grads = aten._scaled_dot_product_efficient_attention_backward(
                *(grad, q, every_k, every_v, _aligned(bias, q, k), out, lse, seed, offset),
                *(ctx.dropout, [True] * 3 + [False], ctx.causal),
                scale=ctx.scale,
            )
        dq, dk, dv = grads[0], _summed(grads[1], k), _summed(grads[2], v)
        return dq, dk, dv, *(None,) * 7


class _Again(torch.autograd.Function):
    """The same by PyTorch's operator, which runs once more in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        key: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        ctx.transformed, ctx.options, ctx.states = False, options, None
        if options["dropout_p"] > 0.0:
            cuda = torch.cuda.get_rng_state(q.device) if q.is_cuda else None
            ctx.states = torch.get_rng_state(), cuda
        ctx.dtypes = [x.dtype for x in (k, q, v)]
        ctx.save_for_backward(*round_all((k, q, v), key), mask)
        return F.scaled_dot_product_attention(q, k, v, mask, **options)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *rounded, mask = ctx.saved_tensors
        k, q, v = (x.requires_grad_() for x in restore_all(rounded, ctx.dtypes))
        devices = [q.device] if q.is_cuda else []
        with torch.enable_grad(), torch.random.fork_rng(devices, enabled=ctx.states is not None):
            if ctx.states is not None:
                state, cuda = ctx.states
                torch.set_rng_state(state)
                if cuda is not None:
                    torch.cuda.set_rng_state(cuda, q.device)
            out = F.scaled_dot_product_attention(q, k, v, mask, **ctx.options)
        return *torch.autograd.grad(out, (q, k, v), grad), None, None, None


def lean_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key: Tensor,
    *,
    causal: bool,
    dropout: float = 0.0,
    scale: float | None = None,
    whole: bool = False,
) -> Tensor | None:
    """`F.scaled_dot_product_attention` of q (b, h, T, d), k and v (b, g, S, d), g a divisor of h.

    key: of the noise. whole: whether the output is kept as it is, since somebody else keeps it.
    Returns (b, h, T, d), or None where there is no way to keep less.
    """
    if mask is not None and mask.requires_grad:  # a learned bias, whose gradient PyTorch forms
        return None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kernel = _kernel(q, k, v, mask, causal, dropout, scale)
    if kernel is None:
        return None
    if kernel == "again":
        options = {"dropout_p": dropout, "is_causal": causal, "scale": scale}
        options["enable_gqa"] = q.shape[1] != k.shape[1]
        return cast(Tensor, _Again.apply(q, k, v, mask, key, options))
    made = _LeanSDPA.apply(q, k, v, mask, key, kernel, causal, dropout, scale, whole)
    return cast(Tensor, made[0])
