"""The controller by hand-made errors, the error by a layer whose reconstruction is known, and
layers re-made in a model.
"""

import math

import pytest
import torch
from torch import nn

import basis
from basis import BalancedSketch, EMASketch
from basis.diagnostics.adaptive_rank import AdaptiveRank, reconstruction_error, set_rank


def test_up_by_two_above_and_down_by_one_after_three_checks_below() -> None:
    controller = AdaptiveRank(rank=4, low=0.1, high=0.3, minimum=3, maximum=9)
    errors = [
        0.5,
        0.5,
        0.2,
        0.05,
        0.05,
        0.2,
        0.05,
        0.05,
        0.05,
        0.05,
        0.05,
        0.05,
        0.3,
        0.1,
        math.nan,
        0.9,
        0.9,
    ]
    ranks = [6, 8, 8, 8, 8, 8, 8, 8, 7, 7, 7, 6, 6, 6, 6, 8, 9]
    assert [controller.observe(error) for error in errors] == ranks
    for _ in range(30):
        controller.observe(0.0)
    assert controller.rank == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0, "minimum": 0},
        {"rank": 7},
        {"low": 0.3},
        {"low": -0.1},
        {"up": 0},
        {"patience": 0},
    ],
)
def test_wrong_options_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
        AdaptiveRank(**({"rank": 2, "low": 0.1, "high": 0.3, "maximum": 6} | wrong))  # type: ignore[arg-type]


def test_the_error_is_that_of_the_projection_and_nothing_is_learned() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 3))
    low_rank = torch.randn(20, 3) @ torch.randn(3, 12)
    basis.convert(model, EMASketch(1, rows=20, beta=0.99))
    errors = []
    for rank in (1, 2, 5, 8):
        set_rank(model, rank)
        errors.append(reconstruction_error(model, lambda: model(torch.randn(20, 12))))
        if rank >= 2:  # k = 5 covers rank 3, and the second layer's input, W x + b, of rank 4
            assert reconstruction_error(model, lambda: model(low_rank)) < 1e-3
    assert errors[0] > errors[2] > errors[3]
    assert errors[0] > 0.5
    assert errors[3] < 1e-2
    assert model[0].state["steps"] == 0
    assert math.isnan(reconstruction_error(model[:1], lambda: model[:1](torch.zeros(20, 12))))
    basis.convert(model, BalancedSketch(4, invariant_scalars=False))
    assert reconstruction_error(model, lambda: model(low_rank)) > 0.1
    basis.convert(model, basis.Quantized(2))  # which cannot round no rows
    assert math.isnan(reconstruction_error(model, lambda: model(low_rank[:0])))
    some = reconstruction_error(model, lambda: model(low_rank))
    assert reconstruction_error(model, lambda: (model(low_rank), model(low_rank[:0]))) == some


def test_a_new_rank_keeps_parameters_and_forgets_the_average() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    basis.convert(model, EMASketch(2, rows=20, beta=0.5), include=["0"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model[0].weight
    model(torch.randn(20, 12)).sum().backward()
    assert model[0].state["steps"] == 1
    set_rank(model, 3)
    assert model[0].estimator == EMASketch(3, rows=20, beta=0.5)
    assert model[0].weight is weight
    assert model[0].state["steps"] == 0
    assert model[0].state["range"].shape == (12, 7)
    assert type(model[2]) is nn.Linear
    before = weight.detach().clone()
    model(torch.randn(20, 12)).sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_a_method_counts_its_steps_from_the_new_rank_on() -> None:
    model = nn.Sequential(nn.Linear(12, 16))
    basis.convert(model, basis.Subspace(2, every=100))

    def learns(step: int) -> bool | None:
        basis.set_noise_key(model, seed=0, step=step)
        return model[0].learning

    assert [learns(step) for step in (9, 10, 55, 100)] == [True, False, False, True]
    set_rank(model, 3, step=50)
    assert [learns(step) for step in (50, 59, 60, 100, 150)] == [True, True, False, False, True]
