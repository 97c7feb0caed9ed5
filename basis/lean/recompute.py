"""Outputs of LayerNorm and GELU that are not kept for the dense layer after them, but computed
again in backward.

    basis.convert(model, basis.Recompute())       # after a method, if there is one
    basis.revert(model)

A dense layer keeps its input X for dW = dY^T X. Where X = f(Z) is a LayerNorm's or a GELU's output,
Z is kept too, for the backward of f. So X need not be: it is f(Z) once more, one pass over numbers
and no product. Of the 16 B x T x C tensors that a GPT block keeps that is 6: the inputs of qkv and
fc, and the four of mlp.proj. (llm.c calls the same `-r 2`.)

What is exact: everything. X is made by the same operator from the same tensor, so the gradients are
those of the plain layers to the last bit, as far as PyTorch repeats itself. What is kept: Z and the
parameters of f, which are there anyway. Cost: f once more for each dense layer that reads X (layers
that read the same X do it each). Second derivatives are refused (first_order.py).

How a layer knows where its input comes from: the norm writes it on the tensor that it returns, and
the dense layer looks. A tensor that went through anything in between, or was written to since, has
no such note, or one that is out of date; then the layer keeps its input, as nn.Linear does. So does
a layer with a frozen weight, which keeps nothing, and one inside a transform of torch.func.

Under torch.compile the modules are the plain ones. There the compiler decides what is computed
again: with `COMPILER` it does this. By itself it keeps both f(Z) and Z, since a product needs f(Z)
in memory anyway. Sketched and quantized layers keep nothing of X as it is; they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from basis.exchange import Exchange, StandIn, take_over
from basis.first_order import first_order, in_transform
from basis.ops.matrix import cast_for_autocast
from basis.sketched import wants_weight_grad

COMPILER: dict[str, Any] = {"ban_recompute_materialized_backward": False}
"""Settings of torch._functorch.config with which a compiled graph recomputes what these layers do,
read when a graph is compiled: `torch._functorch.config.patch(COMPILER)` around the first call.
"""

Make = Callable[..., Tensor]


@dataclass(frozen=True)
class _Origin:
    """How a tensor was made, `make(*tensors)`, and its version then."""

    make: Make
    tensors: tuple[Tensor | None, ...]
    version: int


def _note(made: Tensor, make: Make, *tensors: Tensor | None) -> Tensor:
    """`made`, with a note that it is `make(*tensors)`."""
    if not torch.compiler.is_compiling() and not in_transform() and made.requires_grad:
        # detached: for values alone, so that nothing of the graph hangs on the note
        kept = tuple(None if t is None else t.detach() for t in tensors)
        made._basis_origin = _Origin(make, kept, made._version)  # type: ignore[attr-defined]
    return made


def _origin(x: Tensor) -> _Origin | None:
    """The note on `x`, if it still holds."""
    if torch.compiler.is_compiling() or in_transform():
        return None
    origin: _Origin | None = getattr(x, "_basis_origin", None)
    return origin if origin is not None and origin.version == x._version else None


class _LinearOfMade(torch.autograd.Function):
    """Y = X W^T + b; backward makes X again: dX = dY W, dW = dY^T X, db = column sums of dY."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, make: Make, *tensors: Tensor | None
    ) -> Tensor:
        output = F.linear(input, weight, bias)  # (..., N) (M, N) -> (..., M)
        # no view: the next layer may write into it (see sketched.py)
        return output if input.ndim == 2 else torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.make, *tensors = inputs
        ctx.dtype, ctx.inputs, ctx.transformed = input.dtype, len(inputs), False
        ctx.save_for_backward(weight, *tensors)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1])  # (B, M)
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:  # first: X is gone before dX, which is as large, is there
            x = ctx.make(*tensors).to(ctx.dtype)  # (..., N), again
            grad_weight = grad_rows.t() @ x.reshape(-1, x.shape[-1])  # (M, B) (B, N) -> (M, N)
            grad_weight = grad_weight.to(weight.dtype)
            del x
        if ctx.needs_input_grad[0]:
            grad_input = grad_output @ weight.to(grad_output.dtype)  # (..., M) (M, N) -> (..., N)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0)
        return grad_input, grad_weight, grad_bias, *(None,) * (ctx.inputs - 3)


class RecomputingLinear(StandIn, nn.Linear):
    """nn.Linear that does not keep an input which a `NotedLayerNorm` or a `NotedGELU` made."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return cast(Tensor, self.node(input))
        origin = _origin(input)
        if origin is None or self.for_inference() or not wants_weight_grad(self.weight):
            return super().forward(input)
        return cast(
            Tensor,
            _LinearOfMade.apply(
                cast_for_autocast(input), self.weight, self.bias, origin.make, *origin.tensors
            ),
        )

    def original(self) -> nn.Linear:
        return take_over(
            nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"),
            self,
        )


class NotedLayerNorm(StandIn, nn.LayerNorm):
    """nn.LayerNorm that notes on its output how it was made."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return cast(Tensor, self.node(input))
        device = input.device.type
        if not torch.compiler.is_compiling() and torch.is_autocast_enabled(device):
            # as F.layer_norm does under autocast; here, so that both keep one tensor
            input = input.to(torch.promote_types(input.dtype, torch.float32))
        shape, eps = self.normalized_shape, self.eps

        def make(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return F.layer_norm(x, shape, weight, bias, eps)

        return _note(super().forward(input), make, input, self.weight, self.bias)

    def original(self) -> nn.LayerNorm:
        return take_over(nn.LayerNorm(self.normalized_shape, self.eps, device="meta"), self)


class NotedGELU(StandIn, nn.GELU):
    """nn.GELU that notes on its output how it was made."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return cast(Tensor, self.node(input))
        approximate = self.approximate

        def make(x: Tensor) -> Tensor:
            return F.gelu(x, approximate=approximate)

        return _note(super().forward(input), make, input)

    def original(self) -> nn.GELU:
        return take_over(nn.GELU(self.approximate), self)


@dataclass(frozen=True)
class Recompute(Exchange):
    """For `basis.convert`: plain dense layers that make LayerNorm's and GELU's outputs again.

    nn.Linear, nn.LayerNorm and nn.GELU are replaced, not their subclasses; convert dense layers
    that a method is for before.
    """

    kind: ClassVar[str] = "LayerNorm, GELU or dense layer"

    def accepts(self, module: nn.Module) -> bool:
        plain = (nn.Linear, nn.LayerNorm, nn.GELU)
        return type(module) in (*plain, RecomputingLinear, NotedLayerNorm, NotedGELU)

    def stand_in(self, name: str, module: nn.Module) -> StandIn:
        new: StandIn
        if isinstance(module, nn.LayerNorm):
            new = NotedLayerNorm(module.normalized_shape, module.eps, device="meta")
        elif isinstance(module, nn.GELU):
            new = NotedGELU(module.approximate)
        else:
            assert isinstance(module, nn.Linear)
            if module._parameters.get("weight") is None:
                raise ValueError("the layer's weight is computed by a hook, not a parameter")
            new = RecomputingLinear(
                module.in_features, module.out_features, module.bias is not None, device="meta"
            )
        return take_over(new, module)
