"""Training steps of a GPT with every method, activations and attention, on any device: the cases
that tests of devices go through.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import basis
from basis.estimators import ESTIMATORS
from basis.ops.noise import fold
from basis.sus import SusAttention
from harness import activations
from harness.activations import ActivationsOptions
from harness.optim import OptimOptions, make_optimizer
from harness.zeroth_order import ZerothOrder
from models import GPT
from models.gpt import CausalAttention

METHODS: dict[str, dict[str, Any]] = {
    "exact": {},
    "basis": {"rank": 32},
    "basis, R = 1": {"rank": 1},
    "basis, uniform": {"rank": 8, "hashing": "uniform"},
    "basis, centred": {"rank": 8, "center": True},
    "count_sketch": {"rank": 8},
    "gaussian": {"rank": 8},
    "row_sampling": {"rows": 8},
    "row_sampling, wta_crs": {"rows": 8, "scheme": "wta_crs"},
    "quantized": {"bits": 4},
    "quantized, 2.5 bits": {"bits": 2.5},
    "low_rank": {"rank": 4},
    "subspace": {"rank": 4},
    "transform": {"bits": 1.25},
    "ema_sketch": {"rank": 2, "rows": 64},
}
"""Options of every estimator; what stands before the comma is its name."""
ZEROTH_ORDER = "zeroth_order"


@dataclass(frozen=True)
class Case:
    method: str
    kept: ActivationsOptions = field(default_factory=ActivationsOptions)
    sus: bool = False

    @property
    def name(self) -> str:
        kept = self.kept.name + (" selective" if self.kept.selective else "")
        kept += "" if self.kept.boundary is None else f" {self.kept.boundary} bits"
        bits = f" {self.kept.gelu_bits}" if self.kept.name == "lean" else ""
        return f"{self.method}; {kept}{bits}; {'sus' if self.sus else 'exact'}"


LEAN = ActivationsOptions(name="lean")
KEPT = [
    LEAN,
    ActivationsOptions(name="lean", gelu_bits=4),
    ActivationsOptions(name="checkpoint"),
    ActivationsOptions(name="checkpoint", selective=True),
    ActivationsOptions(name="checkpoint", boundary=8),
    ActivationsOptions(name="checkpoint", boundary=4),
    ActivationsOptions(name="recompute"),
]
CASES = [
    *(Case(method) for method in METHODS),
    *(Case("basis", kept) for kept in KEPT),
    *(Case("exact", kept) for kept in KEPT),
    Case("exact", sus=True),
    Case("basis", LEAN, sus=True),
    Case("transform", LEAN),
    Case(ZEROTH_ORDER),
]


class Steps:
    """`model` with the method of `case`, and its training steps by number; the batch is the same
    in all, the noise is a function of that number.
    """

    def __init__(self, case: Case, model: GPT, *, optim: str = "sgd") -> None:
        self.case = case
        self.model = model
        self.run: Any = model  # or a compiled form of it
        if case.method not in ("exact", ZEROTH_ORDER):
            estimator = ESTIMATORS[case.method.partition(",")[0]](**METHODS[case.method])
            basis.convert(model, estimator)
        if case.sus:
            basis.convert(model, basis.SUS(CausalAttention, c=4.0))
        activations.apply(model, case.kept)
        assert not case.sus or any(isinstance(m, SusAttention) for m in model.modules())
        self.optimizer = make_optimizer(model, OptimOptions(name=optim, lr=0.01))
        generator = torch.Generator().manual_seed(1)
        classes = model.head.out_features
        size = (1, model.config.block_size + 1)
        tokens = torch.randint(classes, size, generator=generator)
        self.tokens = tokens.to(model.head.weight.device)

    def gradients(self, number: int) -> Tensor:
        """The loss of a step, whose gradients are then in the parameters."""
        inputs, targets = self.tokens[:, :-1], self.tokens[:, 1:]

        def loss() -> Tensor:
            basis.set_noise_key(self.model, seed=0, step=number)
            found: Tensor = self.run(inputs, targets)
            return found

        if self.case.method == ZEROTH_ORDER:
            return ZerothOrder().add_gradient(self.model, loss, fold("zeroth order", number))
        found = loss()
        found.backward()
        return found.detach()

    def __call__(self, number: int) -> Tensor:
        loss = self.gradients(number)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss
