"""Second derivatives are refused, by every layer and on every way to them; first ones are not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import basis
from basis.embedding import tied_embedding
from basis.estimator import Estimator
from basis.lean import (
    LeanActivation,
    LeanAttention,
    LeanDropout,
    LeanGatedMLP,
    LeanGELU,
    LeanLayerNorm,
    LeanRMSNorm,
)
from basis.linear import SketchedLinear, basis_linear
from basis.sus import SusAttention

REFUSED = r"second derivatives.*not supported.*basis\.revert, or exclude"


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Causal(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sketched(estimator: Estimator) -> SketchedLinear:
    torch.manual_seed(0)
    return SketchedLinear.from_linear(nn.Linear(4, 3), estimator)


def head_loss(x: Tensor) -> Tensor:
    head = nn.Linear(4, 5, bias=False)
    return basis.linear_cross_entropy(head, x, torch.tensor([0, 1, 2, 3, 4, 0]))


def tied_loss(x: Tensor) -> Tensor:
    rows, weight = tied_embedding(nn.Embedding(4, 4), torch.tensor([0, 1, 1]))
    assert weight is not None
    return (rows @ x.t()).sum() + weight.sum()


def heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = x.view(1, 1, 6, 4)
    return q, 2 * q, 3 * q


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": lambda x: sketched(basis.Exact())(x).sum(),
    "basis": lambda x: sketched(basis.BalancedSketch(2))(x).sum(),
    "subspace": lambda x: sketched(basis.Subspace(2))(x).sum(),
    "formula": lambda x: basis_linear(x, nn.Parameter(torch.ones(3, 4)), rank=2).sum(),
    "head": head_loss,
    "tied": tied_loss,
    "norm": lambda x: LeanLayerNorm(4)(x).sum(),
    "gelu": lambda x: LeanGELU()(x).sum(),
    "rms norm": lambda x: LeanRMSNorm.from_norm(nn.RMSNorm(4))(x).sum(),
    "silu": lambda x: LeanActivation.from_activation(nn.SiLU(), 2)(x).sum(),
    "gated": lambda x: LeanGatedMLP.from_mlp(Gated(), 4)(x).sum(),
    "dropout": lambda x: LeanDropout(0.5)(x).sum(),
    "sus": lambda x: SusAttention(Causal(), c=2)(*heads(x)).sum(),
    "lean attention": lambda x: LeanAttention(Causal())(*heads(x)).sum(),
}
every_layer = pytest.mark.parametrize("name", LOSSES)


def rows() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()


@every_layer
@pytest.mark.parametrize("cubed", [False, True])
def test_a_graph_of_backward_is_refused(name: str, cubed: bool) -> None:
    """Also where the incoming gradient is a constant, which once_differentiable lets pass."""
    # Of attention the plain kernel: PyTorch itself refuses to differentiate the fused one twice.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = LOSSES[name](rows().sin())
        with pytest.raises(RuntimeError, match=REFUSED):
            (loss.pow(3) if cubed else loss).backward(create_graph=True)
        LOSSES[name](rows().sin()).backward(retain_graph=True)


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if name not in ("tied", "lean attention")]
)
def test_nested_transforms_are_refused(name: str) -> None:
    """tied_embedding is PyTorch's own there, and the hooks of lean attention are refused by it."""
    f = LOSSES[name]
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.func.grad(lambda t: torch.func.grad(f)(t).pow(2).sum())(rows().detach())


def test_hessians_and_gradient_penalties_are_refused() -> None:
    layer, x = sketched(basis.Exact()), rows()

    def f(t: Tensor) -> Tensor:
        return layer(t).tanh().sum()

    for second in (
        torch.autograd.functional.hessian,
        lambda f, x: torch.autograd.functional.hvp(f, x, x),
    ):
        with pytest.raises(RuntimeError, match=REFUSED):
            second(f, x)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(f(x), x, create_graph=True)
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(f, x), torch.autograd.grad(f(x), x)[0]
    )


@pytest.mark.parametrize("of", ["x", "weight"])
@pytest.mark.parametrize("transform", ["grad", "vjp"])
def test_a_derivative_of_a_transform_is_refused_and_the_transform_is_not(
    of: str, transform: str
) -> None:
    """The loss is linear: dW depends on x through what is kept alone, and on W not at all."""
    layer, x = sketched(basis.Exact()), rows()
    parameters = dict(layer.named_parameters())

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, p, (x,)).sum()

    if transform == "grad":
        gradient = torch.func.grad(loss)(parameters)["weight"]
    else:
        _, vjp = torch.func.vjp(loss, parameters)
        gradient = vjp(torch.ones(()))[0]["weight"]
    torch.testing.assert_close(gradient, x.sum(0).expand(3, 4))
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(gradient.square().sum(), x if of == "x" else layer.weight)


def test_a_jacobian_by_torch_func_is_that_of_linear() -> None:
    layer, x = sketched(basis.Exact()), rows().detach()
    plain = layer.original()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    got, expected = (
        torch.func.jacrev(lambda p, m=m: torch.func.functional_call(m, p, (x,)))(parameters)
        for m in (layer, plain)
    )
    torch.testing.assert_close(got, expected)


def test_a_frozen_layer_keeps_nothing_and_has_second_derivatives() -> None:
    layer, x = sketched(basis.BalancedSketch(2)).requires_grad_(False), rows()
    plain = layer.original()
    got, expected = (
        torch.autograd.functional.hessian(lambda t, m=m: m(t).pow(3).sum(), x)
        for m in (layer, plain)
    )
    torch.testing.assert_close(got, expected)
