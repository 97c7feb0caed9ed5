"""LayerNorms that families of transformers write for themselves, with their input in 8 bits: they
differ in what stands for the weight, and in precision; what is kept is that of norm.py.

| kind | y | classes |
|---|---|---|
| cohere | w n, in float32, in single operations | CohereLayerNorm, Cohere2LayerNorm |
| olmo | n, in float32, eps 1e-5 | OlmoLayerNorm |
| 1p | (1 + w) n + b | NemotronLayerNorm1P |

with n = (x - mean) / sqrt(variance + eps) of each row. Classes are told by "LayerNorm" in their
name and by what they compute, in float32 and in bfloat16 (trial.py).

What is exact: the output, by the operations of the class in their order, and the gradient of the
bias. What is noisy: as in norm.py, dw without bias, and the last term of dX. Kept: 1.06 bytes a
number and 8 bytes a row. Written out (cohere), autograd keeps 12 bytes a number. Under autocast a
norm of kind 1p runs as it is: such classes cast by rules of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from basis.lean.norm import norm_of_rows, normalized
from basis.lean.subclass import LeanSubclass
from basis.noise_key import HasNoiseKey
from basis.trial import agree, on_trial, real_numbers, takes_one

_KINDS = ("cohere", "olmo", "1p")
_OLMO_EPS = 1e-5
Run = Callable[[Tensor, Tensor, "Tensor | None", float, bool], Tensor]
"""Of x, weight, bias, eps, and whether in single operations."""


def layer_norm(
    kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, run: Run
) -> Tensor:
    """y (..., N) of x (..., N), by `run`."""
    if kind == "cohere":
        assert weight is not None
        return run(x.to(torch.float32), weight.to(torch.float32), None, eps, True).to(x.dtype)
    if kind == "olmo":
        wide = x.to(torch.float32)
        return run(wide, wide.new_ones(x.shape[-1]), None, _OLMO_EPS, False).to(x.dtype)
    assert weight is not None
    return run(x, weight + 1.0, bias, eps, False)


class LeanOtherLayerNorm(LeanSubclass, HasNoiseKey):
    """Mixin of LayerNorms whose kept input is rounded to 8 bits. Same parameters, same output."""

    lean_kind: str

    @property
    def own_names(self) -> frozenset[str]:
        return frozenset({"lean_kind"})

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return cast(Tensor, self.node(x))
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        trained = weight is not None and weight.requires_grad
        wanted = torch.is_grad_enabled() and (x.requires_grad or trained)
        if self.lean_kind == "1p" and torch.is_autocast_enabled(x.device.type):
            wanted = False  # what it casts then is the class's own affair
        if self.for_inference() or not wanted:
            self.pass_without_grad(x.device)
            return cast(Tensor, super().forward(x))
        key = self.fixed_or_fresh_key(x.device)

        def run(x: Tensor, *options: Any) -> Tensor:
            return normalized(x, *options, key=key)

        return layer_norm(self.lean_kind, x, weight, bias, _epsilon(self), run)

    @classmethod
    def from_norm(cls, norm: nn.Module) -> LeanOtherLayerNorm:
        """The same norm, sharing `norm`'s parameters and hooks."""
        kind = other_kind_of(norm)
        assert kind is not None
        new = cls.of(norm)
        new.lean_kind = kind
        return new


def _epsilon(norm: nn.Module) -> float:
    """eps by either of the names that it has in transformers; OLMo's has none."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", _OLMO_EPS))
    return eps if isinstance(eps, float) else float("nan")  # which agrees with nothing


def other_kind_of(norm: nn.Module) -> str | None:
    """Which LayerNorm of the table `norm` is, over one dimension; None if it is none of them."""
    if isinstance(norm, LeanOtherLayerNorm):
        return norm.lean_kind
    given = {name: p for name, p in norm._parameters.items() if p is not None}
    if "LayerNorm" not in type(norm).__name__ or type(norm) is nn.LayerNorm or norm._modules:
        return None
    shapes = [tuple(p.shape) for p in given.values()] or [getattr(norm, "normalized_shape", ())]
    if not given.keys() <= {"weight", "bias"} or any(len(shape) != 1 for shape in shapes):
        return None
    if not takes_one(norm):
        return None
    with real_numbers():
        generator = torch.Generator().manual_seed(0)
        x, drawn = torch.randn(2, 2, *shapes[0], generator=generator).unbind()
        x[1] *= 1e-2  # a row so small that eps counts
        for kind in _KINDS:
            if all(_computes(norm, kind, drawn.to(t), x) for t in (x.dtype, torch.bfloat16)):
                return kind
    return None


def _computes(norm: nn.Module, kind: str, drawn: Tensor, x: Tensor) -> bool:
    """Whether the class of `norm` computes LayerNorm of this kind, for this weight and bias."""
    has = norm._parameters
    parts = {
        name: nn.Parameter(value)
        for name, value in zip(("weight", "bias"), drawn, strict=True)
        if has.get(name) is not None
    }
    weight, bias = parts.get("weight"), parts.get("bias")
    if kind != "olmo" and weight is None:
        return False

    def formula(x: Tensor) -> Tensor:
        def run(*options: Any) -> Tensor:
            return norm_of_rows(*options)[0]

        return layer_norm(kind, x, weight, bias, _epsilon(norm), run)

    none = {name: None for name in has if name not in parts}
    return agree(on_trial(norm, **parts, **none), formula, x.to(drawn.dtype))
