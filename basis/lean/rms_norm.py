"""RMSNorm that keeps its input in 8 bits: PyTorch's, and those of the families of transformers.

    y = w n,   n = x r,   r = 1 / sqrt(mean(x^2) + eps)        of each row x

As with LayerNorm (norm.py) backward forms n again, from 8 bits a number (rounding.py) and from r,
one exact float32 number a row:

    dx = r (g - n mean(g n)),   g = w dy;        dw = sum over rows of dy n

What is exact: the output, by the operations of the module's own class in their order. What is
noisy: dw, without bias, and of dx the term n mean(g n), with a bias of the order of the rounding's
variance. Kept: 1.06 bytes a number and 4 bytes a row. PyTorch's own and those that transformers
writes out in Python keep 6 to 8: x in float32, n, and for bfloat16 x or n again.

| kind | y | classes |
|---|---|---|
| torch | F.rms_norm | nn.RMSNorm |
| llama | w n, n rounded to the precision of x first | Llama, Mistral, Mixtral, Qwen2, Qwen3, Phi3 |
| late | w n, rounded afterwards | OLMo2 |
| gemma | (1 + w) n, rounded afterwards | Gemma, Gemma2, Gemma3 |
| t5 | w n, n rounded to the precision of w if that is low | T5LayerNorm |
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from basis.first_order import first_order, in_transform, link, refuse_nested_transforms
from basis.lean.subclass import LeanSubclass
from basis.noise_key import HasNoiseKey
from basis.ops.matrix import at_least_float32
from basis.ops.rounding import Rounded, restore, round_to_int8
from basis.trial import agree, on_trial, real_numbers, takes_one

_LOW = (torch.float16, torch.bfloat16)
_FOREIGN_KINDS = ("llama", "late", "gemma", "t5")


def _inverse_root(x: Tensor, eps: float) -> Tensor:
    """r of each row, (..., 1); `x` in float32 at least."""
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float | None, kind: str) -> tuple[Tensor, Tensor]:
    """y (..., N) and r (..., 1) of x (..., N)."""
    if kind == "torch":
        if x.dtype == weight.dtype:
            y, r = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
            return y, r
        wide = x.to(at_least_float32(x.dtype))
        r = _inverse_root(wide, torch.finfo(wide.dtype).eps if eps is None else eps)
        return F.rms_norm(x, weight.shape, weight, eps), r
    assert eps is not None
    wide = x.to(torch.float32)
    r = _inverse_root(wide, eps)
    if kind == "t5":
        n = x * r
        return weight * (n.to(weight.dtype) if weight.dtype in _LOW else n), r
    n = wide * r
    if kind == "llama":
        return weight * n.to(x.dtype), r
    y = weight * n if kind == "late" else n * (1.0 + weight.float())
    # PyTorch 2.11 compiles a cast that does nothing, as a Function's output, to a gradient of zero.
    return (y if y.dtype == x.dtype else y.to(x.dtype)), r


class _LeanRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, eps: float | None, kind: str, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, eps, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, ctx.kind, key = inputs
        refuse_nested_transforms()
        ctx.transformed = in_transform()
        _, r = output
        ctx.mark_non_differentiable(r)
        ctx.set_materialize_grads(False)
        ctx.dtype = x.dtype
        ctx.save_for_backward(*round_to_int8(x, key), r, weight, link(x))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 5
        codes, scales, r, weight, _ = ctx.saved_tensors
        n = restore(Rounded(codes, scales), r.dtype) * r
        grad = grad_output.to(r.dtype)
        grad_input = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * n).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            factor = weight.to(r.dtype)
            grad = grad * (1.0 + factor if ctx.kind == "gemma" else factor)
            mean = (grad * n).mean(-1, keepdim=True)
            grad_input = (r * (grad - n * mean)).to(ctx.dtype)
        return grad_input, grad_weight, None, None, None


class LeanRMSNorm(LeanSubclass, HasNoiseKey):
    """Mixin of RMSNorms whose kept input is rounded to 8 bits. Same parameters, same output."""

    weight: nn.Parameter
    lean_kind: str

    @property
    def own_names(self) -> frozenset[str]:
        return frozenset({"lean_kind"})

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return cast(Tensor, self.node(x))
        if self.for_inference() or not (
            torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        ):
            if self.weight.requires_grad:
                self.pass_without_grad(x.device)
            return cast(Tensor, super().forward(x))
        key = self.fixed_or_fresh_key(x.device)
        output, _ = _LeanRMSNorm.apply(x, self.weight, _epsilon(self), self.lean_kind, key)
        return cast(Tensor, output)

    @classmethod
    def from_norm(cls, norm: nn.Module) -> LeanRMSNorm:
        """The same norm, sharing `norm`'s parameter and hooks."""
        kind = kind_of(norm)
        assert kind is not None
        new = cls.of(norm)
        new.lean_kind = kind
        return new


def _epsilon(norm: nn.Module) -> float | None:
    """eps by either of the names that it has in transformers; None is that of the precision."""
    return cast("float | None", getattr(norm, "variance_epsilon", getattr(norm, "eps", None)))


def kind_of(norm: nn.Module) -> str | None:
    """Which RMSNorm `norm` is, over one dimension and with a weight; None if it is none of them."""
    if isinstance(norm, LeanRMSNorm):
        return norm.lean_kind
    name = type(norm).__name__
    weight = norm._parameters.get("weight")
    if weight is None or weight.ndim != 1 or len(norm._parameters) > 1 or norm._modules:
        return None
    if type(norm) is nn.RMSNorm:
        return "torch"
    eps = _epsilon(norm)
    if not (name.endswith(("RMSNorm", "T5LayerNorm")) and isinstance(eps, float)):
        return None
    if not takes_one(norm):
        return None
    with real_numbers():
        generator = torch.Generator().manual_seed(0)
        x, (drawn, _) = torch.randn(2, 2, weight.numel(), generator=generator).unbind()
        x[1] *= eps**0.5  # a row so small that eps counts
        for kind in _FOREIGN_KINDS:
            if all(_computes(norm, kind, drawn.to(dtype), x) for dtype in (x.dtype, _LOW[1])):
                return kind
    return None


def _computes(norm: nn.Module, kind: str, weight: Tensor, x: Tensor) -> bool:
    """Whether the class of `norm` computes RMSNorm of this kind, for this weight."""
    eps = _epsilon(norm)

    def formula(x: Tensor) -> Tensor:
        return rms_norm(x, weight, eps, kind)[0]

    return agree(on_trial(norm, weight=nn.Parameter(weight)), formula, x, x.to(_LOW[1]))
