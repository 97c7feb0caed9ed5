"""Attention that keeps queries, keys, values and output in 8 bits.

`F.scaled_dot_product_attention` keeps q, k, v, its output and the log-sum-exp of each row for a
backward that forms the attention probabilities again. Here the four large tensors are rounded to 8
bits (rounding.py) and restored in backward. No product is computed twice. There are two ways to it:

- In eager mode the wrapped module runs as it is, whatever kernel it picks, and hooks on what
  autograd saves do the rounding.
- torch.compile can't trace such hooks inside a graph. So in a compiled graph an autograd Function
  calls the kernel and its backward by name (sdpa.py). That is done for a wrapped module that says
  `is_causal = True` and has no dropout: its output is that of `F.scaled_dot_product_attention(q, k,
  v, is_causal=True)`. With another one the hooks stay, and the graph breaks.

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
from basis.first_order import refuse_graph_of_backward
from basis.lean.sdpa import lean_sdpa
from basis.noise_key import HasNoiseKey
from basis.ops.matrix import cast_for_autocast
from basis.ops.rounding import Rounded, restore, round_to_int8
from basis.shared_input import IN_FEW_BITS, VIEWS
from basis.sus.attention import SusAttention


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
            if (attended := lean_sdpa(q, k, v, None, key, causal=True)) is not None:
                return attended
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
            output: Tensor = self.attend(q, k, v)
        if not torch.compiler.is_compiling():
            # The kernel does not know that its result is kept in few bits (shared_input.py). No
            # call of a function of ours here, see above.
            node = output.grad_fn
            while node is not None and node.name() in VIEWS:
                node = node.next_functions[0][0]
            if node is not None:
                cast(Any, node.metadata)[IN_FEW_BITS] = True
        return output
