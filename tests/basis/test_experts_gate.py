"""Gates of experts' own: told by their Jacobian; exact forward; an unbiased gradient."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lookalikes import Experts, Mixture
from torch import Tensor

import basis
from basis.layers.experts import SketchedExperts
from basis.lean import experts_gate
from basis.lean.experts_gate import ExpertsGate, LeanExpertsGate, own_gate


class Clamped(Experts):
    """As gpt-oss: g and u in turns, both clamped, u + 1 times a SiLU of another slope."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.act_fn
        self.limit = 1.5

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)


class SideBySide(Clamped):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate.clamp(max=self.limit).sigmoid() * up


class Mixed(Clamped):
    """Each number depends on all of its row."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate.softmax(-1) * up


class AcrossRows(Clamped):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return super()._apply_gate(gate_up) * gate_up.mean()


def mixture() -> Mixture:
    torch.manual_seed(0)
    model = Mixture()
    model.experts = Clamped(bias=True, transposed=True)
    return model


def rows() -> Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


def step(model: Mixture) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    x = rows().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in model.named_parameters()}


def test_gates_are_told_by_what_depends_on_what() -> None:
    found = own_gate(Clamped()), own_gate(SideBySide())
    assert [gate.in_turns for gate in found if gate is not None] == [True, False]
    for other in (Mixed(), AcrossRows(), Experts(), Clamped(gate=False)):
        assert own_gate(other) is None


@pytest.mark.parametrize("kind", [Clamped, SideBySide])
def test_gradients_of_what_is_not_rounded_are_those_of_autograd(
    kind: type[Clamped], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = SimpleNamespace(
        Form=lambda *form: SimpleNamespace(dtype=form[-1]),
        encode=lambda x, *_: (x, x.new_empty(0)),
        decode=lambda codes, *_: codes,
    )
    experts = kind()
    h = 2 * torch.randn(32, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h.requires_grad_()
    seed = torch.linspace(-1, 1, 32 * 12, dtype=torch.float64).view(32, 12)
    y = experts._apply_gate(h)
    (exact,) = torch.autograd.grad(y, h, seed)
    monkeypatch.setattr(experts_gate, "group_code", kept)
    z = LeanExpertsGate(experts, kind is Clamped, 4)(h)
    assert torch.equal(z, y)
    (found,) = torch.autograd.grad(z, h, seed)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-15)


def test_of_few_bits_the_gradient_is_near_and_right_on_average() -> None:
    gate = LeanExpertsGate(Clamped(), True, 4)
    h = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seed = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    (exact,) = torch.autograd.grad(ExpertsGate.forward(gate, h), h, seed)
    draws = []
    for key in range(200):
        gate.noise_key = torch.tensor(0x3ABCDEF987654321 + key)
        draws.append(torch.autograd.grad(gate(h), h, seed)[0])
    assert 0.02 < (draws[0] - exact).norm() / exact.norm() < 0.15
    # One dithered draw has an error of 1 / sqrt(200) of that in the mean.
    assert (sum(draws) / 200 - exact).norm() < 1.3 / 200**0.5 * (draws[0] - exact).norm()


@pytest.mark.parametrize("method", [basis.Quantized(4), basis.BalancedSketch(16)], ids=["q", "s"])
def test_sketched_experts_have_it_and_give_it_back(method: Any) -> None:
    plain = mixture()
    y, dx, exact = step(plain)
    model = mixture()
    basis.convert(model, method)
    assert type(model.experts.own_gate) is ExpertsGate
    found_y, found_dx, _ = step(model)
    torch.testing.assert_close((found_y, found_dx), (y, dx))
    assert basis.convert(model, basis.Lean()) == ["experts.own_gate"]
    found_y, found_dx, found = step(model)
    torch.testing.assert_close(found_y, y)
    assert 0 < (found_dx - dx).norm() < 0.2 * dx.norm()
    assert found.keys() == exact.keys()
    basis.convert(model, basis.Quantized(2))  # another method leaves the gate lean
    assert isinstance(model.experts, SketchedExperts)
    assert isinstance(model.experts.own_gate, LeanExpertsGate)
    assert model.experts.own_gate.owner == (model.experts,)
    assert basis.revert(model) == ["router", "experts"]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(
        torch.equal(a, b) for a, b in zip(step(model)[2].values(), exact.values(), strict=True)
    )


def test_hooks_outside_see_codes_alone() -> None:
    gate = LeanExpertsGate(Clamped(), True, 4)
    h = torch.randn(64, 256).requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = gate(h)
    assert y.requires_grad
    codes, ranges, key = 64 * 128 // 2, 64 * 4, 8
    assert sum(tensor.nbytes for tensor in kept) == 2 * (codes + ranges + key)


def test_second_derivatives_are_refused() -> None:
    h = torch.randn(4, 24).requires_grad_()
    y = LeanExpertsGate(Clamped(), True, 4)(h)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(y.sum(), h, create_graph=True)
