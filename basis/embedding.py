"""An embedding that shares its weight with the head: its gradient is added to the head's where that
lies.

The gradient of a tied weight W (V, N) is a sum of two. The head's is dense. The embedding's is not
zero in the rows of the tokens that occurred, and PyTorch forms it dense all the same, V x N numbers
at the end of backward to be added to V x N others. Here W goes through the embedding to the head,

    rows, W' = tied_embedding(W, tokens)
    loss = linear_cross_entropy(head, f(rows), targets, weight=W')

so that backward hands the head's gradient to the embedding, which adds its B rows. What is exact:
everything. Saved: V x N numbers at the end of backward, and two passes over as many.

The head's gradient is written to in place only where autograd is about to release the graph:
whoever retains it, or differentiates with torch.func, gets a new tensor. On CUDA PyTorch's own way
is kept: its order of additions is the same every time, that of index_add is not. Under
torch.compile too, where a compiler decides what lies where.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.first_order import first_order


def graph_is_released() -> bool:
    """Inside a backward: whether what the graph saved is released afterwards, so that it may be
    written to.
    """
    if torch.compiler.is_compiling():
        return False
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return not kept


class _TiedEmbedding(torch.autograd.Function):
    """(W[tokens], W)."""

    @staticmethod
    def forward(weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        rows = F.embedding(tokens, weight)  # a view, see sketched.py
        return torch.ops.aten._unsafe_view(rows, rows.shape), weight.detach()

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]
    ) -> None:
        weight, tokens = inputs
        ctx.classes = weight.shape[0]
        ctx.set_materialize_grads(False)
        ctx.transformed = False
        ctx.save_for_backward(tokens)

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_rows: Tensor | None, grad_weight: Tensor | None
    ) -> tuple[Tensor | None, None]:
        (tokens,) = ctx.saved_tensors
        if grad_rows is None:
            return grad_weight, None
        if grad_weight is None:
            return torch.ops.aten.embedding_dense_backward(
                grad_rows, tokens, ctx.classes, -1, False
            ), None
        may_write = graph_is_released() and grad_weight.is_contiguous()  # not an expanded number
        add = grad_weight.index_add_ if may_write else grad_weight.index_add
        return add(0, tokens.flatten(), grad_rows.flatten(0, -2)), None


def tied_embedding(embedding: nn.Embedding, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """`embedding(tokens)` (..., N), and its weight (V, N) for `linear_cross_entropy`; None if the
    head shall take its own.

    tokens (...) int64. The weight returned must have no other use: its gradient is overwritten.
    """
    weight = embedding.weight
    hooked = embedding._forward_hooks or embedding._forward_pre_hooks or embedding._backward_hooks
    plain = (
        type(embedding) is nn.Embedding
        and not hooked
        and embedding.padding_idx is None
        and embedding.max_norm is None
    )
    eager = not torch.compiler.is_compiling() and not torch._C._functorch.maybe_current_level()
    wanted = torch.is_grad_enabled() and weight.requires_grad and weight.device.type == "cpu"
    if not (plain and eager and wanted) or embedding.sparse or embedding.scale_grad_by_freq:
        return embedding(tokens), None
    return _TiedEmbedding.apply(weight, tokens)
