"""The monitor against true values; that it changes nothing; that it holds no more after many steps
than after one.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import basis
from basis import BalancedSketch
from basis.diagnostics.monitor import Monitor
from basis.head_sizes import SIZES, Sizes


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def batch(seed: int, rows: int = 24) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)) + 0.3


def true_values(model: nn.Sequential, x: Tensor) -> dict[str, tuple[float, float, float]]:
    """Energy, gradient norm and stable rank of both layers."""
    model.zero_grad()
    model(x).square().sum().backward()
    inputs = {"0": x, "2": torch.tanh(model[0](x)).detach()}
    found = {}
    for name, a in inputs.items():
        energy = float(a.square().sum())
        grad = model.get_submodule(name).weight.grad
        found[name] = (
            energy,
            float(grad.norm()),
            energy / float(torch.linalg.matrix_norm(a, 2)) ** 2,
        )
    return found


def test_unbiased_over_the_random_matrices() -> None:
    model, x, draws = mlp(), batch(0), 400
    expected = true_values(model, x)
    sums = {name: torch.zeros(draws, 2) for name in expected}
    for seed in range(draws):
        with Monitor(model, probes=4, seed=seed) as monitor:
            model(x).square().sum().backward()
        for name, reading in monitor.read().items():
            sums[name][seed] = torch.tensor([reading.activation_energy, reading.gradient_norm**2])
    for name, (energy, norm, _) in expected.items():
        for found, value in zip(sums[name].t(), (energy, norm**2), strict=True):
            error = float(found.std()) / math.sqrt(draws)
            assert abs(float(found.mean()) - value) < 4.5 * error
            assert error < 0.05 * value


def test_many_probes_are_near_the_true_values() -> None:
    model, x = mlp(), batch(0)
    expected = true_values(model, x)
    with Monitor(model, probes=4000) as monitor:
        model(x).square().sum().backward()
    for name, reading in monitor.read().items():
        found = (reading.activation_energy, reading.gradient_norm, reading.stable_rank)
        assert found == pytest.approx(expected[name], rel=0.06)
        assert reading.drift is None


@pytest.mark.parametrize("block_bytes", [64 * 2**20, 1], ids=["one block", "row by row"])
def test_a_fused_head_stays_fused_and_is_seen(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "cpu", Sizes(block_bytes))
    torch.manual_seed(0)
    body, head = nn.Linear(6, 10), nn.Linear(10, 30, bias=False)
    model, x, targets = nn.ModuleDict({"body": body, "head": head}), batch(0), torch.arange(24) % 30

    def gradients(factor: float) -> list[Tensor]:
        loss = basis.linear_cross_entropy(head, torch.tanh(body(x)), targets)
        return list(torch.autograd.grad(factor * loss, [head.weight, body.weight]))

    plain = gradients(0.25)
    with Monitor(model, probes=4000) as monitor:
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(0.25), strict=True))
        with torch.no_grad():
            basis.linear_cross_entropy(head, torch.tanh(body(x)), targets)
    fused = monitor.read()
    for name, gradient in zip(("head", "body"), plain, strict=True):
        assert fused[name].gradient_norm == pytest.approx(float(gradient.norm()), rel=0.06)
    head.register_forward_hook(lambda *_: None)  # must see the logits
    with monitor:
        gradients(0.25)
    assert monitor.read()["head"].metrics() == pytest.approx(
        {**fused["head"].metrics(), "drift": 0}, rel=1e-4, abs=1e-4
    )


def test_what_is_not_finite_is_said_and_not_refused() -> None:
    model = mlp()
    with Monitor(model) as monitor:
        (model(batch(0)).square().sum() * math.inf).backward()
    assert not math.isfinite(monitor.read()["0"].gradient_norm)
    with monitor:
        model(batch(0) * math.inf).square().sum().backward()
    reading = monitor.read()["0"]
    assert math.isnan(reading.stable_rank)
    assert not math.isfinite(reading.activation_energy)


def test_the_last_ranges_can_be_saved() -> None:
    model = mlp()
    first = Monitor(model, probes=3)
    with first:
        model(batch(0)).sum().backward()
    first.read()
    second, other = Monitor(model, probes=3), Monitor(model, probes=4)
    second.load_state_dict(first.state_dict() | {"unknown": torch.zeros(6, 3)})
    other.load_state_dict(first.state_dict())
    readings = []
    for monitor in (first, second, other):
        with monitor:
            model(batch(1)).sum().backward()
        readings.append(monitor.read()["0"])
    assert readings[0] == readings[1]
    assert readings[2].drift is None


@pytest.mark.parametrize("sketched", [False, True])
def test_training_is_the_same_to_the_last_bit(sketched: bool) -> None:
    results = []
    for watched in (False, True):
        model = mlp()
        if sketched:
            basis.convert(model, BalancedSketch(5))
        monitor = Monitor(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        torch.manual_seed(7)
        for step in range(5):
            optimizer.zero_grad()
            if watched:
                with monitor:
                    model(batch(step)).square().mean().backward()
                assert set(monitor.read()) == {"0", "2"}
            else:
                model(batch(step)).square().mean().backward()
            optimizer.step()
        results.append([*model.parameters(), torch.get_rng_state()])
        assert not any(m._forward_hooks for m in model)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_of_a_sketched_layer_it_is_the_exact_gradient_that_is_seen() -> None:
    readings = []
    for sketched in (False, True):
        model = mlp()
        if sketched:
            basis.convert(model, BalancedSketch(1))
        with Monitor(model) as monitor:
            model(batch(0)).square().sum().backward()
        readings.append(monitor.read())
    assert readings[0] == readings[1]


def test_uses_and_micro_batches_add_up_and_recomputation_does_not() -> None:
    model, parts = mlp(), [batch(0), batch(1)]
    with Monitor(model, probes=100) as monitor:
        for x in parts:
            model(x).square().sum().backward()
            with torch.no_grad():
                model(x)  # without a graph: not seen
    twice = monitor.read()
    with monitor:
        for x in parts:
            checkpoint(model, x, use_reentrant=False).square().sum().backward()
    again = monitor.read()
    for name in twice:
        assert again[name].gradient_norm == pytest.approx(twice[name].gradient_norm, rel=1e-5)
    model.zero_grad()
    model(torch.cat(parts)).square().sum().backward()
    with Monitor(model, probes=100) as whole:
        model(torch.cat(parts)).square().sum().backward()
    for name, reading in whole.read().items():  # the same S, and the sum of dY^T X S
        assert twice[name].gradient_norm == pytest.approx(reading.gradient_norm, rel=1e-4)
        assert twice[name].activation_energy == pytest.approx(reading.activation_energy, rel=0.7)


def test_drift() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.zeros(20, 6) for _ in range(2))
    one[:, :2] = torch.randn(20, 2, generator=generator)
    other[:, 2:4] = torch.randn(20, 2, generator=generator)
    monitor = Monitor(model, probes=2)
    drifts = []
    for x in (one, one, -3 * one, other, one + other):
        with monitor:
            model(x).sum().backward()
        drifts.append(monitor.read()["0"].drift)
    assert drifts[0] is None
    assert drifts[1:4] == pytest.approx([0, 0, 1], abs=1e-5)
    assert drifts[4] is not None
    assert 0.05 < drifts[4] < 0.95


def test_what_is_held_does_not_grow() -> None:
    model = mlp()
    monitor = Monitor(model, probes=3)
    held = []
    for step in range(4):
        with monitor:
            model(batch(step)).sum().backward()
        monitor.read()
        held.append({name: tuple(t.shape) for name, t in monitor._ranges.items()})
    assert held == [{"0": (6, 3), "2": (10, 3)}] * 4


def test_refusals_and_choices() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="probes=0"):
        Monitor(model, probes=0)
    with pytest.raises(ValueError, match="no dense layer is left"):
        Monitor(model, exclude=["*"])
    with Monitor(model, include=["2"]) as monitor:
        model(batch(0)).sum().backward()
    assert list(monitor.read()) == ["2"]
    with monitor:
        pass
    assert monitor.read() == {}
