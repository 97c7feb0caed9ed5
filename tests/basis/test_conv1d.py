"""Conv1D as GPT-2 has it: a dense layer whose weight lies the other way round."""

import copy
import pickle

import pytest
import torch
from lookalikes import Conv1D
from torch import nn

import basis
from basis.layers.conv1d import SketchedConv1D


def model(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Conv1D(24, width), nn.GELU(), Conv1D(8, 24))


def gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = net(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("shape", [(32, 16), (4, 8, 16)])
def test_a_method_that_keeps_all_gives_the_plain_gradients(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    plain = gradients(model(), x)
    for method in (basis.Exact(), basis.BalancedSketch(32, invariant_scalars=False)):
        net = model()
        basis.convert(net, method)
        torch.testing.assert_close(gradients(net, x), plain)


def test_output_and_input_gradient_are_exact_and_the_weight_gradient_is_unbiased() -> None:
    x = torch.randn(64, 16)
    y, dx, dw, db, *_ = gradients(model(), x)
    net = model()
    basis.convert(net, basis.BalancedSketch(16, invariant_scalars=False))
    draws = []
    for step in range(200):
        net.zero_grad()
        basis.set_noise_key(net, seed=0, step=step)
        found = gradients(net, x)
        torch.testing.assert_close(found[:2], [y, dx])
        torch.testing.assert_close(found[3], db)
        draws.append(found[2])
    all_draws = torch.stack(draws)
    z = (all_draws.mean(0) - dw) / (all_draws.std(0) / len(draws) ** 0.5)
    assert all_draws.std(0).min() > 0
    assert z.abs().max() < 4.5
    assert 0.6 < z.square().mean() < 1.6


def test_it_is_found_named_and_put_back_with_all_that_hangs_on_it() -> None:
    net = model()
    parameters, keys = dict(net.named_parameters()), list(net.state_dict())
    net[0].scale = 3
    assert basis.convert(net, basis.BalancedSketch(4)) == ["0", "2"]
    assert [name for name, _ in basis.sketched_layers(net)] == ["0", "2"]
    assert isinstance(net[0], SketchedConv1D)
    assert isinstance(net[0], Conv1D)
    assert type(net[0]) is type(net[2])
    assert (net[0].in_features, net[0].out_features, net[0].nx, net[0].scale) == (16, 24, 16, 3)
    assert "BalancedSketch(rank=4" in repr(net)
    assert all(p is parameters[name] for name, p in net.named_parameters())
    basis.convert(net, basis.BalancedSketch(2))  # again
    assert net[0].estimator.rank == 2
    assert basis.revert(net) == ["0", "2"]
    assert type(net[0]) is Conv1D
    assert set(vars(net[0])) == {*vars(Conv1D(1, 1)), "scale"}
    assert list(net.state_dict()) == keys
    assert all(p is parameters[name] for name, p in net.named_parameters())


def test_what_it_has_learned_is_saved_and_the_plain_checkpoint_still_loads() -> None:
    net = model()
    plain = copy.deepcopy(net.state_dict())
    basis.convert(net, basis.Transform(bits=2.0, every=1))
    gradients(net, torch.randn(64, 16))
    state = net.state_dict()
    assert {key for key in state if key not in plain} == {
        f"{layer}.estimator_{name}" for layer in (0, 2) for name in net[layer].state
    }
    net.load_state_dict(plain)
    other = model()
    basis.convert(other, basis.Transform(bits=2.0, every=1))
    other.load_state_dict(state)
    assert all(torch.equal(t, other[0].state[name]) for name, t in net[0].state.items())


def test_noise_is_the_same_whichever_other_layers_are_sketched() -> None:
    x, found = torch.randn(64, 16), []
    for include in (["*"], ["2"]):
        net = model()
        basis.convert(net, basis.BalancedSketch(8), include=include)
        basis.set_noise_key(net, seed=0, step=0)
        found.append(gradients(net, x)[4])
    torch.testing.assert_close(*found)


def test_copies_and_pickles_are_sketched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    basis.convert(net, basis.BalancedSketch(4))
    assert type(copy.deepcopy(net)[0]) is type(net[0])
    monkeypatch.setattr(Conv1D, "__module__", "lookalikes")
    other = pickle.loads(pickle.dumps(net))
    assert type(other[0]) is type(net[0])
    torch.testing.assert_close(other.state_dict(), net.state_dict())


def test_a_function_is_told_the_size_of_the_layer() -> None:
    seen = {}

    def choose(name: str, layer: nn.Linear) -> basis.BalancedSketch:
        seen[name] = (layer.in_features, layer.out_features, layer.bias is not None)
        return basis.BalancedSketch(4)

    basis.convert(model(), choose)
    assert seen == {"0": (16, 24, True), "2": (24, 8, True)}


def test_half_precision_under_autocast_keeps_the_parameters_gradient_in_its_own() -> None:
    net = model()
    basis.convert(net, basis.BalancedSketch(4))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(32, 16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert net[0].weight.grad.dtype == torch.float32
    assert net[0].weight.grad.shape == (16, 24)
