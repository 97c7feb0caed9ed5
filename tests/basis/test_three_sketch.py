"""Test matrices, and the reconstruction on spectra with known best approximations. The formula
itself: test_ema_sketch.py.
"""

import pytest
import torch
from torch import Tensor

from basis.ops import three_sketch
from basis.ops.noise import fold


def reconstruction(x: Tensor, rank: int, seed: int) -> Tensor:
    tests = three_sketch.draw_tests(torch.tensor(fold(seed)), rank, *x.shape)
    left, core, right = three_sketch.reconstruct(three_sketch.sketch(x, tests), tests)
    identity = torch.eye(left.shape[1])
    torch.testing.assert_close(left.t() @ left, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(right.t() @ right, identity, rtol=0, atol=1e-5)
    return left @ core.t() @ right.t()


def test_sizes_are_those_of_the_original() -> None:
    assert three_sketch.sizes(4, 1000, 500) == (9, 19)
    assert three_sketch.sizes(4, 1000, 12) == (9, 12)
    assert three_sketch.sizes(4, 5, 12) == (5, 5)
    for rows, width in ((5, 12), (64, 9), (2, 2), (1, 8)):
        rank = three_sketch.largest_rank(rows, width)
        k = three_sketch.sizes(rank, rows, width)[0]
        assert k == min(rows, width)
        assert rank == 1 or three_sketch.sizes(rank - 1, rows, width)[0] < k


def test_tests_are_independent_standard_normal_and_functions_of_the_row() -> None:
    tests = three_sketch.draw_tests(torch.tensor(fold("a")), 20, 300, 200)
    shorter = three_sketch.draw_tests(torch.tensor(fold("a")), 20, 100, 200)
    assert torch.equal(shorter.omega, tests.omega[:100])
    assert torch.equal(shorter.psi, tests.psi[:100])
    assert torch.equal(shorter.upsilon, tests.upsilon)
    flat = [t.flatten()[:8000] for t in tests]
    for t in flat:
        assert abs(float(t.mean())) < 5 / 8000**0.5
        assert float(t.var()) == pytest.approx(1, abs=5 * (2 / 8000) ** 0.5)
        assert float((t**4).mean()) == pytest.approx(3, abs=5 * (96 / 8000) ** 0.5)
    correlations = torch.corrcoef(torch.stack(flat)) - torch.eye(4)
    assert float(correlations.abs().max()) < 5 / 8000**0.5
    columns = torch.corrcoef(tests.omega.t()) - torch.eye(41)
    assert float(columns.abs().max()) < 5.5 / 300**0.5


def test_error_on_a_slow_spectrum_is_near_that_of_the_original() -> None:
    # Singular values 1 / i, B = 128, N = 200: errors of a reference implementation of the formula,
    # one draw of the tests each.
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 128, generator=generator)).Q for size in (128, 200))
    x = u @ torch.diag(1 / torch.arange(1, 129)) @ v.t()
    for rank, reference, best in (
        (2, 0.93, 0.47),
        (4, 0.56, 0.32),
        (8, 0.49, 0.26),
        (16, 0.30, 0.17),
    ):
        errors = [float((reconstruction(x, rank, seed) - x).norm() / x.norm()) for seed in range(5)]
        assert sum(errors) / 5 == pytest.approx(reference, rel=0.25)
        assert (
            min(errors) > best * 0.75
        )  # k = 2 r + 1 directions may be better than r, not by much here


def test_exact_up_to_rank_k_and_zero_of_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator) @ torch.randn(5, 30, generator=generator)
    for rank in (2, 3, 15):  # k = 5, 7, 30
        torch.testing.assert_close(reconstruction(x, rank, 0), x, rtol=0, atol=1e-2)
    assert float((reconstruction(x, 1, 0) - x).norm() / x.norm()) > 0.1
    assert not reconstruction(torch.zeros(6, 4), 2, 0).any()
