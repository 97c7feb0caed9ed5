"""The tracked subspace: exact on what lies in it, a projection of the rest, its bytes and its
adaptive rank.
"""

import pytest
import torch

from basis import Subspace
from basis.diagnostics.budget import kept_bytes

KEY = torch.tensor(0)
GENERATOR = torch.Generator().manual_seed(0)


def data(
    rows: int = 64, width: int = 12, inner: int = 3, beside: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """X with a mean, `inner` directions of variance 1 and `beside` of deviation in the others; and
    dY.
    """
    frame, _ = torch.linalg.qr(torch.randn(width, width, generator=GENERATOR))
    deviations = torch.full((width,), beside)
    deviations[:inner] = 1.0
    x = (torch.randn(rows, width, generator=GENERATOR) * deviations) @ frame.t() + 2.0
    return x, torch.randn(rows, 5, generator=GENERATOR)


def learned(estimator: Subspace, x: torch.Tensor, looks: int = 10) -> dict[str, torch.Tensor]:
    state = estimator.initial_state(x.shape[1], x.device)
    for _ in range(looks):
        state = estimator.learn(state, x, KEY)
    return state


def test_exact_where_x_lies_in_the_subspace_and_its_mean() -> None:
    x, grad_y = data()
    estimator = Subspace(3)
    estimate = estimator.weight_grad(estimator.compress(x, KEY, learned(estimator, x)), grad_y)
    torch.testing.assert_close(estimate, grad_y.t() @ x, rtol=1e-4, atol=1e-4)


def test_full_rank_is_exact_before_anything_is_learned() -> None:
    x, grad_y = data(beside=0.5)
    estimator = Subspace(12)
    estimate = estimator.weight_grad(
        estimator.compress(x, KEY, estimator.initial_state(12, x.device)), grad_y
    )
    torch.testing.assert_close(estimate, grad_y.t() @ x, rtol=1e-4, atol=1e-4)


def test_the_rest_is_projected_away() -> None:
    """Against the formula: dW^ = dY^T (1 mean^T + (X - 1 mean^T) Q Q^T), Q from an
    eigendecomposition.
    """
    x, grad_y = data(beside=0.3)
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).t() @ (x - mean))
    top = vectors[:, -3:]
    estimator = Subspace(3)
    estimate = estimator.weight_grad(
        estimator.compress(x, KEY, learned(estimator, x, looks=60)), grad_y
    )
    expected = grad_y.t() @ (mean + (x - mean) @ top @ top.t())
    torch.testing.assert_close(estimate, expected, rtol=1e-3, atol=1e-3)
    assert float((estimate - grad_y.t() @ x).norm()) > 0.05 * float(estimate.norm())


def test_factors_are_the_same_estimate() -> None:
    x, grad_y = data(beside=0.3)
    estimator = Subspace(4)
    kept = estimator.compress(x, KEY, learned(estimator, x))
    factors = estimator.factors(kept, len(x))
    torch.testing.assert_close(
        (factors.left.t() @ grad_y).t() @ factors.right, estimator.weight_grad(kept, grad_y)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_kept_and_state(dtype: torch.dtype) -> None:
    assert kept_bytes(Subspace(4), 64, 12, dtype) == (64 * 4 + 12) * dtype.itemsize
    state = Subspace(4).initial_state(12, torch.device("cpu"))
    assert sum(t.numel() for t in state.values()) == 12 * 4 + 4 + 1


def test_energy_makes_the_rank_adaptive() -> None:
    x, _ = data(inner=3, beside=0.01)
    estimator = Subspace(10, energy=0.99)
    coordinates, _, _ = estimator.compress(x, KEY, learned(estimator, x, looks=40))
    assert coordinates.shape == (64, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 1, "every": 0}, "every=0"),
        ({"rank": 1, "energy": 1.5}, r"energy=1\.5"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Subspace(**options)
