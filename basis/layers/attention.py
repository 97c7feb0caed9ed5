"""nn.MultiheadAttention, and with it nn.TransformerEncoderLayer and nn.TransformerDecoderLayer.

Its four projections are dense layers that nobody calls: PyTorch's forward takes the weights
in_proj_weight and out_proj.weight and multiplies by itself. The stand-in makes the two products
sketched layers, with scaled_dot_product_attention (or softmax, where the weights of attention are
asked for) between them. Outputs and dX are PyTorch's to rounding. What is kept between the products
is what PyTorch's attention keeps.

q, k and v of self-attention read one tensor, so there is one sketch of it. Where keys and values
come from another tensor, that is kept by a sketch of its own; a method that learns has learned from
the queries' input, and looks at the other one anew each time.

The fast path, of this module and of nn.TransformerEncoder, is PyTorch's own, as is its condition:
it is taken in eval() where no gradient is wanted, with the same weights, and is exact. With
gradients frozen or off the plain forward runs.

Left as they are (`why_not`): attention with add_bias_kv or add_zero_attn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from basis.estimator import Estimator
from basis.exchange import StandInOfClass, standing_in, take_over
from basis.linear import SketchedLinear
from basis.ops.matrix import cast_for_autocast, has_values
from basis.ops.noise import derive
from basis.ops.shared_noise import Passes
from basis.sketched import Sketched, sketched_linear, wants_weight_grad


class SketchedAttention(StandInOfClass, Sketched):
    """nn.MultiheadAttention whose projections keep what their estimators make of their inputs. Its
    own `estimator` is that of q, k and v; `out_proj` is a SketchedLinear.
    """

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    out_proj: SketchedLinear
    embed_dim: int
    num_heads: int
    dropout: float
    batch_first: bool

    @property
    def own_names(self) -> frozenset[str]:
        return super().own_names | {"in_features"}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """in_proj_weight (3 E, E); of q alone where keys or values have another width."""
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        assert weight is not None
        return weight

    def original(self) -> nn.Module:
        plain = super().original()
        bias = self.out_proj.bias is not None
        out = NonDynamicallyQuantizableLinear(self.embed_dim, self.embed_dim, bias, device="meta")
        plain.out_proj = take_over(out, self.out_proj)
        return plain

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's."""
        masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if isinstance(query, Proxy):
            return cast(tuple[Tensor, Tensor | None], self.node(query, key, value, *masks))
        sketched = wants_weight_grad(self.weight) or wants_weight_grad(self.out_proj.weight)
        if self.for_inference() or not sketched or not has_values(query) or query.is_nested:
            for layer in (self, self.out_proj):
                layer.key_for(query)  # a reentrant checkpoint: see Sketched._draws
            return cast(tuple[Tensor, Tensor | None], super().forward(query, key, value, *masks))
        batched = query.ndim == 3
        batch_first = self.batch_first or not batched
        q, k, v = (
            self._heads(x if batched else x.unsqueeze(0), batch_first)
            for x in self._projected(query, key, value)
        )
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "MultiheadAttention: is_causal says what attn_mask is; give that too"
            )
        by_hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if by_hint else _joined(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, by_hint)
        y = (y.transpose(1, 2) if batch_first else y.permute(2, 0, 1, 3)).flatten(2)
        y = self.out_proj(y)
        return (y if batched else y.squeeze(0)), weights

    def _heads(self, x: Tensor, batch_first: bool) -> Tensor:
        """(N, L, E) or (L, N, E) -> (N, heads, L, E / heads)."""
        x = x.unflatten(-1, (self.num_heads, -1))
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, (..., E) each."""
        in_pass = self._in_pass(query)
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return self.product(query, weight, bias, in_pass).chunk(3, -1)
        if weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            weights = [*weight.chunk(3)]
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        projected = []
        for place, x in enumerate((query, key, value)):
            w, b = weights[place], biases[place]
            assert w is not None
            if self._state_names and (place or w.shape[1] != self.in_features):
                noise = derive(self.key_for(x), place)
                projected.append(sketched_linear(cast_for_autocast(x), w, b, noise, self.estimator))
            else:
                projected.append(self.product(x, w, b, in_pass))
        return tuple(projected)


def _joined(mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Both masks as numbers to add to the scores (N, heads, L, S), or None."""
    batch, heads = q.shape[:2]
    shapes = ((batch, heads) if mask is not None and mask.ndim == 3 else (1, 1), (batch, 1))
    joined = None
    for given, shape in zip((mask, padding), shapes, strict=True):
        if given is None:
            continue
        given = given.reshape(*shape, -1, k.shape[-2])
        if given.dtype == torch.bool:
            given = torch.zeros_like(given, dtype=q.dtype).masked_fill(given, -math.inf)
        joined = given.to(q.dtype) if joined is None else joined + given
    return joined


def is_attention(module: nn.Module) -> bool:
    """Whether `module` is an nn.MultiheadAttention, or stands in for one."""
    return type(module) is nn.MultiheadAttention or isinstance(module, SketchedAttention)


def why_not(module: nn.Module) -> str | None:
    """Why `module`, an attention, can't be sketched; None if it can."""
    if getattr(module, "bias_k", None) is not None:
        return "has biases among its keys and values (add_bias_kv)"
    if getattr(module, "add_zero_attn", False):
        return "adds zeros to its keys and values (add_zero_attn)"
    return None


def sketched_attention(
    name: str, module: nn.Module, choose: Callable[[str, nn.Linear], Estimator]
) -> SketchedAttention:
    """What stands in for `module`, an attention called `name`, with the same Parameters. choose:
    gives the method for q, k and v, by `name`, and for out_proj.
    """
    assert isinstance(module, nn.MultiheadAttention)
    width, bias = module.embed_dim, module.in_proj_bias is not None
    estimator = choose(name, nn.Linear(width, 3 * width, bias, device="meta"))
    out = SketchedLinear.from_linear(module.out_proj, choose(f"{name}.out_proj", module.out_proj))
    new = standing_in(SketchedAttention, module)
    new.in_features = width
    new.estimator, new.passes = estimator, (Passes(1), 0)
    new.forget(module.out_proj.weight.device)
    take_over(new, module)
    new.out_proj = out
    return new
