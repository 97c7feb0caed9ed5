"""The gate of sketched experts that have one of their own, such as the clamped SwiGLU of gpt-oss:
it keeps few bits a number.

    y_i = F(g_i, u_i),   dg = dy a,  a = dF/dg,   du = dy b,  b = dF/du

for any F that works number by number. A row h of 2 I numbers has g and u side by side, or in turns.
Autograd keeps what each operation of F needs, some five to eight numbers for each y. Here F is
differentiated in forward, by autograd, and a and b are kept, rounded at random (ops/group_code.py).
dg and du are linear in them, so they have no bias.

Which gates: those that are not transformers' own default, which gated.py does; told by their
Jacobian for a few numbers, which must be that of an F number by number, in one of both layouts.
Not taken are gates that call an activation module: that one is replaced alone.

What is exact: the output, by the experts' own gate. What is noisy: dg and du, without bias: by 0.7%
in norm at 8 bits, 12% at 4. Kept: `bits` + 0.25 bits a number of h. Cost: the derivative in forward
in the place of backward. In a compiled graph, and within torch.func, the gate keeps what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from basis.exchange import StandIn
from basis.first_order import first_order, in_transform
from basis.noise_key import HasNoiseKey
from basis.ops import group_code
from basis.ops.noise import derive
from basis.trial import plain_class, real_numbers

GROUP = 128
Gate = Callable[[Tensor], Tensor]


def _parted(h: Tensor, in_turns: bool) -> tuple[Tensor, Tensor]:
    """The two numbers that belong together, (..., 2 I) -> twice (..., I)."""
    first, second = (h[..., ::2], h[..., 1::2]) if in_turns else h.chunk(2, -1)
    return first, second


def _as_it_is(x: Tensor) -> Tensor:
    return x


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, key: Tensor, gate: Gate, in_turns: bool, bits: int) -> Tensor:
        ctx.transformed, ctx.in_turns = False, in_turns
        ctx.form = group_code.Form(bits, GROUP, True, h.dtype)
        # What this short graph saves is no concern of hooks that are on outside.
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            x = h.detach().requires_grad_()
            y = gate(x)
            (slopes,) = torch.autograd.grad(y, x, torch.ones_like(y))
        kept: list[Tensor] = []
        for place, slope in enumerate(_parted(slopes, in_turns)):
            own = derive(key, place)
            rows = slope.reshape(-1, slope.shape[-1]).contiguous()
            kept += (*group_code.encode(rows, own, bits, GROUP), own)
        ctx.save_for_backward(*kept)
        return y.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        parts = [
            grad * group_code.decode(codes, ranges, key, ctx.form).view(grad.shape)
            for codes, ranges, key in (kept[:3], kept[3:])
        ]
        whole = torch.stack(parts, -1).flatten(-2) if ctx.in_turns else torch.cat(parts, -1)
        return whole.to(ctx.form.dtype), *(None,) * 4


class ExpertsGate(nn.Module):
    """The gate of an experts module, as a module that `basis.Lean` can find."""

    def __init__(self, owner: nn.Module, in_turns: bool) -> None:
        super().__init__()
        self.owner = (owner,)  # in a tuple, so that it does not count as a submodule
        self.in_turns = in_turns

    def forward(self, h: Tensor) -> Tensor:
        """(S, 2 I) -> (S, I)."""
        return cast(Tensor, cast(Any, self.owner[0])._apply_gate(h))


class LeanExpertsGate(StandIn, HasNoiseKey, ExpertsGate):
    """The same gate that keeps `bits` bits a number of what it reads."""

    def __init__(self, owner: nn.Module, in_turns: bool, bits: int) -> None:
        super().__init__(owner, in_turns)
        self.bits = bits

    def forward(self, h: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled() and h.requires_grad and h.numel() > 0
        if not wanted or torch.compiler.is_compiling() or in_transform():
            return super().forward(h)
        key = self.fixed_or_fresh_key(h.device)
        return cast(Tensor, _Gated.apply(h, key, super().forward, self.in_turns, self.bits))

    def original(self) -> ExpertsGate:
        return ExpertsGate(self.owner[0], self.in_turns).train(self.training)


def own_gate(experts: nn.Module) -> ExpertsGate | None:
    """The gate of `experts` if it is one of their own that can be replaced."""
    gate = getattr(plain_class(experts), "_apply_gate", None)
    if gate is None or not experts.has_gate or gate.__name__ == "_default_apply_gate":
        return None
    if isinstance(getattr(experts, "act_fn", None), nn.Module):
        return None
    in_turns = _layout(experts, gate)
    return None if in_turns is None else ExpertsGate(experts, in_turns)


def _layout(experts: nn.Module, gate: Callable[[nn.Module, Tensor], Tensor]) -> bool | None:
    """Whether g and u come in turns (True) or side by side; None if the gate is none of both."""
    with real_numbers(), torch.enable_grad():
        h = 3 * torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
        try:
            found = torch.autograd.functional.jacobian(lambda x: gate(experts, x), h)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            return None
    if not isinstance(found, Tensor) or found.shape != (2, 3, 2, 6):
        return None
    own = torch.eye(2).view(2, 1, 2, 1)
    for in_turns in (False, True):
        first, second = (torch.zeros(3, 6) for _ in range(2))
        for part, rows in zip(_parted(torch.arange(6), in_turns), (first, second), strict=True):
            rows[torch.arange(3), part] = 1.0
        reached = own * (first + second).view(1, 3, 1, 6)
        if torch.equal(found * reached, found) and bool((found * own).count_nonzero()):
            return in_turns
    return None
