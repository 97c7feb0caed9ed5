"""ReLU, SiLU and the GELUs of transformers in few bits a number, as GELU (gelu.py): modules without
parameters, told by what they compute.

What is exact: the output, by the operations of the module's own class; and dX of ReLU, whose
derivative is a step function: one bit a number. What is approximated: dX of the others, by a step
function in the place of the derivative, a fixed function of X; for normal numbers the error of dX
in norm is 13% to 15% at 2 bits and 4% at 4. Kept: `bits` a number. GELU as written out in Python by
transformers ("gelu_new") keeps four numbers for each.

PyTorch's ReLU keeps its output, which a plain dense layer behind it keeps too, so there the bit is
one more. A sketched one keeps its sketch, since nobody keeps the output any more. The square of
ReLU has no step function that fits inputs of any size: relu_squared.py.

| function | by PyTorch's | modules |
|---|---|---|
| max(x, 0) | F.relu | nn.ReLU |
| x / (1 + exp(-x)) | F.silu | nn.SiLU, SiLUActivation |
| x Phi(x) | F.gelu, or written out with erf | GELUActivation |
| tanh approximation | F.gelu(approximate="tanh"), or written out | GELUTanh, NewGELU, FastGELU |
| x / (1 + exp(-1.702 x)) | written out | QuickGELUActivation |

The same functions serve gated.py, with the derivative as it is. A function that is called and is
no module, as `F.relu` in a forward, can't be exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.lean.gelu import check_bits, steps
from basis.lean.subclass import LeanSubclass
from basis.ops import step_code
from basis.ops.noise import pi
from basis.ops.step_code import Levels
from basis.trial import agree, real_numbers, takes_one


def _gelu_new(x: Tensor) -> Tensor:
    root = math.sqrt(2.0 / pi())
    return 0.5 * x * (1.0 + torch.tanh(root * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_erf(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


@dataclass(frozen=True)
class _Activation:
    run: Callable[[Tensor], Tensor]
    slope: str  # whose derivative it has


ACTIVATIONS = {
    "silu": _Activation(F.silu, "silu"),
    "gelu": _Activation(F.gelu, "none"),
    "gelu by tanh": _Activation(lambda x: F.gelu(x, approximate="tanh"), "tanh"),
    "gelu by erf, in python": _Activation(_gelu_erf, "none"),
    "gelu by tanh, new": _Activation(_gelu_new, "tanh"),
    "gelu by tanh, fast": _Activation(_gelu_fast, "tanh"),
    "quick gelu": _Activation(_quick_gelu, "quick"),
    "relu": _Activation(F.relu, "relu"),
    "relu squared": _Activation(lambda x: torch.square(F.relu(x)), "relu squared"),
}
"""By names that are ours: functions that differ in the last bit are two."""
_RELU: tuple[Levels, Levels] = ((0.0,), (0.0, 1.0))


def times_slope(y: Tensor, x: Tensor, slope: str) -> Tensor:
    """y f'(x), for an f with this slope, in one pass."""
    aten = torch.ops.aten
    if slope in ("none", "tanh"):
        return cast(Tensor, aten.gelu_backward(y, x, approximate=slope))
    if slope == "relu":
        return cast(Tensor, aten.threshold_backward(y, x, 0))
    if slope == "relu squared":
        return y * F.relu(x) * 2
    return cast(Tensor, aten.silu_backward(y, x if slope == "silu" else 1.702 * x))


def name_of(activation: object) -> str | None:
    """The name in ACTIVATIONS of a module or a function; None if it is none of them."""
    if isinstance(activation, LeanActivation):
        return activation.lean_name
    if isinstance(activation, nn.Module):
        plain = activation
        if any(True for _ in plain.buffers()) or any(True for _ in plain.parameters()):
            return None
        if not takes_one(plain) or plain._modules:
            return None
    elif not callable(activation):
        return None
    with real_numbers():
        x = torch.randn(1024, generator=torch.Generator().manual_seed(0)) * 3
        for name, known in ACTIVATIONS.items():
            if agree(activation, known.run, x, x.bfloat16()):
                return name
    return None


class _FewBits(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, name: str, bits: int, boundaries: Levels, levels: Levels) -> Tensor:
        return ACTIVATIONS[name].run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.bits, boundaries, ctx.levels = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        ctx.save_for_backward(step_code.encode(x, ctx.bits, boundaries), link(x))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        packed, _ = ctx.saved_tensors
        grad_input = step_code.times_levels(grad_output, packed, ctx.bits, ctx.levels)
        return grad_input, None, None, None, None


class LeanActivation(LeanSubclass):
    """Mixin of activations that keep `lean_bits` (1, 2 or 4) bits a number; ReLU keeps 1."""

    lean_name: str
    lean_bits: int
    lean_steps: tuple[Levels, Levels]

    @property
    def own_names(self) -> frozenset[str]:
        return frozenset({"lean_name", "lean_bits", "lean_steps"})

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return cast(Tensor, self.node(input))
        if self.for_inference() or not (torch.is_grad_enabled() and input.requires_grad):
            return cast(Tensor, super().forward(input))
        return cast(Tensor, _FewBits.apply(input, self.lean_name, self.lean_bits, *self.lean_steps))

    @classmethod
    def from_activation(cls, activation: nn.Module, bits: int) -> LeanActivation:
        """The same activation with the same hooks and attributes."""
        check_bits(bits)
        name = name_of(activation)
        assert name is not None
        new = cls.of(activation)
        new.lean_name = name
        new._use_bits(bits, ACTIVATIONS[name].slope)
        return new

    def _use_bits(self, bits: int, slope: str) -> None:
        """Keep `bits` bits a number, or fewer if those do."""
        exact = slope == "relu"
        self.lean_bits = 1 if exact else bits
        self.lean_steps = _RELU if exact else steps(bits, slope)


def is_few_bit(module: nn.Module) -> bool:
    """Whether few bits do for `module`, of a class that says GELU, SiLU or ReLU."""
    if isinstance(module, LeanActivation):
        return True
    named = any(word in type(module).__name__ for word in ("GELU", "SiLU", "ReLU"))
    return named and not getattr(module, "inplace", False) and name_of(module) is not None
