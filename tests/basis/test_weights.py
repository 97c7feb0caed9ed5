"""Weights that are more than a layer's own Parameter: shared, tied, parametrised, without bias or
of several projections in one.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import basis

ALL_KEPT = (basis.Exact(), basis.BalancedSketch(64, invariant_scalars=False))
SKETCH = basis.BalancedSketch(8, invariant_scalars=False)
ROWS = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))


class Shared(nn.Module):
    """Two layers, one Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Tied(nn.Module):
    """A head with the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.words(torch.arange(48) % 12) + x)))


class Fused(nn.Module):
    """q, k and v in one product, gate and up in another, both without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate_up = nn.Linear(8, 24, bias=False), nn.Linear(8, 32, bias=False)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(0, (4, 12)).chunk(3, -1)
        h = F.scaled_dot_product_attention(q, k, v).flatten(0, 1)
        gate, up = self.gate_up(x + h).chunk(2, -1)
        return self.down(F.silu(gate) * up)


MODELS: dict[str, Callable[[], nn.Module]] = {"shared": Shared, "tied": Tied, "fused": Fused}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    x = ROWS.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    own = {name: p.grad for name, p in model.named_parameters()}
    return {"output": y.detach(), "input": x.grad, **own}


@pytest.mark.parametrize("kind", MODELS)
def test_a_method_that_keeps_all_gives_the_plain_gradients(kind: str) -> None:
    plain = gradients(made(kind))
    for method in ALL_KEPT:
        model = made(kind)
        basis.convert(model, method, exact_if_kept=False)
        torch.testing.assert_close(gradients(model), plain)
        assert model.state_dict().keys() == made(kind).state_dict().keys()


@pytest.mark.parametrize("kind", MODELS)
def test_a_sketch_is_unbiased_and_all_else_exact(kind: str) -> None:
    plain, model = gradients(made(kind)), made(kind)
    basis.convert(model, SKETCH, exact_if_kept=False)
    draws = []
    for step in range(200):
        basis.set_noise_key(model, seed=0, step=step)
        draws.append(gradients(model))
    for name, wanted in plain.items():
        stack = torch.stack([draw[name] for draw in draws])
        if name in ("output", "input") or name.endswith("bias"):
            torch.testing.assert_close(stack[0], wanted)
            continue
        z = (stack.mean(0) - wanted) / (stack.std(0) / len(draws) ** 0.5)
        assert stack.std(0).min() > 0, name
        assert z.square().mean() < 1.7, name


@pytest.mark.parametrize("kind", ["shared", "tied"])
def test_one_parameter_stays_one_and_an_optimiser_moves_it_once(kind: str) -> None:
    model = made(kind)
    number = len(list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    basis.convert(model, basis.Exact())
    pair = (model.a, model.b) if kind == "shared" else (model.words, model.head)
    before, grad = pair[0].weight.detach().clone(), gradients(model)
    optimizer.step()
    assert len(list(model.parameters())) == number
    assert pair[0].weight is pair[1].weight
    name = "a.weight" if kind == "shared" else "words.weight"
    torch.testing.assert_close(pair[0].weight, before - 0.1 * grad[name])
    basis.revert(model)
    assert pair[0].weight is pair[1].weight


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


@pytest.mark.parametrize(
    "put_on",
    [
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()),
    ],
    ids=["weight norm", "orthogonal", "scaled"],
)
def test_a_parametrization_put_on_a_sketched_layer_gets_the_gradient_of_what_it_computes(
    put_on: Callable[[nn.Module], object],
) -> None:
    found = []
    for method in (None, *ALL_KEPT, SKETCH):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        if method is not None:
            basis.convert(model, method, exact_if_kept=False)
        put_on(model[0])
        with torch.no_grad():
            for p in model[0].parametrizations.parameters():
                p.add_(0.1)  # off the point at which it was put on
        found.append(gradients(model))
    plain, *kept, sketched = found
    for other in kept:
        torch.testing.assert_close(other, plain)
    torch.testing.assert_close(sketched["output"], plain["output"])
    torch.testing.assert_close(sketched["input"], plain["input"])
    name = next(name for name in plain if "parametrizations" in name)
    assert not torch.allclose(sketched[name], plain[name])
