"""The physics-informed network: its derivatives against autograd's, its solutions against their
equations, and its files.
"""

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

import basis
from experiments.ema import pinn


def network(dimensions: int) -> pinn.Jets:
    torch.manual_seed(0)
    model = pinn.Jets([dimensions, 7, 5, 1]).double()
    with torch.no_grad():
        for bias in model.biases:
            bias.normal_()
    return model


def by_autograd(model: pinn.Jets, points: Tensor) -> Tensor:
    """The jets of `model` by differentiating its values twice, with graph."""
    points = points.clone().requires_grad_()
    u = model(points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
    return torch.stack([u, *first.unbind(1), second[:, 0]])


@pytest.mark.parametrize("name", pinn.PROBLEMS)
def test_derivatives_and_gradients_are_those_of_autograd(name: str) -> None:
    problem = pinn.PROBLEMS[name]
    model, generator = network(problem.dimensions), torch.Generator().manual_seed(0)
    inside, boundary = (
        problem.inside(9, generator).double(),
        problem.boundary(6, generator).double(),
    )
    points = torch.cat([inside, boundary])
    torch.testing.assert_close(
        model.jets(points), by_autograd(model, points), rtol=1e-10, atol=1e-12
    )
    loss = pinn.loss_at(model, problem, inside, boundary)
    jets = by_autograd(model, points)
    error = jets[0, len(inside) :] - problem.solution(boundary)
    twice = (
        problem.residual(inside, jets[:, : len(inside)]).square().mean()
        + pinn.WEIGHT * error.square().mean()
    )
    gradients = [
        torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        for value in (loss, twice)
    ]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", pinn.PROBLEMS)
def test_known_solutions_satisfy_their_equations(name: str) -> None:
    problem = pinn.PROBLEMS[name]

    class Known(torch.nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            return problem.solution(points)

    points = problem.inside(50, torch.Generator().manual_seed(0)).double()
    jets = by_autograd(Known(), points)
    assert float(problem.residual(points, jets).detach().abs().max()) < 1e-10
    assert float(problem.boundary(8, torch.Generator().manual_seed(0)).abs().max()) <= 1


def test_a_sketch_that_keeps_everything_has_the_exact_gradients() -> None:
    problem = pinn.PROBLEMS["burgers"]
    model, generator = network(2), torch.Generator().manual_seed(0)
    inside, boundary = (
        problem.inside(9, generator).double(),
        problem.boundary(6, generator).double(),
    )
    weights = [layer.weight for layer in model.layers]
    exact = torch.autograd.grad(pinn.loss_at(model, problem, inside, boundary), weights)
    basis.convert(
        model, basis.EMASketch(rank=4, rows=4 * 15, beta=0.0), include=["layers.1", "layers.2"]
    )
    sketched = torch.autograd.grad(pinn.loss_at(model, problem, inside, boundary), weights)
    for got, expected in zip(sketched, exact, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )  # float32 inside


def test_points_are_functions_of_the_step_only_where_resampled() -> None:
    for points, same in (("fixed", True), ("resampled", False)):
        task = pinn.make_task("burgers", points, [8, 8], pinn.Counts(12, 8), seed=1)
        first, second = (float(task.loss(step).detach()) for step in (0, 1))
        assert (first == second) == same
        assert first == float(task.loss(0).detach())
        assert task.rows == 4 * 20
        assert task.include == ("layers.1", "layers.2")


def test_command_and_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--steps",
        "6",
        "--look",
        "3",
        "--seeds",
        "2",
        "--hidden",
        "16",
        "16",
        "--inside",
        "20",
        "--adapt-every",
        "2",
    ]
    assert (
        pinn.main(
            [
                "--problems",
                "poisson",
                "--points",
                "fixed",
                *small,
                "--share",
                "1/2",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    with (tmp_path / "pinn.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    assert all(
        float(row["of_exact"])
        <= (1.0 if row["method"] == "exact" or "adaptive" in row["method"] else 0.9)
        for row in rows
    )
    assert {p.suffix for p in tmp_path.iterdir()} == {".csv", ".md", ".svg"}
    for wrong, named in (
        (["--lr", "0"], "--lr 0.0"),
        (["--share", "2"], "--share 2"),
        (["--low", "0.5"], "--low 0.5, --high 0.2"),
        (["--hidden", "0"], "--hidden 0"),
        (["--inside", "0"], "--inside 0"),
        (["--share", "1/1000"], "--share 1/1000: "),
    ):
        assert pinn.main([*small, *wrong, "--out", str(tmp_path / "no")]) == 1
        assert named in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
