"""Zeroth order against what random directions do by formula, and in a run: nothing kept, resumed to
the last bit.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import losses, train_here
from torch import nn

from basis.ops.noise import fold
from harness.zeroth_order import ZerothOrder, normal


class Function(nn.Module):
    """A scalar function of one parameter."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start)


def test_keyed_numbers_are_standard_normal() -> None:
    numbers = normal(fold("test"), 200_001, torch.device("cpu")).double()
    error = 1 / math.sqrt(len(numbers))
    assert len(numbers) == 200_001
    assert abs(numbers.mean()) < 4 * error
    assert (numbers**2).mean().item() == pytest.approx(1, abs=4 * math.sqrt(2) * error)
    assert (numbers**4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96) * error)
    assert torch.equal(normal(5, 10, torch.device("cpu")), normal(5, 10, torch.device("cpu")))
    assert not torch.equal(normal(5, 10, torch.device("cpu")), normal(6, 10, torch.device("cpu")))


@pytest.mark.parametrize("rank", [1, 4])
def test_entries_of_a_low_rank_direction_are_uncorrelated(rank: int) -> None:
    method, weight, draws = ZerothOrder(rank=rank), torch.empty(3, 2), 4_000
    directions = torch.stack(
        [method.direction(weight, fold(draw)).flatten() for draw in range(draws)]
    )
    second_moment = directions.t() @ directions / draws
    # A product of two normal numbers has the fourth moment 9: the diagonal's deviation is sqrt(8 /
    # draws), the largest.
    assert (second_moment - torch.eye(6)).abs().max() < 4.5 * math.sqrt(8 / draws)
    assert torch.linalg.matrix_rank(method.direction(torch.empty(6, 5), 1)) == rank


def test_cosine_to_the_gradient_is_that_of_even_directions() -> None:
    size, draws = 20, 1_000
    model, gradient = (
        Function(torch.randn(size, generator=torch.Generator().manual_seed(0))),
        torch.linspace(-1, 2, size),
    )
    cosines = []
    for draw in range(draws):
        model.w.grad = None
        ZerothOrder(sigma=0.1).add_gradient(model, lambda: model.w @ gradient, fold(draw))
        cosines.append(torch.cosine_similarity(model.w.grad, gradient, dim=0).item())
    expected = math.exp(math.lgamma(size / 2) - math.lgamma((size + 1) / 2)) / math.sqrt(math.pi)
    assert min(cosines) > 0  # never uphill
    mean = sum(cosines) / draws
    deviation = math.sqrt((1 / size - expected**2) / draws)  # E cos^2 = 1 / size
    assert mean == pytest.approx(expected, abs=4 * deviation)


def test_the_estimate_is_slope_times_direction_and_parts_add_up() -> None:
    method, gradient = ZerothOrder(sigma=0.01, rank=2), torch.randn(4, 3)
    model = Function(torch.randn(4, 3))
    before = model.w.detach().clone()

    def loss() -> torch.Tensor:
        return (model.w * gradient).sum()

    expected = []
    for part in range(2):
        direction = method.direction(model.w, fold(fold(part), "w"))
        expected.append((gradient * direction).sum() * direction)
        found = method.add_gradient(model, loss, fold(part), share=0.5)
        torch.testing.assert_close(found, loss())
        assert not found.requires_grad
    torch.testing.assert_close(model.w.grad, (expected[0] + expected[1]) / 2, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.w, before)


def test_antithetic_what_is_even_cancels() -> None:
    model = Function(torch.zeros(3, 2))
    ZerothOrder(sigma=0.5).add_gradient(model, lambda: (model.w**2).sum() + (model.w**4).sum(), 1)
    assert torch.equal(model.w.grad, torch.zeros(3, 2))


def test_both_losses_see_the_same_dropout_masks() -> None:
    model = Function(torch.ones(1000))
    ZerothOrder(sigma=1e-4).add_gradient(
        model, lambda: nn.functional.dropout(torch.ones(1000), 0.5).sum() + 0 * model.w[0], 1
    )
    assert torch.equal(model.w.grad, torch.zeros(1000))


def test_a_run_keeps_nothing_and_a_resumed_one_is_the_same(data: Path, tmp_path: Path) -> None:
    options = ["method=zeroth_order", "optim.lr=1e-4", "tokens_per_step=32", "model.dropout=0.1"]
    train_here(data, tmp_path / "whole", *options)
    train_here(data, tmp_path / "parts", *options, "steps=10")
    train_here(data, tmp_path / "parts", *options, "steps=20")
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    by_step = {row["step"]: row for row in parts}
    logged = [row for row in whole if "train/loss_last_step" in row]
    assert [row["train/loss_last_step"] for row in logged] == [
        by_step[row["step"]]["train/loss_last_step"] for row in logged
    ]
    assert whole[-1]["val/loss"] == parts[-1]["val/loss"] != whole[0]["val/loss"]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    kept = {name: size for name, size in summary.items() if name.startswith("mem/saved_bytes")}
    assert len(kept) == 9
    assert set(kept.values()) == {0}
