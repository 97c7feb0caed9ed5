"""scripts/rate_distortion.py: distortions of known inputs against formulas, and its files for a
run.
"""

import csv
from pathlib import Path

import pytest
import torch
from tiny import train_here

from basis.diagnostics.budget import fit_budget, kept_bytes
from basis.estimators.transform import rate_distortion_bound
from experiments.rate_distortion import run as rate_distortion
from experiments.rate_distortion.run import estimator_of, measure_layer, reconstruction

ROWS, WIDTH = 768, 48


def batches(count: int) -> list[torch.Tensor]:
    """Gaussian rows with a mean, variances falling as 1 / i^2 along random directions."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    deviations = 1.0 / torch.arange(1.0, WIDTH + 1)
    return [
        torch.randn(ROWS, WIDTH, generator=generator) * deviations @ turn + 0.3
        for _ in range(count)
    ]


def points(method: str, *budgets: str) -> list[rate_distortion.Point]:
    seen = batches(24)
    return list(
        measure_layer(
            "a", seen[:20], seen[20:], {(method, b): estimator_of(method) for b in budgets}
        )
    )


def test_a_subspace_leaves_the_tail_of_the_spectrum() -> None:
    (point,) = points("subspace", "1/8")
    rank = fit_budget(estimator_of("subspace"), 1 / 8, ROWS, WIDTH).rank  # type: ignore[attr-defined]
    variances = 1.0 / torch.arange(1.0, WIDTH + 1) ** 2
    assert point.distortion == pytest.approx(
        float(variances[rank:].sum() / variances.sum()), rel=0.1
    )
    assert point.bits * WIDTH * ROWS == 8 * kept_bytes(
        fit_budget(estimator_of("subspace"), 1 / 8, ROWS, WIDTH), ROWS, WIDTH
    )
    assert point.bound == pytest.approx(
        float(rate_distortion_bound(variances, point.bits * WIDTH) / variances.sum()), rel=0.1
    )
    assert point.state > 0


def test_transform_is_near_the_bound_and_nothing_is_below_it() -> None:
    for point, most in zip(
        points("transform directions=1.0", "1/24", "1/12"), (2.5, 3.5), strict=True
    ):
        assert 1.0 < point.ratio < most
    for method in ("quantized", "subspace", "basis"):
        assert all(p.ratio > 1.0 for p in points(method, "1/12", "1/4"))


def test_what_cannot_keep_to_a_budget_is_left_out() -> None:
    assert points("quantized", "1/48") == []


def test_reconstruction_is_what_weight_grad_uses() -> None:
    (x,) = batches(1)
    estimator, key = estimator_of("row_sampling"), torch.tensor(3)
    grad_y = torch.randn(ROWS, 5)
    expected = estimator.weight_grad(estimator.compress(x, key, {}), grad_y)
    torch.testing.assert_close(
        grad_y.t() @ reconstruction(estimator, x, key, {}), expected, rtol=1e-4, atol=1e-3
    )


@pytest.mark.slow
def test_the_program_writes_tables_and_a_figure(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train_here(data, run, "method=subspace", "method.rank=3")  # whose layers have buffers
    options = [
        "--methods",
        "transform",
        "quantized",
        "--budgets",
        "1/8",
        "1/6",
        "--looks",
        "2",
        "--batches",
        "1",
    ]
    assert (
        rate_distortion.main([str(run), *options, "--windows", "8", "--out", str(tmp_path / "out")])
        == 0
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    ends = {"rate_distortion.svg"}
    assert names == ends | {
        f"{name}.{end}" for name in ("summary", "rate_distortion") for end in ("csv", "md")
    }
    with (tmp_path / "out" / "rate_distortion.csv").open() as file:
        layers = {row["layer"] for row in csv.DictReader(file)}
    assert "blocks.0.mlp.fc" in layers
    assert "ratio" in capsys.readouterr().out
    assert (
        rate_distortion.main(
            [str(run), "--methods", "low_rank", "--budgets", "1/48", "--windows", "1"]
        )
        == 1
    )
    assert "no method keeps to any of the budgets" in capsys.readouterr().err
    assert rate_distortion.main([str(run), "--layers", "nothing"]) == 1
    assert "--layers nothing" in capsys.readouterr().err


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match=r"method=foo: must be one of exact, basis"):
        estimator_of("foo")
