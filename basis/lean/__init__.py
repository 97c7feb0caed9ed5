"""Lean layers: everything except the dense layers in as few bytes as keeps training intact, and no
matrix product computed twice.

    basis.convert(model, basis.Lean(attention=CausalAttention))   # LayerNorm, GELU, this class
    basis.revert(model)

Of the 16 B x T x C tensors that a GPT block keeps in float32, 10 are not inputs of sketched layers:

| kept for | plain | lean | how | error of the gradient |
|---|---|---|---|---|
| two LayerNorms | 2 | 0.53 | 8 bits, unbiased (norm.py) | noise, 1% |
| GELU | 4 | 0.25 | 2 bits: the derivative in four steps (gelu.py) | 13% of its dX in norm, fixed |
| attention: q, k, v, output | 4 | 1.06 | 8 bits, unbiased (attention.py) | noise, 1% |

And of what other models' blocks keep, in bytes a number where that is bfloat16:

| module | plain | lean | how | error of the gradient |
|---|---|---|---|---|
| RMSNorm of PyTorch | 8 | 1.1 | 8 bits, unbiased (rms_norm.py) | noise, 1% of dW, 0.1% of dX |
| RMSNorm of transformers | 6 to 8 | 1.1 | the same | the same |
| Cohere's LayerNorm, OLMo's | 4 to 12 | 1.1 | 8 bits, unbiased (layer_norms.py) | as LayerNorm |
| SwiGLU, GEGLU, of `gate` and `up` | 6 | 1.1 | 4 bits, unbiased (gated.py) | noise, 12%, no bias |
| and the input of `down`, if plain | 2 | 1.0 | 8 bits, unbiased | noise, 1% of dW, no bias |
| gates of experts' own, gpt-oss | 10 to 16 | 1.1 | 4 bits, unbiased (experts_gate.py) | as SwiGLU |
| transformers' attention | 2 each | 1.1 each | q, k, v, output: 8 bits (sdpa.py) | noise, 1 to 4% |
| with a bias or a cap | 2 each, 10 a score | 1.1 each | q, k, v: 8 bits (scores.py) | the same |
| with sinks | 2 each, 8 to 14 a score | 1.1 each | q, k, v: 8 bits (sinks.py) | the same |
| SiLU, GELU of transformers | 2 to 8 | 0.25 | 2 bits, as GELU (activation.py) | 15% of dX, fixed |
| ReLU | 2 | 0.13 | 1 bit (activation.py) | none |
| the square of ReLU | 2 | 0.5 | 4 bits, unbiased (relu_squared.py) | noise, 7% of dX, no bias |
| dropout | 1 or 2 | 0.13 | 1 bit (dropout.py) | none |

Modules are replaced in place and keep their parameters. Forward is exact in all of them. Those of
transformers are found by what they compute (subclass.py), so that nothing of it is imported.

In the attention of T5, Gemma 2 (scores.py) and gpt-oss (sinks.py) two products are computed twice:
q k^T and dO v^T stand for the scores, which are as many as queries times keys. Dropout of T5 and
Gemma 2 keeps a bit a score.

Beside them stand two ways to compute again: recompute.py, exact, for plain dense layers behind
LayerNorm and GELU; and boundary.py, a checkpoint around a block that keeps its input in few bits,
which does compute products twice.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from basis.checks import check_types, module_classes
from basis.exchange import Exchange, StandIn
from basis.lean import gated
from basis.lean.activation import LeanActivation, is_few_bit, name_of
from basis.lean.attention import LeanAttention
from basis.lean.dropout import LeanDropout
from basis.lean.experts_gate import ExpertsGate, LeanExpertsGate
from basis.lean.gated import LeanGatedMLP
from basis.lean.gelu import LeanGELU, check_bits
from basis.lean.layer_norms import LeanOtherLayerNorm, other_kind_of
from basis.lean.norm import LeanLayerNorm
from basis.lean.registered import LeanRegistered, is_registered
from basis.lean.relu_squared import LeanReLUSquared
from basis.lean.rms_norm import LeanRMSNorm, kind_of
from basis.lean.subclass import LeanSubclass

__all__ = [
    "Lean",
    "LeanActivation",
    "LeanAttention",
    "LeanDropout",
    "LeanGELU",
    "LeanGatedMLP",
    "LeanLayerNorm",
    "LeanRMSNorm",
    "LeanReLUSquared",
    "LeanRegistered",
]


@dataclass(frozen=True)
class Lean(Exchange):
    """For `basis.convert`: norms, activations, gated MLPs, dropout and attention that keep few bits
    a number.

    norm: whether LayerNorm and RMSNorm over the last dimension are replaced. gelu_bits: 1, 2 or 4
    bits that GELU and SiLU keep of each number; None leaves them as they are, and ReLU, which keeps
    1, and its square, which keeps 4. gated_bits: 8, 4 or 2 bits that a gated MLP (SwiGLU, GEGLU)
    keeps for each number of `gate` and of `up`; None leaves gated MLPs as they are, and the
    activation in them to gelu_bits. dropout: whether nn.Dropout is
    replaced. attention: the class of modules that take q, k, v (b, h, T, d) and return the output,
    or a tuple of such classes. What such a module holds is not replaced itself; one that says
    `is_causal = True` and has no dropout stays within one graph of torch.compile. attention="sdpa":
    the attention of transformers' models (registered.py).

    Which RMSNorms, activations and gated MLPs: those of PyTorch and of transformers, found by what
    they compute (rms_norm.py, activation.py, gated.py). Raises ValueError that begins with the name
    of the wrong option.
    """

    kind: ClassVar[str] = "module to make lean"

    norm: bool = True
    gelu_bits: int | None = 2
    gated_bits: int | None = 4
    dropout: bool = True
    attention: type[nn.Module] | tuple[type[nn.Module], ...] | str = ()

    def __post_init__(self) -> None:
        check_types(self)
        if self.gelu_bits is not None:
            check_bits(self.gelu_bits)
        if self.gated_bits is not None:
            gated.check_bits(self.gated_bits)
        if isinstance(self.attention, str) and self.attention != "sdpa":
            raise ValueError(
                f'attention={self.attention!r}: must be "sdpa", a class of modules, or a tuple of '
                "such classes"
            )
        self._attention_classes()

    def _attention_classes(self) -> tuple[type[nn.Module], ...]:
        if isinstance(self.attention, str):
            return ()
        return module_classes("attention", self.attention)

    def leaves(self, module: nn.Module) -> tuple[str, ...]:
        if self.attention == "sdpa" and is_registered(module):
            return ()  # norms of queries and keys, and dropout, are replaced too
        names = gated.names_of(module)
        return ("",) if names is None else (names.act,)  # but dropout, of adapters too, is replaced

    def accepts(self, module: nn.Module) -> bool:
        if isinstance(module, LeanAttention):
            module = module.attend
        return (
            type(module) in self._attention_classes()
            or (self.attention == "sdpa" and is_registered(module))
            or (self.norm and _is_norm(module))
            or (self.gelu_bits is not None and _is_activation(module))
            or (self.gated_bits is not None and gated.is_gated(module))
            or (self.gated_bits is not None and isinstance(module, ExpertsGate))
            or (self.dropout and _is_dropout(module))
        )

    def stand_in(self, name: str, module: nn.Module) -> StandIn:
        if isinstance(module, LeanAttention):
            return LeanAttention(module.original())
        if type(module) in self._attention_classes():
            return LeanAttention(module)
        if is_registered(module):
            return LeanRegistered.from_attention(module)
        if isinstance(module, ExpertsGate):
            assert self.gated_bits is not None
            new = LeanExpertsGate(module.owner[0], module.in_turns, self.gated_bits)
            return new.train(module.training)
        if isinstance(module, nn.LayerNorm) and type(module) in (nn.LayerNorm, LeanLayerNorm):
            return LeanLayerNorm.from_norm(module)
        if other_kind_of(module) is not None:
            return LeanOtherLayerNorm.from_norm(module)
        if isinstance(module, nn.Dropout):
            return LeanDropout.from_dropout(module)
        if kind_of(module) is not None:
            return LeanRMSNorm.from_norm(module)
        if self.gated_bits is not None and gated.is_gated(module):
            return LeanGatedMLP.from_mlp(module, self.gated_bits)
        assert self.gelu_bits is not None
        if isinstance(module, nn.GELU):
            return LeanGELU.from_gelu(module, self.gelu_bits)
        if name_of(module) == "relu squared":
            return LeanReLUSquared.from_activation(module, self.gelu_bits)
        return LeanActivation.from_activation(module, self.gelu_bits)


def _is_norm(module: nn.Module) -> bool:
    if type(module) is nn.LayerNorm:
        return LeanLayerNorm.supports(module)
    return (
        type(module) is LeanLayerNorm
        or kind_of(module) is not None
        or other_kind_of(module) is not None
    )


def _is_activation(module: nn.Module) -> bool:
    return type(module) in (nn.GELU, LeanGELU) or is_few_bit(module)


def _is_dropout(module: nn.Module) -> bool:
    return type(module) is LeanDropout or (
        type(module) is nn.Dropout and LeanDropout.supports(module)
    )


def convert(model: nn.Module, **options: Any) -> list[str]:
    """Deprecated: `basis.convert(model, basis.Lean(...))`."""
    from basis.convert import convert

    warnings.warn(
        "basis.lean.convert(model, ...) is now basis.convert(model, basis.Lean(...))",
        DeprecationWarning,
        stacklevel=2,
    )
    return convert(model, Lean(**options))


def revert(model: nn.Module) -> list[str]:
    """Deprecated: `basis.revert(model)`, which reverts sketched and SUS modules too."""
    from basis.convert import put_back

    warnings.warn(
        "basis.lean.revert(model) is now basis.revert(model), which reverts sketched and SUS "
        "modules too",
        DeprecationWarning,
        stacklevel=2,
    )
    kinds = (LeanLayerNorm, LeanGELU, LeanAttention, LeanSubclass, LeanDropout, LeanExpertsGate)
    return put_back(model, kinds)
