"""Experts of a mixture (transformers 5): two products, each with E weights in one 3-D Parameter.

A token goes to k of E experts, so T tokens make S = k T rows. They are sorted by expert; expert e
then has a segment X_e of n_e rows, and

    Y_e = X_e W_e^T,   dX_e = dY_e W_e,   dW_e = dY_e^T X_e

Y and dX are exact, and what is kept of each X_e is what the method makes of it: a sketch per
segment, with noise of its own, so that dW_e is what the method would give a dense layer on X_e. A
method whose rank counts rows (an R-row sketch) keeps R of T rows in a dense layer of the same
model, and here the same share of each segment, ceil(n_e R / T) rows; but 8 at least, or all where a
segment has no more. All other options are the method's own. What it learns it learns from all
segments together.

Rows are gathered by their index, which is all that is kept of that. For the gradient of the routing
weights the rows that experts return are kept (routed.py), and the gate between the two products
keeps what it does in the plain module; unless `basis.Lean` has replaced the activation in it: then
both keep 4 bits a number, the gate as a gated MLP does (lean/gated.py). A gate of the experts' own,
such as that of gpt-oss, is a submodule here, so that `basis.Lean` can replace it too, after this
(lean/experts_gate.py).

Sizes of segments are looked at on the host once a forward, as in transformers' own plain forward. A
sketch per segment has as many rows as the segment, so torch.compile breaks its graph there. For a
method that keeps each row by itself, `Quantized`, one sketch of all rows serves all segments, and
the experts are part of a graph (grouped.py). Many small experts are many small products.

The module has a forward of its own instead of an entry in transformers' registry of experts'
functions: that is chosen by the model's configuration, for all layers at once, and would be saved
with it. So `model.set_experts_implementation` is without effect while the module is sketched, in
training; where no gradient is wanted the plain forward runs, whichever was chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from basis.estimator import Estimator
from basis.estimators.quantized import Quantized
from basis.exchange import StandInOfClass, standing_in, take_over
from basis.layers.grouped import grouped_linear
from basis.layers.routed import sum_of_experts
from basis.lean.activation import LeanActivation
from basis.lean.experts_gate import ExpertsGate, LeanExpertsGate, own_gate
from basis.lean.gated import gated
from basis.ops import shapes
from basis.ops.matrix import cast_for_autocast, has_values
from basis.ops.noise import combine, derive
from basis.ops.shared_noise import Passes
from basis.sketched import Sketched, sketched_linear, wants_weight_grad

SKETCHES = {"gate_up_proj": "gate_up_sketch", "up_proj": "up_sketch", "down_proj": "down_sketch"}
"""The Parameter of a product -> the submodule that keeps for it."""


class Counted(NamedTuple):
    """counts: rows of each expert. tokens: T, by which a method's rank counts."""

    counts: list[int]
    tokens: int


class Grouped(NamedTuple):
    """rows (S, N): those of experts, which are `places` (S,) of what is kept; ends (E,): where
    those of each expert end, on the host.
    """

    rows: Tensor
    places: Tensor
    ends: Tensor


GATE = "own_gate"
"""The submodule that stands for a gate other than the one that most mixtures have."""


class ExpertProduct(Sketched):
    """One product of sketched experts. It has no parameters: its weights are the experts' own."""

    def __init__(self, owner: nn.Module, parameter: str, estimator: Estimator) -> None:
        super().__init__()
        self.owner = (owner,)  # in a tuple, so that it does not count as a submodule
        self.parameter, self.estimator = parameter, estimator
        self.in_features = as_linear(owner, parameter).in_features
        self.passes = (Passes(1), 0)
        self.forget()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(E, M, N), or (E, N, M) where the experts are transposed."""
        return cast(Tensor, getattr(self.owner[0], self.parameter))

    def original(self) -> nn.Module:
        raise ValueError("a product of experts stands for no module; revert the experts")

    def forward(self, x: Tensor, segments: Counted | Grouped) -> Tensor:
        """The rows of experts, sorted by expert, times their weights: (S, M). x: what is kept in
        few bytes, these rows (S, N), or with `Grouped` what they are taken from.
        """
        if isinstance(segments, Grouped):
            return self._grouped(x, *segments)
        counts, tokens = segments
        x = cast_for_autocast(x)
        owner = self.owner[0]
        weights = self.weight.mT if owner.is_transposed else self.weight
        biases = getattr(owner, f"{self.parameter}_bias") if owner.has_bias else None
        key = self.key_for(x)
        wanted = wants_weight_grad(self.weight) and has_values(x)
        state = self.learn(x, key) if wanted else self.state
        experts = torch.arange(len(counts), dtype=torch.int64, device=x.device)
        parts = list(
            zip(
                x.split(counts),
                weights.unbind(),
                [None] * len(counts) if biases is None else biases.unbind(),
                combine(key, experts).unbind(),
                strict=True,
            )
        )
        busy = [part for part in parts if len(part[0])] or parts[:1]
        methods = self.estimator.for_parts([len(part[0]) for part in busy], tokens)
        return torch.cat(
            [
                sketched_linear(*part, method, state)
                for part, method in zip(busy, methods, strict=True)
            ]
        )

    def _grouped(self, source: Tensor, x: Tensor, index: Tensor, ends: Tensor) -> Tensor:
        """The same for x = source[index], with a sketch of `source` (grouped.py)."""
        x, source = cast_for_autocast(x), cast_for_autocast(source)
        owner = self.owner[0]
        weights = self.weight.mT if owner.is_transposed else self.weight
        biases = getattr(owner, f"{self.parameter}_bias") if owner.has_bias else None
        method = cast(Quantized, self.estimator)
        return grouped_linear(x, weights, biases, source, index, ends, self.key_for(x), method)

    def extra_repr(self) -> str:
        experts, out, width = self.weight.shape
        return f"{experts} experts, {(out, width)}, estimator={self.estimator}"


def _counts(expert: Tensor, experts: int) -> list[int]:
    """Rows of each expert. Of tensors that have no values as many for each: a plan of bytes."""
    if shapes.counts(expert):
        return [len(part) for part in expert.tensor_split(experts)]
    counts: list[int] = torch.bincount(expert, minlength=experts)[:experts].tolist()
    return counts


class SketchedExperts(StandInOfClass):
    """Experts that keep a sketch of each segment of their inputs. Same Parameters, same
    state_dict; what a method learns is in buffers of two submodules.
    """

    has_gate: bool
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    @property
    def own_names(self) -> frozenset[str]:
        return frozenset({*SKETCHES.values(), GATE})

    def settle(self) -> None:
        for part in self.children():
            if isinstance(part, ExpertProduct | ExpertsGate):
                part.owner = (self,)

    @property
    def _is_lean(self) -> bool:
        """Whether `basis.Lean` has replaced the activation, or a gate of the experts' own."""
        own = isinstance(self._modules.get(GATE), LeanExpertsGate)
        return own or isinstance(getattr(self, "act_fn", None), LeanActivation)

    @property
    def _keeps_rows(self) -> bool:
        """Whether both products keep each row by itself: they then are part of a graph."""
        parts = (getattr(self, SKETCHES[name]) for name in matrices(self))
        plain = not getattr(self, "has_post_expert_norm", False)
        return plain and all(isinstance(part.estimator, Quantized) for part in parts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, H); top_k_index (T, k): experts, E for none; top_k_weights (T, k)."""
        inputs = (hidden_states, top_k_index, top_k_weights)
        if isinstance(hidden_states, Proxy):
            return cast(Tensor, self.node(*inputs))
        first, second = (getattr(self, SKETCHES[name]) for name in matrices(self))
        exact = not any(wants_weight_grad(part.weight) for part in (first, second))
        if exact or self.for_inference() or not has_values(hidden_states):
            for part in (first, second):
                part.key_for(hidden_states)  # a reentrant checkpoint: see Sketched._draws
                if self._is_lean:
                    part.pass_without_grad(hidden_states.device)
            return cast(Tensor, super().forward(*inputs))
        if torch.compiler.is_compiling() and not self._keeps_rows:
            return cast(Tensor, torch.compiler.disable(self._sketched)(*inputs))
        return self._sketched(*inputs)

    def _sketched(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        first, second = (getattr(self, SKETCHES[name]) for name in matrices(self))
        tokens, k = top_k_index.shape
        expert, order = top_k_index.flatten().sort(stable=True)
        many = len(first.weight)
        if self._keeps_rows:
            numbers = torch.arange(many, device=expert.device)
            ends = torch.searchsorted(expert, numbers, right=True).cpu()
            rows = order // k
            h = first(hidden_states, Grouped(hidden_states[rows], rows, ends))
            h = self._gated(h, first) if self.has_gate else self.act_fn(h)
            y = second(h.detach()[order.argsort()], Grouped(h, order, ends))
        else:
            counts = _counts(expert, many)
            order = order[: sum(counts)]  # what goes to no expert is sorted to the end
            h = first(hidden_states[order // k], Counted(counts, tokens))
            h = self._gated(h, first) if self.has_gate else self.act_fn(h)
            y = second(h, Counted(counts, tokens))
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        key = None
        if self._is_lean and y.numel() > 0:
            key = derive(second.fixed_or_fresh_key(y.device), 1)
        return sum_of_experts(y, top_k_weights, order, hidden_states.dtype, key)

    def _gated(self, h: Tensor, first: ExpertProduct) -> Tensor:
        """The gate and what it lets through (S, 2 I) -> (S, I); in few bits where the activation is
        a lean one, and the gate is the one that most mixtures have.
        """
        if (own := self._modules.get(GATE)) is not None:
            return cast(Tensor, own(h))
        is_default = type(self)._apply_gate.__name__ == "_default_apply_gate"
        if not (is_default and self._is_lean):
            return self._apply_gate(h)
        gate, up = h.chunk(2, -1)
        key = derive(first.fixed_or_fresh_key(h.device), 1)
        return gated(gate, up, key, cast(LeanActivation, self.act_fn).lean_name)


def matrices(module: nn.Module) -> tuple[str, str]:
    """The Parameters of the two products of `module`, an experts module."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is an experts module of transformers (one that is made for its registry of
    experts' functions), or stands in for one.
    """
    options = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")
    if not (hasattr(module, "_apply_gate") and all(name in vars(module) for name in options)):
        return False
    parameters = [module._parameters.get(name) for name in matrices(module)]
    return all(p is not None and p.ndim == 3 for p in parameters)


def why_not(module: nn.Module) -> str | None:
    """Why `module`, which has parameters of three dimensions, is no experts module to sketch."""
    if is_experts(module) and getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over several processes"
    return None


def as_linear(module: nn.Module, parameter: str) -> nn.Linear:
    """An nn.Linear of the size of one expert's product, without memory."""
    _, out, width = module.get_parameter(parameter).shape
    if module.is_transposed:
        out, width = width, out
    return nn.Linear(width, out, bias=bool(module.has_bias), device="meta")


def sketched_experts(
    module: nn.Module, choose: Callable[[str, nn.Linear], Estimator]
) -> SketchedExperts:
    """What stands in for `module`, an experts module, with the same Parameters. choose: gives the
    method for a product, from the name of its Parameter and an expert's size.

    Raises ValueError for a method that needs the same rows in each step.
    """
    chosen = {name: choose(name, as_linear(module, name)) for name in matrices(module)}
    for estimator in chosen.values():
        if estimator.state_replaces_input:
            raise ValueError(
                f"{type(estimator).__name__} pairs the rows of each step with those before, and an "
                "expert's rows are others each time; exclude it, or choose another method"
            )
    new = take_over(standing_in(SketchedExperts, module), module)
    for name, estimator in chosen.items():
        setattr(new, SKETCHES[name], ExpertProduct(new, name, estimator))
    if (gate := own_gate(new)) is not None:
        before = module._modules.get(GATE)
        if isinstance(before, LeanExpertsGate):
            gate = LeanExpertsGate(new, gate.in_turns, before.bits).train(new.training)
        setattr(new, GATE, gate)
    return new
