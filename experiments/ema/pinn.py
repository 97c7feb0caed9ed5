"""A physics-informed network by exact backpropagation, EMA sketches, BASIS, a tracked subspace: L2
error, bytes, rank over time.

    # 1-D Poisson and Burgers, points fixed and drawn anew: a quarter of an hour
    python scripts/pinn.py
    python scripts/pinn.py --problems poisson --points fixed --steps 500 --seeds 2

A tanh network u is trained to satisfy a differential equation at points inside of a domain and
known values on its boundary:

    poisson   -u_xx = pi^2 sin(pi x) on [-1, 1],  u(-1) = u(1) = 0                     u = sin(pi x)
    burgers   u_t + u u_x = nu u_xx on [-1, 1] x [0, 1], nu = 0.05,
              u = (1 - tanh((x - t / 2) / (4 nu))) / 2

    loss = mean of squared residuals
         + WEIGHT * mean of squared errors on the boundary (and at t = 0)

Both solutions are known in closed form, so the score is the relative L2 error on a grid, |u - u*| /
|u*|.

*Derivatives.* The residual has u_x and u_xx, and training differentiates it again, with respect to
the weights. Sketched layers refuse second derivatives, rightly: those would have to go through X,
which is gone. They are not needed. A network of dense layers and tanh can carry the derivatives
with respect to the coordinates forward beside the values,

    z = W a + b,   z_x = W a_x,   z_xx = W a_xx
    a = tanh(z),   a_x = (1 - a^2) z_x,   a_xx = (1 - a^2) z_xx - 2 a (1 - a^2) z_x^2

(and z_t as z_x), exactly and in one pass. To a dense layer a, a_x, a_t and a_xx are just more rows
of its input, 3 or 4 for each point; only the first ones get the bias, which is therefore a
parameter of its own. The loss is then an ordinary function of the last layer's output, and
first-order autograd is all that any dense layer sees: dW is the sum over all rows, values' and
derivatives' alike, and that is what a method estimates. tests/test_pinn.py holds the derivatives,
and the gradients of the loss, against autograd's second derivatives.

*Points.* `fixed`: the same in every step, so that row b of an input is the same point, and an
average over steps only lags behind. `resampled`: drawn anew in every step, where row b of many
steps are points that have nothing to do with each other.

The first layer, whose input is coordinates, one or two numbers a row, stays exact; all others are
sketched. Variants, budget and what is measured: experiments/ema/task.py. Adam. Written to --out:
pinn.csv, pinn.md, pinn.svg and pinn_looks.csv, every look at every training.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.ema import task as small
from experiments.ema.arguments import adaptive_of, add_arguments
from experiments.ema.tables import write
from experiments.ema.task import Adaptive, Options, Setting, Task

NU = 0.05
WEIGHT = 10.0
POINTS = ("fixed", "resampled")


class Jets(nn.Module):
    """Dense layers with tanh between them, for values and for derivatives with respect to the
    coordinates.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for n, m in pairwise(widths))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(m)) for m in widths[1:])
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_normal_(layer.weight)

    def forward(self, points: Tensor) -> Tensor:
        """u (P,) at `points` (P, d)."""
        return self._run(points[None])[0]

    def jets(self, points: Tensor) -> Tensor:
        """(2 + d, P): u, its derivatives by each of the d coordinates, and the second one by the
        first coordinate.
        """
        count, dimensions = points.shape
        directions = torch.eye(dimensions, dtype=points.dtype)[:, None].expand(
            dimensions, count, dimensions
        )
        return self._run(torch.cat([points[None], directions, torch.zeros_like(points)[None]]))

    def _run(self, a: Tensor) -> Tensor:
        for number, (layer, bias) in enumerate(zip(self.layers, self.biases, strict=True)):
            z = layer(a)  # (channels, P, N) -> (channels, P, M), all channels' points as rows
            z = torch.cat([z[:1] + bias, z[1:]])
            a = z if number == len(self.layers) - 1 else _tanh(z)
        return a.squeeze(-1)


def _tanh(z: Tensor) -> Tensor:
    """tanh of values and their derivatives: z (1, P, M), or (2 + d, P, M) with the second one by
    the first coordinate last.
    """
    a = torch.tanh(z[0])
    if len(z) == 1:
        return a[None]
    slope = 1.0 - a * a
    second = slope * (z[-1] - 2.0 * a * z[1] * z[1])
    return torch.cat([a[None], slope * z[1:-1], second[None]])


class Poisson:
    """-u_xx = pi^2 sin(pi x) on [-1, 1]."""

    dimensions = 1

    def inside(self, count: int, generator: torch.Generator) -> Tensor:
        return 2.0 * torch.rand(count, 1, generator=generator) - 1.0

    def boundary(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.tensor([[-1.0], [1.0]])

    def solution(self, points: Tensor) -> Tensor:
        return torch.sin(math.pi * points[:, 0])

    def residual(self, points: Tensor, jets: Tensor) -> Tensor:
        """Of u, u_x, u_xx (3, P)."""
        return jets[2] + math.pi**2 * torch.sin(math.pi * points[:, 0])

    def grid(self) -> Tensor:
        return torch.linspace(-1.0, 1.0, 201)[:, None]


class Burgers:
    """u_t + u u_x = nu u_xx on [-1, 1] x [0, 1]: a front that moves to the right with speed 1/2.
    Coordinates (x, t).
    """

    dimensions = 2

    def inside(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, 2, generator=generator) * torch.tensor([2.0, 1.0]) - torch.tensor(
            [1.0, 0.0]
        )

    def boundary(self, count: int, generator: torch.Generator) -> Tensor:
        """Half of them at t = 0, the others at both ends in turn."""
        points = self.inside(count, generator)
        points[: count // 2, 1] = 0.0
        points[count // 2 :: 2, 0] = -1.0
        points[count // 2 + 1 :: 2, 0] = 1.0
        return points

    def solution(self, points: Tensor) -> Tensor:
        return 0.5 * (1.0 - torch.tanh((points[:, 0] - 0.5 * points[:, 1]) / (4.0 * NU)))

    def residual(self, points: Tensor, jets: Tensor) -> Tensor:
        """Of u, u_x, u_t, u_xx (4, P)."""
        return jets[2] + jets[0] * jets[1] - NU * jets[3]

    def grid(self) -> Tensor:
        return torch.cartesian_prod(torch.linspace(-1.0, 1.0, 101), torch.linspace(0.0, 1.0, 41))


PROBLEMS: dict[str, Poisson | Burgers] = {"poisson": Poisson(), "burgers": Burgers()}


@dataclass(frozen=True)
class Counts:
    """Points of a step. Poisson's boundary has two, whatever is asked for."""

    inside: int = 128
    boundary: int = 64


def relative_error(model: Jets, problem: Poisson | Burgers) -> float:
    """|u - u*| / |u*| over the grid."""
    grid = problem.grid()
    with torch.no_grad():
        found, known = model(grid), problem.solution(grid)
    return float((found - known).norm() / known.norm())


def loss_at(model: Jets, problem: Poisson | Burgers, inside: Tensor, boundary: Tensor) -> Tensor:
    """One forward for all points, those on the boundary last."""
    jets = model.jets(torch.cat([inside, boundary]))
    residual = problem.residual(inside, jets[:, : len(inside)])
    error = jets[0, len(inside) :] - problem.solution(boundary)
    return residual.square().mean() + WEIGHT * error.square().mean()


def make_task(name: str, points: str, hidden: list[int], counts: Counts, seed: int) -> Task:
    """A fresh network, and points that are functions of seed and, if resampled, step."""
    problem = PROBLEMS[name]
    torch.manual_seed(seed)
    model = Jets([problem.dimensions, *hidden, 1])

    def draw(number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        return problem.inside(counts.inside, generator), problem.boundary(
            counts.boundary, generator
        )

    def loss(step: int) -> Tensor:
        return loss_at(model, problem, *draw(step if points == "resampled" else 0))

    unseen = torch.cat(draw(1_000_000))
    sketched = tuple(f"layers.{number}" for number in range(1, len(hidden) + 1))
    return Task(
        model=model,
        loss=loss,
        score=lambda: relative_error(model, problem),
        unseen=lambda: model.jets(unseen),
        rows=(2 + problem.dimensions) * len(unseen),
        include=sketched,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument(
        "--hidden", type=int, nargs="+", default=[32, 32, 32], help="widths (default: 32 32 32)"
    )
    parser.add_argument(
        "--inside", type=int, default=128, help="points inside the domain (default: 128)"
    )
    parser.add_argument(
        "--boundary",
        type=int,
        default=64,
        help="points on its boundary, in 1-D always 2 (default: 64)",
    )
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="of Adam, at the start (default: 0.003)"
    )
    add_arguments(parser, steps=800, look=50, adaptive=Adaptive(every=50, low=0.05, high=0.2))
    parser.set_defaults(out=Path("runs/pinn"))
    options = parser.parse_args(argv)
    try:
        loop = Options(options.steps, options.lr, "adam", look=options.look, share=options.share)
        adaptive = adaptive_of(options)
        if min(options.hidden) < 1:
            raise ValueError(
                f"--hidden {' '.join(map(str, options.hidden))}: widths must be at least 1"
            )
        if options.inside < 1 or options.boundary < 4:
            raise ValueError(
                f"--inside {options.inside}, --boundary {options.boundary}: must be at least 1 and "
                "4"
            )
        counts = Counts(options.inside, options.boundary)
        results = []
        cells = list(product(options.problems, options.points))
        with tqdm(
            total=len(cells) * len(small.variants(1, adaptive)) * options.seeds,
            unit="training",
            disable=None,
        ) as progress:
            for name, points in cells:
                result = Setting(f"{name}, points {points}")
                rows = make_task(name, points, options.hidden, counts, 0).rows
                for variant, seed in product(small.variants(rows, adaptive), range(options.seeds)):
                    task = make_task(name, points, options.hidden, counts, seed)
                    result.outcomes.append(small.train(task, variant, loop, seed))
                    progress.update()
                results.append(result)
    except ValueError as error:
        print(f"pinn: {error}", file=sys.stderr)
        return 1
    write(
        results,
        options.out,
        "pinn",
        "A physics-informed network",
        "relative L2 error",
        digits=4,
        log=True,
    )
    return 0
