"""Gated MLPs, SwiGLU and GEGLU, that keep two numbers of few bits where PyTorch keeps four whole.

    g = gate(x),  u = up(x),  y = f(g) u,  out = down(y)

PyTorch keeps g, f(g), u and y. Backward needs two of their functions,

    du = dy a,   a = f(g)              dg = dy b,   b = f'(g) u

so these are formed in forward and rounded at random (ops/group_code.py). Both gradients are linear
in what is kept and a^, b^ have the means a, b: so du and dg have no bias, at any number of bits.
Rounding g and u instead would have cost as much and left one, since f' is not linear.

What is exact: the output, by the same operations in the same order. What is noisy: dg and du,
without bias: by 0.7% in norm at 8 bits, 12% at 4, 60% at 2, and what follows from
them. y is left to the dense layer `down`: sketched, it keeps its sketch. A plain nn.Linear would
keep y whole; then y is rounded too, in `Y_BITS` bits, and the weight gradient of `down` is that of
`Quantized(Y_BITS)`, without bias, 1% in norm; its dX is exact. A frozen `down` keeps nothing.

Kept: `bits` + 0.25 bits a number for each of a and b, of 32 (16) bits for each of four. Cost: the
derivative in forward in the place of backward, one pass to round and one to restore.

| modules | children |
|---|---|
| LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP, GemmaMLP, ... | gate_proj, up_proj, down_proj, act_fn |
| Llama4TextMLP; T5GemmaMLP | the same, but activation_fn; and dropout (of y) |
| Phi3MLP | gate_up_proj (g and u side by side), down_proj, activation_fn |
| T5DenseGatedActDense | wi_0, wi_1, wo, act, dropout (of y) |

Children stay what they are, dense layers of any kind, and are called as modules. A class is told by
its children's names, and by what it computes with small ones (subclass.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from basis.estimators.quantized import Quantized
from basis.exchange import is_special
from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.lean.activation import ACTIVATIONS, name_of, times_slope
from basis.lean.subclass import LeanSubclass
from basis.noise_key import HasNoiseKey
from basis.ops import group_code
from basis.ops.noise import derive
from basis.sketched import sketched_linear, wants_weight_grad
from basis.trial import agree, on_trial, real_numbers, takes_one

Y_BITS = 8
GROUP = 128
BITS = (8, 4, 2)
_EIGHT = Quantized(Y_BITS)


def check_bits(bits: int) -> None:
    """Raise ValueError, beginning with `gated_bits=`, for another number of bits."""
    if bits not in BITS:
        raise ValueError(f"gated_bits={bits}: must be one of {', '.join(map(str, BITS))}, or null")


@dataclass(frozen=True)
class _Names:
    """What the children are called. up: None where `gate` gives g and u side by side."""

    gate: str
    up: str | None
    down: str
    act: str
    dropout: str | None = None

    def children(self) -> set[str]:
        return {self.gate, self.down} | {n for n in (self.up, self.dropout) if n is not None}


KNOWN = (
    _Names("gate_proj", "up_proj", "down_proj", "act_fn"),
    _Names("gate_proj", "up_proj", "down_proj", "activation_fn"),
    _Names("gate_proj", "up_proj", "down_proj", "act_fn", "dropout"),
    _Names("gate_up_proj", None, "down_proj", "activation_fn"),
    _Names("wi_0", "wi_1", "wo", "act", "dropout"),
)


class _Gated(torch.autograd.Function):
    """y = f(g) u of g and u (..., I), for the f called `name` in ACTIVATIONS."""

    @staticmethod
    def forward(g: Tensor, u: Tensor, key: Tensor, name: str, bits: int) -> Tensor:
        return ACTIVATIONS[name].run(g) * u

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, u, key, name, ctx.bits = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        ctx.dtype = g.dtype
        known, width = ACTIVATIONS[name], g.shape[-1]
        kept: list[Tensor | None] = []
        for place, needed in enumerate((1, 0)):  # a for du, b for dg
            if not ctx.needs_input_grad[needed]:
                kept += (None, None, None)
                continue
            factor = times_slope(u, g, known.slope) if place else known.run(g)
            own = derive(key, place)
            codes, ranges = group_code.encode(factor.reshape(-1, width), own, ctx.bits, GROUP)
            kept += (codes, ranges, own)
        ctx.save_for_backward(*kept, link(g))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *kept, _ = ctx.saved_tensors
        form = group_code.Form(ctx.bits, GROUP, True, ctx.dtype)
        grads: list[Tensor | None] = []
        for codes, ranges, key in (kept[3:], kept[:3]):
            if codes is None:
                grads.append(None)
                continue
            factor = group_code.decode(codes, ranges, key, form).view(grad_output.shape)
            grads.append(grad_output * factor)
        return (*grads, None, None, None)


def gated(g: Tensor, u: Tensor, key: Tensor, name: str, bits: int = 4) -> Tensor:
    """f(g) u, for the f called `name` in ACTIVATIONS, which keeps `bits` bits a number for each of
    g and u (..., I). key: int64, of its noise.
    """
    wanted = torch.is_grad_enabled() and (g.requires_grad or u.requires_grad)
    if wanted and g.dtype == u.dtype and g.numel() > 0:
        return cast(Tensor, _Gated.apply(g, u, key, name, bits))
    return ACTIVATIONS[name].run(g) * u


class LeanGatedMLP(LeanSubclass, HasNoiseKey):
    """Mixin of gated MLPs that keep `lean_bits` bits a number for each of g and u."""

    lean_names: _Names
    lean_name: str
    lean_bits: int

    @property
    def own_names(self) -> frozenset[str]:
        return frozenset({"lean_names", "lean_name", "lean_bits"})

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return cast(Tensor, self.node(x))
        if self.for_inference() or not torch.is_grad_enabled():
            self.pass_without_grad(x.device)
            return cast(Tensor, super().forward(x))
        names = self.lean_names
        g = getattr(self, names.gate)(x)
        g, u = g.chunk(2, dim=-1) if names.up is None else (g, getattr(self, names.up)(x))
        key = self.fixed_or_fresh_key(x.device)
        y = gated(g, u, key, self.lean_name, self.lean_bits)
        down = getattr(self, names.down)
        if names.dropout is not None:  # T5, which has a `down` in float32 among others in less
            y = getattr(self, names.dropout)(y)
            y = y.to(down.weight.dtype) if down.weight.dtype != torch.int8 else y
        if type(down) is nn.Linear and not is_special(down) and wants_weight_grad(down.weight):
            return sketched_linear(y, down.weight, down.bias, derive(key, 2), _EIGHT)
        return cast(Tensor, down(y))

    @classmethod
    def from_mlp(cls, mlp: nn.Module, bits: int) -> LeanGatedMLP:
        """The same MLP with the same children, hooks and attributes."""
        check_bits(bits)
        found = _known(mlp)
        assert found is not None
        new = cls.of(mlp)
        new.lean_names, new.lean_name = found
        new.lean_bits = bits
        return new


def names_of(module: nn.Module) -> _Names | None:
    """What the children of `module` are called; None if it is no gated MLP that can be replaced."""
    found = _known(module)
    return None if found is None else found[0]


def is_gated(module: nn.Module) -> bool:
    """Whether `module` is a gated MLP of a class that can be replaced."""
    return _known(module) is not None


def _known(mlp: nn.Module) -> tuple[_Names, str] | None:
    """What its children are called and its f; None if `mlp` is no gated MLP."""
    if isinstance(mlp, LeanGatedMLP):
        return mlp.lean_names, mlp.lean_name
    held = mlp._modules.keys()
    fits = (n for n in KNOWN if held - {n.act} == n.children() and hasattr(mlp, n.act))
    names = next(fits, None)
    if names is None or mlp._parameters or not takes_one(mlp):
        return None
    name = name_of(getattr(mlp, names.act))
    if name is None:
        return None
    with real_numbers():
        generator = torch.Generator().manual_seed(0)
        gate, up, down, x = (
            torch.randn(shape, generator=generator) for shape in ((8, 4), (8, 4), (4, 8), (3, 4))
        )
        if names.up is None:
            gate = torch.cat((gate, up))
        for dtype in (torch.float32, torch.bfloat16):
            parts: dict[str, Any] = {
                names.gate: _dense(gate, dtype),
                names.down: _dense(down, dtype),
                names.act: getattr(mlp, names.act),
            }
            if names.up is not None:
                parts[names.up] = _dense(up, dtype)
            if names.dropout is not None:
                parts[names.dropout] = nn.Identity()

            def formula(x: Tensor, parts: dict[str, Any] = parts) -> Tensor:
                g = parts[names.gate](x)
                g, u = g.chunk(2, dim=-1) if names.up is None else (g, parts[names.up](x))
                return cast(Tensor, parts[names.down](ACTIVATIONS[name].run(g) * u))

            if not agree(on_trial(mlp, **parts), formula, x.to(dtype)):
                return None
    return names, name


def _dense(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
    layer.weight.copy_(weight)
    return layer
