"""What a conversion left as it is: by name, with the number of weights and the reason.

`convert` is never silently without effect. It raises if nothing matches; if it changes less than
half of the weights that it might have changed, it warns (`warn_of_little`). What it might have
changed are all trained matrices, without embeddings, which look rows up and keep indices, and
without what it spares (sketch.py). Nothing is said to who names modules by `include`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from basis.exchange import Exchange, plainly_named
from basis.layers.sketch import Method, exchange_of

LOOK_UP = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Left:
    """A module with parameters that a conversion left as it was.

    name: its plain name in the model; kind: the name of its class; weights: numbers in its own
    parameters, 0 where they have no shape yet; why: the reason, for a reader.
    """

    name: str
    kind: str
    weights: int
    why: str


def left_alone(model: nn.Module, method: Method) -> list[Left]:
    """The modules of `model` with parameters of their own that stand in for no other, in the order
    of `model.named_modules()`: after `convert(model, method)`, what that left as it was.

    Raises TypeError for a `method` that `convert` does not take.
    """
    exchange = exchange_of(method)
    modules = dict(plainly_named(model))
    spared = exchange.spared(modules)
    left = []
    for name, module in modules.items():
        own = _own(module)
        if own and not (exchange.stands_in(module)):
            why = spared.get(name) or _reason(exchange, module)
            left.append(Left(name, type(module).__name__, _weights(own), why))
    return left


def _reason(exchange: Exchange, module: nn.Module) -> str:
    if exchange.accepts(module):
        return "left out by include or exclude"
    kind = type(module).__name__
    if why := exchange.why_not(module):
        return why.removeprefix(f"{kind}: ")
    if all(p.ndim < 2 for p in _own(module) if not is_lazy(p)):
        return "has vectors of weights only"
    return f"no {exchange.kind}"


def _own(module: nn.Module) -> list[Tensor]:
    """The parameters that are the module's own; of one with a parametrization, those that its
    weights are computed from too.
    """
    if isinstance(module, ParametrizationList):
        return []
    own: list[Tensor] = [p for p in module._parameters.values() if p is not None]
    if is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        own += module.parametrizations.parameters()
    return own


def _weights(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters if not is_lazy(p))


def warn_of_little(
    model: nn.Module, exchange: Exchange, passed_over: Iterable[nn.Module], stacklevel: int
) -> None:
    """Warn if less than half of the trained matrices of `model`, counted in weights, are in
    stand-ins of `exchange`. passed_over: modules that do not count.
    """
    changed: dict[int, Tensor] = {}
    left: dict[int, tuple[Tensor, str]] = {}
    ignored = {*passed_over}
    for _, module in plainly_named(model):
        for p in _own(module):
            if is_lazy(p) or p.ndim < 2 or not p.requires_grad or module in ignored:
                continue
            if exchange.stands_in(module):
                changed[id(p)] = p
            elif not isinstance(module, LOOK_UP):
                left[id(p)] = (p, exchange.why_not(module) or f"{type(module).__name__}")
    done = _weights(changed.values())
    kinds: Counter[str] = Counter()
    for key, (p, why) in left.items():
        if key not in changed:
            kinds[why] += p.numel()
    if done < kinds.total():
        share = done / (done + kinds.total())
        most = "; ".join(f"{why} ({n:,} weights)" for why, n in kinds.most_common(3))
        warnings.warn(
            f"convert: {share:.0%} of the model's trained matrix weights are in the layers changed;"
            f" left as they are: {most}. left_alone (from basis.convert) lists all of them",
            UserWarning,
            stacklevel=stacklevel,
        )
