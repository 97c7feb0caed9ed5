"""transformers' Conv1D, the dense layer of GPT-2: its weight is (in, out), Y = X W + b.

It is SketchedLinear with W^T for the weight: dX = dY W^T and the bias gradient stay exact, dW = X^T
dY is the estimate, transposed. W^T is a view, so it costs no bytes; the estimate of dW comes as
(out, in), and autograd copies it into the layout of the Parameter. A method sees the same X, and
keeps of it what it would keep in an nn.Linear.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.fx import Proxy

from basis.estimator import Estimator
from basis.exchange import StandInOfClass, standing_in, take_over
from basis.ops.shared_noise import Passes
from basis.sketched import Sketched


class SketchedConv1D(StandInOfClass, Sketched):
    """Conv1D that keeps what `estimator` makes of its input instead of the input. Same parameters,
    same forward, same state_dict as SketchedLinear has them.
    """

    weight: Tensor
    bias: Tensor | None
    out_features: int

    @property
    def own_names(self) -> frozenset[str]:
        return super().own_names | {"in_features", "out_features"}

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return cast(Tensor, self.node(x))
        if self.for_inference():
            return cast(Tensor, super().forward(x))
        return self.product(x, self.weight.t(), self.bias)

    __repr__ = nn.Module.__repr__  # the plain class's names its own attributes

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"estimator={self.estimator}"
        )


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is a Conv1D of transformers, or stands in for one."""
    if isinstance(module, SketchedConv1D):
        return True
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def sketched_conv1d(module: nn.Module, estimator: Estimator) -> SketchedConv1D:
    """What stands in for `module`, a Conv1D, with the same Parameters."""
    new = standing_in(SketchedConv1D, module)
    assert isinstance(module.weight, Tensor)
    new.in_features, new.out_features = module.weight.shape
    new.estimator, new.passes = estimator, (Passes(1), 0)
    new.forget(module.weight.device)
    return take_over(new, module)


def as_linear(module: nn.Module) -> nn.Linear:
    """An nn.Linear of the size of `module`, a Conv1D, without memory."""
    assert isinstance(module.weight, Tensor)
    width, out = module.weight.shape
    return nn.Linear(width, out, bias=module.bias is not None, device="meta")
