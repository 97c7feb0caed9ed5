"""Subclasses of nn.Linear that inherit its forward are sketched, and are of their class again."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import basis
from basis.convert import left_alone
from basis.layers.linear_subclass import SketchedSubclass, _bias_after, _computes

METHOD = basis.BalancedSketch(6)


class Named(nn.Linear):
    """Somebody's class, with a start of its own and one thing more."""

    def __init__(self, width: int, out: int, purpose: str) -> None:
        super().__init__(width, out)
        self.purpose = purpose

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.1)
        nn.init.zeros_(self.bias)

    def size(self) -> int:
        return self.weight.numel()


class Counting(nn.Linear):
    """A forward of somebody's own, which does more than its output tells."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)


class Late(nn.Linear):
    """As Falcon's: rounds before the bias comes."""

    def forward(self, input: Tensor) -> Tensor:
        return _bias_after(input, self.weight, self.bias)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Named(16, 24, "first"), nn.GELU(), Named(24, 8, "last"))


def gradients(of: nn.Module, x: Tensor) -> list[Tensor]:
    of.zero_grad()
    of(x).square().sum().backward()
    return [p.grad.clone() for p in of.parameters() if p.grad is not None]


def test_it_is_to_a_method_what_nn_linear_is_and_of_its_class_throughout() -> None:
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    some, plain = model(), nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))
    plain.load_state_dict(some.state_dict())
    exact = gradients(some, x)
    for of in (some, plain):
        assert basis.convert(of, METHOD) == ["0", "2"]
        basis.set_noise_key(of, seed=0, step=0)
    layer = some[0]
    assert isinstance(layer, Named)
    assert isinstance(layer, SketchedSubclass)
    assert (layer.purpose, layer.size()) == ("first", 16 * 24)
    assert torch.equal(some(x), plain(x))
    found, wanted = gradients(some, x), gradients(plain, x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not torch.allclose(found[0], exact[0], rtol=0.1)
    for again in (pickle.loads(pickle.dumps(some)), copy.deepcopy(some)):
        assert all(torch.equal(a, b) for a, b in zip(gradients(again, x), found, strict=True))
    basis.revert(some)
    assert type(some[0]) is Named
    assert vars(some[0]).keys() == vars(model()[0]).keys()
    assert all(torch.equal(a, b) for a, b in zip(gradients(some, x), exact, strict=True))


def test_what_else_is_a_subclass_is_left_with_the_reason() -> None:
    own, normed = Counting(16, 16), nn.utils.parametrizations.weight_norm(Named(16, 16, "normed"))
    frozen = Named(16, 16, "frozen").requires_grad_(False)
    some = nn.ModuleDict(
        {"own": own, "normed": normed, "frozen": frozen, "dense": Named(16, 8, "")}
    )
    with pytest.warns(UserWarning, match="trained matrix weights"):
        assert basis.convert(some, METHOD) == ["dense"]
    why = {left.name: left.why for left in left_alone(some, METHOD)}
    assert why["own"] == "a subclass of nn.Linear, whose own forward would be lost"
    assert "parametrization" in why["normed"]
    assert "frozen" in why["frozen"]


def test_the_formula_is_told_by_trying() -> None:
    """In float32 both formulas give the same here; in bfloat16 the late bias rounds once more."""
    assert _computes(Named, F.linear, torch.bfloat16)
    assert not _computes(Named, _bias_after, torch.bfloat16)
    assert _computes(Late, _bias_after, torch.bfloat16)
    assert not _computes(Late, F.linear, torch.bfloat16)

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 0.5

    for formula in (F.linear, _bias_after):
        assert not _computes(Scaled, formula, torch.float32)
