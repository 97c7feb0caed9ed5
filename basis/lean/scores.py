"""Attention whose scores have a learned bias added (T5) or are capped by tanh (Gemma 2), that keeps
queries, keys and values in 8 bits.

PyTorch's fast kernels do neither, so libraries write such attention out, and autograd keeps the
scores (b, h, T, S) at each step of it: some five numbers for each query and key. Here the scores
are formed again in backward from the q^, k^, v^ that are kept (ops/rounding.py),

    z = s q^ k^T,  u = c tanh(z / c),  P = softmax(u + bias + mask),  O = (P M) v,  M dropout
    dv^ = (P M)^T dO,  dP = M dO v^T,  dU = P (dP - rowsum(dP P)),  dbias = sum of dU over the batch
    dz = dU (1 - (u / c)^2),  dq = s dz k^,  dk = s dz^T q^

some rows of queries at a time, so that no more than `PIECE` scores are there at once; in a compiled
graph all of a layer are. It is a checkpoint of the core of attention: two products are computed
twice.

What is exact: the output, by the operations of the module that is replaced, in their order:
`written out` as transformers does it, or those of F.scaled_dot_product_attention. Without dropout
the latter is called, and picks the kernel that it would have picked. With dropout the steps of
PyTorch's plain kernel are taken, so on CUDA other numbers are dropped than the kernels there drop.
What is noisy: dq, dk, dv and dbias, by 1 to 4% in norm. P is not linear in q^ and k^, so a bias of
the order of the rounding's variance is left. Kept: 1.06 bytes a number of q, k and v, k and v with
the heads that they have; the bias and the mask as they were given, once for all layers that share
them; one bit a score where there is dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.ops.bits import pack, unpack
from basis.ops.matrix import without_autocast
from basis.ops.rounding import restore_all, round_all

PIECE = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Scores that backward holds at once, a few times over: on the CPU so many as lie in the cache, on
CUDA 64 MiB in float32.
"""
EVERY = slice(None)


@dataclass(frozen=True)
class Scores:
    """What becomes of the products of queries and keys. softcap: c, 0.0 for none. written_out: as
    transformers writes it out, not as PyTorch's kernels. learned: whether a bias has a gradient.
    """

    scale: float
    softcap: float = 0.0
    causal: bool = False
    dropout: float = 0.0
    written_out: bool = False
    learned: bool = False


def _of(rows: slice, x: Tensor) -> Tensor:
    """What `x` (., ., T or 1, S) has for these rows of queries."""
    return x if x.shape[-2] == 1 else x[..., rows, :]


def _seen(mask: Tensor | None, causal: bool, rows: slice, q: Tensor, k: Tensor) -> Tensor | None:
    """Where a row of queries sees a key, if that is what is known of them."""
    if mask is not None:
        return _of(rows, mask) if mask.dtype == torch.bool else None
    if not causal:
        return None
    places = torch.arange(k.shape[-2], device=q.device)
    return places[: q.shape[-2], None][rows] >= places


def _added(
    bias: Tensor | None, mask: Tensor | None, rows: slice, q: Tensor, k: Tensor, causal: bool
) -> Tensor | None:
    """What is added to the scores of these rows. A key that is not seen has the least number of the
    precision, not minus infinity: a row that sees nothing has equal probabilities then.
    """
    if bias is None:
        return None if mask is None else _of(rows, mask)
    bias = _of(rows, bias)
    if (seen := _seen(mask, causal, rows, q, k)) is not None:
        return torch.where(seen, bias, torch.finfo(k.dtype).min)
    return bias if mask is None else bias + _of(rows, mask)


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def attended(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, how: Scores
) -> tuple[Tensor, Tensor | None]:
    """The output (b, h, T, d), and which probabilities dropout has left, a bit each."""
    k, v = (_repeated(x, q.shape[1]) for x in (k, v))
    added = _added(bias, mask, EVERY, q, k, how.causal)
    if not (how.written_out or how.dropout):
        assert added is not None
        added = added.contiguous()
        if how.learned and not torch.compiler.is_compiling():
            added = added.detach().requires_grad_()  # by which PyTorch chooses its kernel
        return F.scaled_dot_product_attention(q, k, v, added, scale=how.scale), None
    with without_autocast(q):
        if how.written_out:
            scores = torch.matmul(q, k.mT) * how.scale
            if how.softcap:
                scores = torch.tanh(scores / how.softcap) * how.softcap
            if added is not None:
                scores = scores + added
            wide = torch.promote_types(q.dtype, torch.float32)
            p = F.softmax(scores, -1, dtype=wide).to(q.dtype)
        else:
            assert added is not None
            wide, root = torch.promote_types(q.dtype, torch.float32), how.scale**0.5
            scores = torch.matmul(q.to(wide) * root, k.to(wide).mT * root)
            p = torch.ops.aten._safe_softmax(scores.add_(added.to(q.dtype)), -1)
            v = v.to(wide)
        left = None
        if how.dropout:
            p, left = torch.native_dropout(p, how.dropout, True)
            left = pack(left.to(torch.uint8).permute(2, 0, 1, 3), 1)  # in rows of queries
        y = torch.matmul(p, v)
        # Not a cast that does nothing: in a graph of PyTorch 2.11 the gradient would be lost.
        return y if y.dtype == q.dtype else y.to(q.dtype), left


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        key: Tensor,
        how: Scores,
    ) -> tuple[Tensor, Tensor | None]:
        return attended(q, k, v, bias, mask, how)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]
    ) -> None:
        q, k, v, bias, mask, key, ctx.how = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        ctx.dtypes = [x.dtype for x in (k, q, v)]
        _, left = output
        if left is not None:
            ctx.mark_non_differentiable(left)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(bias, mask, left, link(q), *round_all((k, q, v), key))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        bias, mask, left, _, *rounded = ctx.saved_tensors
        k, q, v = restore_all(rounded, ctx.dtypes)
        wanted = ctx.needs_input_grad[3]
        *grads, _ = gradients(q, k, v, bias, mask, left, grad, ctx.how, wanted)
        return *grads, None, None, None


def _blocks(q: Tensor, k: Tensor) -> list[slice]:
    """Rows of queries in blocks of whole bytes of bits, of at most PIECE scores if that can be."""
    rows = q.shape[-2]
    if torch.compiler.is_compiling():
        return [slice(0, rows)]
    piece = PIECE.get(q.device.type, PIECE["cuda"])
    size = max(piece // (q.shape[0] * q.shape[1] * k.shape[-2]) // 8 * 8, 8)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    left: Tensor | None,
    grad: Tensor,
    how: Scores,
    learned: bool = False,
    sinks: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dbias and dsinks, from the gradient of the output (b, h, T, d). sinks (h,): a
    score more in each row of a head, of a value that is zero (sinks.py).
    """
    groups, low = k.shape[1], q.dtype
    wide = torch.promote_types(low, torch.float32)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    dbias = (
        torch.zeros(bias.shape, dtype=wide, device=q.device)
        if learned and bias is not None
        else None
    )
    dsinks = None if sinks is None else torch.zeros(sinks.shape, dtype=wide, device=q.device)
    grad = grad.to(low)
    for rows in _blocks(q, k):
        count = rows.stop - rows.start

        def grouped(x: Tensor) -> Tensor:  # (b, h, t, .) -> (b, g, h / g * t, .): k has g heads
            return x.reshape(x.shape[0], groups, -1, x.shape[-1])

        def apart(x: Tensor, count: int = count) -> Tensor:
            return x.reshape(q.shape[0], q.shape[1], count, -1)

        some, its_grad = grouped(q[:, :, rows]), grouped(grad[:, :, rows])
        u = apart(some @ k.mT).to(wide).mul_(how.scale)
        slope = None
        if how.softcap:
            u = u.div_(how.softcap).tanh_()
            slope = u.square().neg_().add_(1.0)
            u = u.mul_(how.softcap)
        added = _added(bias, mask, rows, q, k, how.causal)
        u = u if added is None else u.add_(added)
        if sinks is not None:
            u = torch.cat((u, sinks.to(wide).view(-1, 1, 1).expand(*u.shape[:-1], 1)), -1)
        p = torch.ops.aten._safe_softmax(u, -1)
        p, to_sinks = (p, None) if sinks is None else p.split((p.shape[-1] - 1, 1), -1)
        del u, added
        du = apart(its_grad @ v.mT).to(wide)  # as yet dP
        if left is None:
            dv += grouped(p.to(low)).mT @ its_grad
        else:
            bits = unpack(left[rows.start // 8 : -(-rows.stop // 8)], 1, count)
            factor = bits.permute(1, 2, 0, 3).to(wide).mul_(1.0 / (1.0 - how.dropout))
            du = du.mul_(factor)
            dv += grouped(factor.mul_(p).to(low)).mT @ its_grad
            del factor
        mean = (du * p).sum(-1, keepdim=True)
        if dsinks is not None:
            dsinks -= (to_sinks * mean).sum((0, 2, 3))
        du = du.sub_(mean).mul_(p)
        del p, to_sinks
        if dbias is not None:
            seen = _seen(mask, how.causal, rows, q, k)
            reached = du if seen is None else du.masked_fill(~seen, 0.0)
            part = _of(rows, dbias)
            part += reached.sum_to_size(part.shape)
        if slope is not None:
            du = du.mul_(slope)
        dz = grouped(du.mul_(how.scale).to(low))
        dq[:, :, rows] = apart(dz @ k)
        dk += dz.mT @ some
    if dbias is not None and bias is not None:
        dbias = dbias.to(bias.dtype)
    if dsinks is not None and sinks is not None:
        dsinks = dsinks.to(sinks.dtype)
    return dq, dk.to(low), dv.to(low), dbias, dsinks


def lean_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key: Tensor,
    how: Scores,
) -> Tensor:
    """Attention of q (b, h, T, d), k and v (b, g, S, d), g a divisor of h, with `how` for what
    becomes of the scores: (b, h, T, d). bias and mask are broadcast to (b, h, T, S) and added; a
    mask of booleans says where a key is seen. key: int64, of the noise.
    """
    return cast(Tensor, _Attention.apply(q, k, v, bias, mask, key, how)[0])
