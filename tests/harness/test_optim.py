"""Learning rate and optimisers against their formulas."""

import itertools
import math

import pytest
import torch
from torch import nn

from harness.optim import OptimOptions, learning_rate, make_optimizer, momentum_norm


def test_constant_rate_after_linear_warmup() -> None:
    options = OptimOptions(lr=0.1, warmup_steps=4)
    assert [learning_rate(options, step, 10) for step in range(6)] == pytest.approx(
        [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    )


def test_cosine_begins_at_lr_and_ends_at_its_share() -> None:
    options = OptimOptions(lr=0.1, schedule="cosine", warmup_steps=10, min_lr_ratio=0.2)
    rates = [learning_rate(options, step, 111) for step in range(111)]
    assert rates[9] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(0.1)
    assert rates[60] == pytest.approx(0.1 * (0.2 + 0.8 * 0.5))
    assert rates[110] == pytest.approx(0.02)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(OptimOptions(schedule="cosine"), 0, 1) > 0  # a run of one step


def test_sgd_momentum_is_the_papers() -> None:
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(layer, OptimOptions(name="sgd", lr=0.1, momentum=0.9))
    start, momentum = layer.weight.detach().clone(), torch.zeros(2, 3)
    for step in range(3):
        layer.weight.grad, layer.bias.grad = torch.full((2, 3), 1.0 + step), torch.zeros(2)
        optimizer.step()
        momentum = 0.9 * momentum + (1.0 + step)
        start = start - 0.1 * momentum
    torch.testing.assert_close(layer.weight.detach(), start)


def test_adamw_decays_matrices_alone() -> None:
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(
        layer, OptimOptions(name="adamw", lr=0.1, weight_decay=0.5, eps=1e-12)
    )
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    layer.weight.grad, layer.bias.grad = torch.ones(2, 3), torch.ones(2)
    optimizer.step()  # first step of Adam: lr * sign(gradient), after decay
    torch.testing.assert_close(layer.weight.detach(), weight * (1 - 0.1 * 0.5) - 0.1)
    torch.testing.assert_close(layer.bias.detach(), bias - 0.1)


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"name": "lion"}, "optim.name='lion'"),
        ({"schedule": "linear"}, "optim.schedule='linear'"),
        ({"lr": -1.0}, "optim.lr=-1.0"),
        ({"lr": math.nan}, "optim.lr=nan"),
        ({"momentum": 1.0}, "optim.momentum=1.0"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1"),
        ({"grad_clip": 0.0}, "optim.grad_clip=0.0"),
        ({"weight_decay": -0.1}, "optim.weight_decay=-0.1"),
        ({"min_lr_ratio": 2.0}, "optim.min_lr_ratio=2.0"),
    ],
)
def test_wrong_options_are_named(options: dict, start: str) -> None:
    with pytest.raises(ValueError, match="^" + start.replace(".", r"\.")):
        OptimOptions(**options)


@pytest.mark.parametrize(
    "options", [OptimOptions(), OptimOptions(momentum=0.0), OptimOptions(name="adamw")]
)
def test_momentum_norm_is_that_of_the_running_means(options: OptimOptions) -> None:
    weight = nn.Parameter(torch.zeros(3, 2))
    bias = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer(nn.ParameterList([weight, bias]), options)
    assert momentum_norm(optimizer) == 0.0
    for _ in range(2):
        weight.grad, bias.grad = torch.full((3, 2), 2.0), torch.full((2,), -1.0)
        optimizer.step()
    factor = {
        "sgd": 1 + options.momentum if options.momentum else 0.0,
        "adamw": 1 - options.beta1**2,
    }[options.name]
    assert momentum_norm(optimizer) == pytest.approx(factor * (6 * 4 + 2 * 1) ** 0.5, rel=1e-6)
