"""The square of ReLU, y = relu(x)^2, that keeps 4 bits a number.

Its derivative is 2 relu(x), which has no bound, so no step function fits inputs of any size, as one
does for GELU. Here r = relu(x) is rounded at random within the range of its group of 128 numbers
(ops/group_code.py), and dX = 2 dY r^. That is linear in r^, and E[r^] = r: dX has no bias. Where r
is 0, and its group has a 0 for its least number, so is r^.

What is exact: the output. What is noisy: dX, by 7% in norm for normal inputs. Kept: 4.25 bits a
number; PyTorch keeps r whole. Cost: one pass to round and one to restore.

Found by what they compute: ReLUSquaredActivation of transformers ("relu2", Nemotron).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.lean.activation import ACTIVATIONS, LeanActivation
from basis.noise_key import HasNoiseKey
from basis.ops import group_code

BITS = 4
GROUP = 128


class _Squared(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, key: Tensor) -> Tensor:
        return ACTIVATIONS["relu squared"].run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, key = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        rows = F.relu(x).reshape(-1, x.shape[-1])
        codes, ranges = group_code.encode(rows, key, BITS, GROUP)
        ctx.save_for_backward(codes, ranges, key, link(x))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        codes, ranges, key, _ = ctx.saved_tensors
        form = group_code.Form(BITS, GROUP, False, grad_output.dtype)
        r = group_code.decode(codes, ranges, key, form).view(grad_output.shape)
        return grad_output * r * 2, None


class LeanReLUSquared(LeanActivation, HasNoiseKey):
    """Mixin of modules that compute the square of ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return cast(Tensor, self.node(input))
        trains = torch.is_grad_enabled() and input.requires_grad and input.ndim > 0
        if self.for_inference() or not trains or input.numel() == 0:
            self.pass_without_grad(input.device)
            return ACTIVATIONS[self.lean_name].run(input)
        return cast(Tensor, _Squared.apply(input, self.fixed_or_fresh_key(input.device)))

    def _use_bits(self, bits: int, slope: str) -> None:
        self.lean_bits, self.lean_steps = BITS, ((), ())
