"""The low-rank approximation against the formulas written with pseudo-inverses, and where it is
exact or biased.
"""

import pytest
import torch
from estimator_checks import bias_in_deviations, data, draws, estimate, key, relative

from basis import LowRank
from basis.ops.noise import derive, normal_rows

BOTH = pytest.mark.parametrize("core", ["sketched", "exact"])


def of_rank(rank: int, rows: int = 40, width: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, rank, generator=generator).double()
        @ torch.randn(rank, width, generator=generator).double()
    )


def test_uncut_is_the_published_formula() -> None:
    """M = X^T; Tropp et al. 2019 as in ROL: M^ = Q (Phi Q)^+ Z ((Psi^T P)^+)^T P^T."""
    x, dy = data(40, 30)
    m, r = x.t(), 3
    k, s = 7, 15
    upsilon, omega, phi, psi = (
        normal_rows(derive(key(1), i), slice(0, n), c).double()
        for i, (n, c) in enumerate([(30, k), (40, k), (30, s), (40, s)])
    )
    p, q = torch.linalg.qr((upsilon.t() @ m).t()).Q, torch.linalg.qr(m @ omega).Q
    z = phi.t() @ m @ psi
    core = torch.linalg.pinv(phi.t() @ q) @ z @ torch.linalg.pinv(psi.t() @ p).t()
    approximation = (q @ core @ p.t()).t()
    torch.testing.assert_close(
        estimate(LowRank(r, truncate=False), x, dy, key(1)), dy.t() @ approximation
    )
    u, values, v = torch.linalg.svd(approximation)
    cut = u[:, :r] * values[:r] @ v[:r]
    torch.testing.assert_close(estimate(LowRank(r), x, dy, key(1)), dy.t() @ cut)
    u, values, v = torch.linalg.svd(p @ p.t() @ x @ q @ q.t())
    cut = u[:, :r] * values[:r] @ v[:r]
    torch.testing.assert_close(estimate(LowRank(r, core="exact"), x, dy, key(1)), dy.t() @ cut)


@BOTH
@pytest.mark.parametrize("truncate", [True, False])
def test_exact_where_the_rank_suffices(core: str, truncate: bool) -> None:
    _, dy = data(40)
    for rank_of_x in (1, 3, 4, 7):
        x = of_rank(rank_of_x)
        error = relative(estimate(LowRank(3, truncate, core), x, dy, key(1)), dy.t() @ x)
        assert (error < 1e-9) == (rank_of_x <= (3 if truncate else 7)), rank_of_x


@BOTH
@pytest.mark.parametrize("shape", [(40, 30), (12, 30), (30, 30)])
def test_full_rank_is_exact_up_to_rounding(core: str, shape: tuple[int, int]) -> None:
    x, dy = data(*shape)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        got = estimate(LowRank(min(shape), core=core), x.to(dtype), dy.to(dtype), key(1))
        assert relative(got, dy.t() @ x) < tolerance


@BOTH
def test_biased(core: str) -> None:
    x, dy = data(40, 30)
    _, typical = bias_in_deviations(draws(LowRank(4, core=core), x, dy, 300), dy.t() @ x)
    assert typical > 4


def test_near_the_best_approximation_where_there_is_a_good_one() -> None:
    x = of_rank(30)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    values = torch.arange(1, 31).double() ** -2
    x = u * values @ v
    best = values[5:].norm()
    for core, factor in (("exact", 1.3), ("sketched", 2.5)):
        errors = []
        for i in range(20):
            left, right = LowRank(5, core=core).compress(x, key(i), {})
            errors.append(float((left @ right - x).norm()))
        assert best * 0.999 < sum(errors) / 20 < factor * best
