"""What the tests of estimators share: small data, keyed draws, and comparisons of draws with
formulas.
"""

import math

import torch
from torch import Tensor

from basis.estimator import Estimator
from basis.ops.noise import fold
from basis.state import learned_from_scratch

ROWS, IN, OUT = 24, 5, 4


def data(rows: int = ROWS, width: int = IN) -> tuple[Tensor, Tensor]:
    """X (rows, width) with a mean and rows of unequal norm, dY (rows, OUT) too, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64) + 0.5
    x = (
        x
        * torch.linspace(0.3, 1.5, rows, dtype=torch.float64)[
            torch.randperm(rows, generator=generator), None
        ]
    )
    dy = torch.randn(rows, OUT, generator=generator, dtype=torch.float64)
    return x, dy * torch.linspace(0.2, 2, rows, dtype=torch.float64)[:, None]


def key(*parts: int | str) -> Tensor:
    return torch.tensor(fold(*parts))


def estimate(estimator: Estimator, x: Tensor, dy: Tensor, key: Tensor) -> Tensor:
    state = learned_from_scratch(estimator, x, key)
    return estimator.weight_grad(estimator.compress(x, key, state), dy)


def draws(estimator: Estimator, x: Tensor, dy: Tensor, count: int) -> Tensor:
    """`count` estimates (count, OUT, IN), each with a key of its own."""
    return torch.stack([estimate(estimator, x, dy, key("draw", i)) for i in range(count)])


def bias_in_deviations(estimates: Tensor, exact: Tensor) -> tuple[float, float]:
    """The mean's distance from `exact` in standard errors, by entry: the largest, and the root of
    the mean square.
    """
    z = (estimates.mean(0) - exact) / (estimates.std(0) / math.sqrt(len(estimates)))
    return float(z.abs().max()), float(z.square().mean().sqrt())


def assert_unbiased(estimates: Tensor, exact: Tensor) -> None:
    largest, typical = bias_in_deviations(estimates, exact)
    assert largest < 4.5
    # Entries of one draw hang together, so this is far from the root of a chi-square of all.
    assert typical < 2.2


def assert_variance(estimates: Tensor, exact: Tensor, expected: float, sharp: float = 0.04) -> None:
    """E |dW^ - dW|^2 as derived, within 4.5 standard errors that are below a share `sharp`."""
    errors = (estimates - exact).square().sum((1, 2))
    standard_error = errors.std().item() / math.sqrt(len(errors))
    assert abs(errors.mean().item() - expected) < 4.5 * standard_error
    assert standard_error < sharp * expected


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())
