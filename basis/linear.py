"""nn.Linear with a sketch of its input, and BASIS as a formula.

What both compute, what is exact and what is kept: sketched.py.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from basis.estimator import Estimator
from basis.estimators.balanced_sketch import BalancedSketch
from basis.exchange import take_over
from basis.ops.noise import draw_key, encode_hashing
from basis.ops.shared_noise import Passes
from basis.sketched import WANTED, Sketched, sketched_linear, wants_weight_grad


def basis_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rank: int,
    bins: Tensor | None = None,
    signs: Tensor | None = None,
    invariant_scalars: bool = True,
    shrinkage: float = 0.0,
) -> Tensor:
    """BASIS as a formula (arXiv 2604.16324, Algorithm 1), with the hashing in the caller's hands.

    input (..., N), leading dimensions are flattened to B rows; weight (M, N); bias (M,) or None.
    `bins` (B integers in [0, min(rank, B))) and `signs` (B values, +1 or -1) come together; without
    them a balanced hashing is drawn from PyTorch's default generator. Returns (..., M). Raises
    ValueError for options out of range, and for bins or signs that do not fit.
    """
    estimator = BalancedSketch(rank, invariant_scalars=invariant_scalars, shrinkage=shrinkage)
    if input.ndim == 0:
        raise ValueError("basis_linear: input has no dimension; it must be (..., N)")
    if (bins is None) != (signs is None):
        raise ValueError("basis_linear: bins and signs go together; give both or neither")
    if bins is None or signs is None:
        key = (
            draw_key(input.device)
            if wants_weight_grad(weight)
            else torch.zeros((), dtype=torch.int64)
        )
        return sketched_linear(input, weight, bias, key, estimator)
    if bins.is_floating_point():
        raise ValueError(f"basis_linear: bins must be integers, got {bins.dtype}")
    rows = input.numel() // max(input.shape[-1], 1)
    if bins.shape != (rows,) or signs.shape != (rows,):
        raise ValueError(
            f"basis_linear: bins {tuple(bins.shape)} and signs {tuple(signs.shape)} must have "
            f"shape ({rows},), one per row"
        )
    if (
        not torch.compiler.is_compiling() and rows > 0
    ):  # the values can't be looked at while a graph is traced
        effective = min(rank, rows)
        if not ((bins >= 0) & (bins < effective)).all():
            raise ValueError(f"basis_linear: bins must lie in [0, min(rank, B)) = [0, {effective})")
        if not (signs.abs() == 1).all():
            raise ValueError("basis_linear: signs must be +1 or -1")
    return sketched_linear(
        input, weight, bias, encode_hashing(bins, signs).to(input.device), estimator
    )


class SketchedLinear(Sketched, nn.Linear):
    """nn.Linear that keeps what `estimator` makes of its input instead of the input.

    Same parameters, same forward; the same state_dict, unless the estimator learns: then with what
    it has learned, in buffers named `estimator_<name>` (state.py). For `noise_key` see
    noise_key.py.

    As with nn.Linear, eval() changes nothing: where gradients are wanted they are the estimates of
    training, and a method that learns goes on learning. A model may be trained in eval(), to keep
    dropout off. Under torch.no_grad or inference_mode the layer is F.linear: nothing is kept, drawn
    or learned. So it is in graphs of torch.export and torch.jit.trace, made in eval().

    Raises TypeError if `estimator` is none.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        estimator: Estimator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(estimator, Estimator):
            raise TypeError(f"sketched linear: estimator must be {WANTED}, got {estimator!r}")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.estimator = estimator
        self.passes = (Passes(1), 0)
        self.forget()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "estimator" in vars(self):  # not yet, when nn.Linear's own constructor calls it
            self.forget()

    @classmethod
    def from_linear(cls, linear: nn.Linear, estimator: Estimator) -> SketchedLinear:
        """The same layer, sharing `linear`'s parameters (the very Parameter objects: optimisers and
        ties stay valid), hooks, buffers, submodules and attributes.

        Raises ValueError if the weight is not a parameter of its own but computed by a hook
        (old-style weight_norm), and where `take_over` does.
        """
        if linear._parameters.get("weight") is None:
            raise ValueError(
                "sketched linear: the layer's weight is computed by a hook, not a parameter"
            )
        new = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            estimator=estimator,
            device="meta",
        )
        new.forget(linear.weight.device)
        return take_over(new, linear)

    def original(self) -> nn.Linear:
        """The plain layer again, with this layer's parameters, hooks and whatever else it has."""
        return take_over(
            nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"),
            self,
        )

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return cast(Tensor, self.node(input))
        if self.for_inference():
            return F.linear(input, self.weight, self.bias)
        return self.product(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, estimator={self.estimator}"
