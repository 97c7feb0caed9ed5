"""Attention that keeps queries, keys, values and output in 8 bits.

`F.scaled_dot_product_attention` keeps q, k, v, its output and the log-sum-exp of each row for a
backward that forms the attention probabilities again. Here the same call, whatever kernel it picks
on the device, saves through hooks that round the four large tensors to 8 bits (rounding.py) and
restore them in backward. No product is computed twice.

What is exact: the output. What is noisy: dq, dk, dv; each kept number is unbiased, the gradients
are not linear in them, so a bias of the order of the rounding's variance is left. Kept: 4 x 0.27 of
a B x T x C tensor in float32, instead of 4, and the log-sum-exp. Under torch.compile the hooks
break the graph at each attention; what is kept and the gradients are as in eager mode.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from basis.diagnostics.saved import announce
from basis.exchange import StandIn, refuse_hooks, refuse_replaced_forward
from basis.first_order import refuse_graph_of_backward
from basis.lean.rounding import Rounded, restore, round_to_int8
from basis.noise_key import HasNoiseKey


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

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if isinstance(q, Proxy):
            return cast(Tensor, self.node(q, k, v))
        if self.for_inference() or not torch.is_grad_enabled():
            return cast(Tensor, self.attend(q, k, v))
        key = self.fixed_or_fresh_key(q.device)
        width = q.shape[
            -1
        ]  # not q itself in `pack`: autograd holds the hook until backward, and q with it
        saved = 0

        def pack(tensor: Tensor) -> Tensor | tuple[Rounded, torch.dtype]:
            nonlocal saved
            if tensor.ndim != 4 or not tensor.is_floating_point() or tensor.shape[-1] != width:
                announce(tensor)
                return tensor
            saved += 1  # each tensor has noise of its own
            rounded = round_to_int8(tensor, key ^ saved)
            announce(*rounded)
            return rounded, tensor.dtype

        def unpack(kept: Tensor | tuple[Rounded, torch.dtype]) -> Tensor:
            refuse_graph_of_backward()
            return kept if isinstance(kept, Tensor) else restore(*kept)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return cast(Tensor, self.attend(q, k, v))
