"""Which modules are dense layers, and what `basis.convert(model, estimator)` puts in their place.

    nn.Linear                           SketchedLinear
    its subclasses with its forward     SketchedSubclass (linear_subclass.py)
    transformers' Conv1D                SketchedConv1D (conv1d.py)
    experts of a mixture                SketchedExperts (experts.py)
    nn.MultiheadAttention               SketchedAttention (attention.py)

A layer is left as it is if its weight is frozen: it keeps nothing of its input anyway, and what a
method learns would be bytes for nothing. So is, unless it is asked for by name, one whose input is
so narrow beside the others' that there is nothing to save, such as lora_B of an adapter: its input
has as many features as the adapter has ranks, and a sketch would bring noise into the one gradient
that is nearly free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from basis.estimator import Estimator
from basis.exchange import Exchange, StandIn, is_sharded_itself
from basis.layers import attention, conv1d, experts, linear_subclass
from basis.linear import SketchedLinear
from basis.sketched import WANTED, Sketched

NARROW = 256
"""in_features up to which a layer may count as narrow."""
WIDER = 16
"""How many times as wide as a narrow layer's the widest input of the model is."""

Chosen = Callable[[str, nn.Linear], Estimator]
Method = Exchange | Estimator | Chosen
"""What `convert` takes."""


def exchange_of(method: Method) -> Exchange:
    """The exchange that `method` means. Raises TypeError for what `convert` does not take."""
    if isinstance(method, Exchange):
        return method
    if isinstance(method, type) or not (isinstance(method, Estimator) or callable(method)):
        raise TypeError(
            f"convert: method must be {WANTED}, a basis.Lean or basis.SUS, or a function of a "
            f"layer's name and the layer that returns an estimator; got {method!r}"
        )
    return Sketch(method)


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, SketchedLinear)


def _is_dense(module: nn.Module) -> bool:
    """Whether `module` is of a class that has a stand-in."""
    if experts.is_experts(module):
        return experts.why_not(module) is None
    if attention.is_attention(module):
        return attention.why_not(module) is None
    return _is_linear(module) or conv1d.is_conv1d(module) or linear_subclass.is_subclass(module)


def width_of(module: nn.Module) -> int:
    """Features of the widest input of a dense layer, an expert or an attention."""
    if isinstance(module, nn.Linear | Sketched):
        return module.in_features
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim
    if experts.is_experts(module):
        return max(experts.as_linear(module, p).in_features for p in experts.matrices(module))
    return conv1d.as_linear(module).in_features


def is_frozen(module: nn.Module) -> bool:
    """Whether no matrix of `module`'s own is trained."""
    matrices = [p for p in module._parameters.values() if p is not None and p.ndim > 1]
    return bool(matrices) and not any(p.requires_grad for p in matrices)


@dataclass(frozen=True)
class Sketch(Exchange):
    """Dense layers for sketched ones. estimator: as `convert` takes it."""

    kind: ClassVar[str] = "dense layer"

    estimator: Estimator | Chosen

    def accepts(self, module: nn.Module) -> bool:
        return _is_dense(module) and not is_frozen(module) and not is_sharded_itself(module)

    def stands_in(self, module: nn.Module) -> bool:
        return isinstance(module, Sketched | experts.SketchedExperts)

    def stand_in(self, name: str, module: nn.Module) -> StandIn:
        if linear_subclass.is_subclass(module):
            assert isinstance(module, nn.Linear)
            return linear_subclass.sketched_subclass(module, self._chosen(name, module))
        if isinstance(module, nn.Linear):
            return SketchedLinear.from_linear(module, self._chosen(name, module))
        if experts.is_experts(module):
            return experts.sketched_experts(
                module, lambda product, layer: self._chosen(f"{name}.{product}", layer)
            )
        if attention.is_attention(module):
            return attention.sketched_attention(name, module, self._chosen)
        return conv1d.sketched_conv1d(module, self._chosen(name, conv1d.as_linear(module)))

    def _chosen(self, name: str, layer: nn.Linear) -> Estimator:
        """The estimator of the layer called `name`; `layer` tells its size."""
        if isinstance(self.estimator, Estimator):
            return self.estimator
        estimator = self.estimator(name, layer)
        if not isinstance(estimator, Estimator):
            raise TypeError(
                f"convert: the function must return {WANTED}; for {name} it gave {estimator!r}"
            )
        return estimator

    def spared(self, modules: Mapping[str, nn.Module]) -> dict[str, str]:
        dense = {name: width_of(module) for name, module in modules.items() if _is_dense(module)}
        widest = max(dense.values(), default=0)
        return {
            name: f"its input has {width} features where others have {widest}: nothing to save"
            for name, width in dense.items()
            if width <= NARROW and width * WIDER <= widest and self.accepts(modules[name])
        }

    def parts(self, module: nn.Module) -> tuple[str, ...]:
        if experts.is_experts(module):
            return tuple(experts.SKETCHES[name] for name in experts.matrices(module))
        return ("out_proj",) if attention.is_attention(module) else ()

    def why_not(self, module: nn.Module) -> str | None:
        kind = type(module).__name__
        if self.accepts(module):
            return None
        if is_sharded_itself(module):
            matrix = any(p is not None and p.ndim > 1 for p in module._parameters.values())
            return f"{kind}: was given to fully_shard itself; convert first" if matrix else None
        if _is_dense(module):
            return f"{kind}: frozen, so it keeps nothing of its input"
        if isinstance(module, nn.LazyLinear):
            return f"{kind}: has no weight before its first forward"
        if nn.utils.parametrize.is_parametrized(module) and isinstance(module, nn.Linear):
            return f"{kind}: its weight is computed by a parametrization"
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return f"{kind}: the attention around it uses its weight, and does not call it"
        if isinstance(module, nn.Linear):
            return f"{kind}: a subclass of nn.Linear, whose own forward would be lost"
        if any(p is not None and p.ndim > 1 for p in module._parameters.values()):
            return f"{kind}: {_other_reason(module)}"
        return f"{kind}: no nn.Linear" if "Linear" in kind or kind == "Conv1D" else None


def _other_reason(module: nn.Module) -> str:
    """Why a module with a matrix of its own is no dense layer."""
    if isinstance(module, nn.MultiheadAttention):
        return attention.why_not(module) or ""
    if experts.is_experts(module):
        return experts.why_not(module) or ""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "looks rows up, and keeps indices only"
    return "a forward of its own around its weights"
