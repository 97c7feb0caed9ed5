"""Transform coding of X: bias, variance against the formula, the rate-distortion bound, bytes,
budgets, a layer that trains.
"""

import math

import pytest
import torch
from estimator_checks import bias_in_deviations
from torch import nn

from basis import Transform
from basis.diagnostics.budget import fit_budget, kept_bytes, state_bytes
from basis.estimators.transform import rate_distortion_bound
from basis.linear import SketchedLinear
from basis.ops import gaussian_code, rotation
from basis.ops.noise import fold

GENERATOR = torch.Generator().manual_seed(0)
DEVICE = torch.device("cpu")


def key(seed: int) -> torch.Tensor:
    return torch.tensor(seed)


def data(rows: int = 256, width: int = 16, decay: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with a mean and a spectrum that falls by `decay` a direction, and dY."""
    frame, _ = torch.linalg.qr(torch.randn(width, width, generator=GENERATOR))
    x = (
        torch.randn(rows, width, generator=GENERATOR) * decay ** torch.arange(width)
    ) @ frame.t() + 1.0
    return x, torch.randn(rows, 6, generator=GENERATOR)


def learned(estimator: Transform, x: torch.Tensor) -> dict[str, torch.Tensor]:
    state = estimator.initial_state(x.shape[1], DEVICE)
    for _ in range(20):
        state = estimator.learn(state, x, key(0))
    return state


def test_mean_error_and_bias_are_those_of_the_directions() -> None:
    """Without bias but for the directions that get no bits; variance sum_i |D_i . dY|^2 with the
    code's errors.
    """
    x, grad_y = data()
    estimator = Transform(2.0, directions=1.0)
    state = learned(estimator, x)
    bits = gaussian_code.bits_by_row(state["planes"], 16)
    assert 0 in bits.tolist()
    exact = grad_y.t() @ x
    draws = torch.stack(
        [
            estimator.weight_grad(estimator.compress(x, key(seed), state), grad_y)
            for seed in range(400)
        ]
    )
    coordinates = (x - x.mean(0)) @ state["directions"]
    left_out = grad_y.t() @ (coordinates * (bits == 0)) @ state["directions"].t()
    noise = draws.var(0).sum()
    bias = (draws.mean(0) - (exact - left_out)).square().sum() - noise / len(draws)
    assert float(bias.clamp_min(0).sqrt() / exact.norm()) < 0.01
    # Errors of a direction are spread evenly over the tokens by the rotation, so dY meets them as
    # white noise.
    table = torch.tensor([0.0, *(d / (1 - d) for d in gaussian_code.DISTORTIONS[1:])])
    expected = (coordinates.square().mean(0) * table[bits]).sum() * grad_y.square().sum()
    assert float(noise) == pytest.approx(float(expected), rel=0.15)


def test_without_bias_in_standard_errors() -> None:
    """Normal X, 1 to 5 bits a direction: the mean of 2,000 draws is off by its own chance alone,
    and 1% would be seen.

    96 entries of dW with nearly independent errors: the root of the mean square of their z-scores
    is 1 +- 0.07, and one of them exceeds 4.5 once in 1,500 such tests. 768 tokens: with fewer, what
    this rotation leaves of the bias shows (gaussian_code.py). Keys are folded: those that follow
    each other as integers have the same signs in another order, and draws would hang together.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(768, 16, generator=generator) * 0.85 ** torch.arange(16)
    grad_y = torch.randn(768, 6, generator=generator)
    estimator = Transform(3.0, directions=1.0)
    state = learned(estimator, x)
    assert set(gaussian_code.bits_by_row(state["planes"], 16).tolist()) == {1, 2, 3, 4, 5}
    keys = (torch.tensor(fold("draw", i)) for i in range(2000))
    draws = torch.stack(
        [estimator.weight_grad(estimator.compress(x, k, state), grad_y) for k in keys]
    ).double()
    exact = grad_y.double().t() @ x.double()
    largest, typical = bias_in_deviations(draws, exact)
    assert largest < 4.5
    assert 0.75 < typical < 1.25
    assert bias_in_deviations(0.99 * draws, exact)[1] > 2


def test_distortion_against_the_rate_distortion_bound() -> None:
    """Normal X: within 3 dB up to 2.8 bits a kept direction; more bits, and equal steps lose
    (gaussian_code.py).
    """
    x, _ = data(rows=4096, width=32, decay=0.9)
    for bits, most in ((0.5, 2.0), (1.0, 2.0), (1.5, 2.0), (2.0, 2.3), (4.0, 3.6)):
        estimator = Transform(bits, directions=1.0, left_out=1.0)
        state = learned(estimator, x)
        kept = estimator.compress(x, key(1), state)
        z = ((x - x.mean(0)) @ state["directions"]).t()
        distortion = (estimator.coordinates(kept, len(x)) - z).square().sum() / len(x)
        bound = rate_distortion_bound(z.square().mean(1), bits * 32)
        assert 1.0 < float(distortion / bound) < most


def test_bound_is_water_filling() -> None:
    """Against a bisection on the level, and in closed form for equal variances."""
    variances = torch.tensor([4.0, 1.0, 0.5, 0.01])
    for bits in (0.5, 2.0, 7.0):
        low, high = 0.0, 4.0
        for _ in range(100):
            level = (low + high) / 2
            rate = sum(max(0.5 * math.log2(v / level), 0.0) for v in variances.tolist())
            low, high = (level, high) if rate > bits else (low, level)
        assert float(rate_distortion_bound(variances, bits)) == pytest.approx(
            sum(min(v, level) for v in variances.tolist()), rel=1e-6
        )
    assert float(rate_distortion_bound(torch.full((4,), 3.0), 8.0)) == pytest.approx(4 * 3.0 / 16)


@pytest.mark.parametrize("group", [768, 8, 7])  # 7: three groups of 6, the last one filled up
def test_factors_are_the_same_estimate(group: int) -> None:
    x, grad_y = data()
    estimator = Transform(1.5, group=group)
    kept = estimator.compress(x, key(3), learned(estimator, x))
    factors = estimator.factors(kept, len(x))
    by_factors = (factors.left.t() @ grad_y).t() @ factors.right
    torch.testing.assert_close(
        by_factors, estimator.weight_grad(kept, grad_y), rtol=1e-4, atol=1e-4
    )


def test_groups_of_features_are_coded_with_directions_of_their_own() -> None:
    """16 features in groups of 8, 8: at 8 bits exact; what one group holds is not lost to what
    another one does.
    """
    x, grad_y = data()
    fine = Transform(8.0, directions=1.0, group=8)
    state = learned(fine, x)
    assert state["directions"].shape == (16, 8)
    exact = grad_y.t() @ x
    estimate = fine.weight_grad(fine.compress(x, key(1), state), grad_y)
    assert float((estimate - exact).norm() / exact.norm()) < 0.02
    # The error of few bits: that of the variances within the groups, which are less concentrated.
    errors = {}
    for group in (16, 8, 1):
        estimator = Transform(1.0, directions=1.0, group=group, left_out=1.0)
        state = learned(estimator, x)
        bits = gaussian_code.bits_by_row(state["planes"], 16)
        table = torch.tensor([1.0, *(d / (1 - d) for d in gaussian_code.DISTORTIONS[1:])])
        factors = estimator.factors(estimator.compress(x, key(1), state), len(x))
        errors[group] = float((factors.left @ factors.right - x).square().sum() / len(x))
        assert errors[group] == pytest.approx(
            float((state["variances"] * table[bits]).sum()), rel=0.15
        )
    assert errors[16] < errors[8] < errors[1]
    assert state_bytes(Transform(8.0, directions=1.0), 16) - state_bytes(fine, 16) == 4 * (
        16 * 16 - 16 * 8
    )


def test_rotating_the_gradient_is_rotating_the_kept_back() -> None:
    """Fewer columns than directions: dY is rotated. With columns of zeros beside it Z^ is, and dW
    must be the same.
    """
    x, grad_y = data()
    estimator = Transform(1.5)
    kept = estimator.compress(x, key(3), learned(estimator, x))
    few = grad_y[:, :2]
    assert few.shape[1] < kept[4].shape[1] <= grad_y.shape[1] + x.shape[1]
    many = torch.cat((few, torch.zeros(len(x), x.shape[1])), 1)
    torch.testing.assert_close(
        estimator.weight_grad(kept, few),
        estimator.weight_grad(kept, many)[:2],
        rtol=1e-4,
        atol=1e-4,
    )
    low = estimator.weight_grad(kept, few.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (
        float((low.float() - estimator.weight_grad(kept, few)).norm() / low.float().norm()) < 0.02
    )


def test_low_precision_gradients_meet_the_same_rotation() -> None:
    """4,096 tokens, 64 blocks: a cosine transform made in bfloat16 would be another one (dW then
    off by 14%).
    """
    x, grad_y = data(rows=4096)
    estimator = Transform(6.0, directions=1.0)
    kept = estimator.compress(x, key(3), learned(estimator, x))
    with torch.autocast("cpu", torch.bfloat16):
        low = estimator.weight_grad(kept, grad_y.bfloat16())
    assert float((low.float() - grad_y.t() @ x).norm() / (grad_y.t() @ x).norm()) < 0.02


def test_scale_keeps_the_energy_under_autocast_too() -> None:
    """<z^, z> = |z|^2 in each direction that has bits, to rounding."""
    x, _ = data()
    estimator = Transform(4.0, directions=1.0)
    state = learned(estimator, x)
    with torch.autocast("cpu", torch.bfloat16):
        kept = estimator.compress(x, key(3), state)
        found = estimator.coordinates(kept, len(x))
    along = state["directions"].t()
    z = (along.bfloat16() @ x.t().bfloat16()).float() - (along @ x.mean(0))[
        :, None
    ]  # the product is autocast's
    bits = gaussian_code.bits_by_row(state["planes"], 16)
    ratio = ((found * z).sum(1) / z.square().sum(1))[bits > 0]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("group", "backend"),
    [(768, "aot_eager"), (7, "aot_eager"), pytest.param(7, "inductor", marks=pytest.mark.slow)],
)
def test_compiled_fake_in_inference_and_under_a_transform(group: int, backend: str) -> None:
    """Whatever touches the remembered matrices first, what comes after is the same."""
    x, grad_y = data()
    estimator = Transform(2.0, group=group)
    state = learned(estimator, x)

    def gradient(
        x: torch.Tensor, grad_y: torch.Tensor, key: torch.Tensor, state: dict
    ) -> torch.Tensor:
        return estimator.weight_grad(estimator.compress(x, key, state), grad_y)

    torch.manual_seed(0)
    layer = SketchedLinear.from_linear(nn.Linear(16, 6), estimator).eval()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    for first in ("fake", "inference", "transform", "compiled"):
        rotation._remembered.cache_clear()
        if first == "fake":
            assert kept_bytes(estimator, 256, 16) > 0
        elif first == "inference":
            with torch.inference_mode():
                gradient(x, grad_y, key(1), state)
        elif first == "transform":
            torch.func.grad(lambda p: torch.func.functional_call(layer, p, x).sum())(parameters)
        else:
            compiled = torch.compile(gradient, fullgraph=True, backend=backend)(
                x, grad_y, key(1), state
            )
            torch.testing.assert_close(
                compiled, gradient(x, grad_y, key(1), state), rtol=1e-4, atol=1e-4
            )
        for matrix in rotation.mixers(4, x):
            assert not matrix.is_inference()
            assert matrix.data_ptr() != 0, "a wrapper of a transform has no storage"
        layer(x).backward(grad_y)
    assert layer.weight.grad is not None


@pytest.mark.parametrize(("width", "group"), [(769, 768), (5, 2)])
def test_every_value_of_the_knob_can_be_had(width: int, group: int) -> None:
    """Groups filled up have more directions than there are features."""
    estimator = Transform(1.0, directions=1.0, group=group)
    assert estimator.tracked(width) == width + 1
    assert fit_budget(estimator, 0.9, 256, width).bits == 8.0


@pytest.mark.parametrize(
    ("rows", "groups", "filled"), [(256, 1, 256), (100, 1, 128), (4200, 2, 2 * 33 * 64)]
)
def test_bytes_kept(rows: int, groups: int, filled: int) -> None:
    planes, tracked, width = 24, 8, 16
    expected = planes * filled // 8 + 4 * tracked * groups + 4 * width + 8
    assert kept_bytes(Transform(1.5, directions=0.5), rows, width) == expected
    assert kept_bytes(Transform(1.5, directions=0.5), rows, width, torch.bfloat16) == expected


@pytest.mark.parametrize(
    ("bits", "tracked"), [(1.0, 45), (4 / 3, 60), (2.0, 90), (2.25, 100), (8.0, 100), (0.001, 1)]
)
def test_without_a_wish_as_many_directions_as_can_use_the_bits(bits: float, tracked: int) -> None:
    estimator = Transform(bits)
    assert estimator.tracked(100) == tracked
    assert len(estimator.initial_state(100, torch.device("cpu"))["variances"]) == tracked


@pytest.mark.parametrize("share", [1 / 4, 1 / 8, 1 / 24, 1 / 48])
@pytest.mark.parametrize("width", [128, pytest.param(512, marks=pytest.mark.slow)])
def test_budgets_are_met(share: float, width: int) -> None:
    fitted = fit_budget(Transform(1.0), share, 768, width)
    assert 0.97 * share < kept_bytes(fitted, 768, width) / (4 * 768 * width) <= share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_learns_and_trains_in_either_precision(dtype: torch.dtype) -> None:
    x, grad_y = data()
    torch.manual_seed(0)
    layer = SketchedLinear.from_linear(nn.Linear(16, 6), Transform(6.0, directions=1.0))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for _ in range(3):
            layer.weight.grad = None
            layer(x).backward(grad_y.to(dtype))
    exact = grad_y.t() @ x
    assert float((layer.weight.grad - exact).norm() / exact.norm()) < 0.05
    assert layer.state["looks"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0.0}, r"bits=0\.0"),
        ({"bits": 9.0}, r"bits=9\.0"),
        ({"bits": 1.0, "directions": 0.0}, r"directions=0\.0"),
        ({"bits": 1.0, "every": 0}, "every=0"),
        ({"bits": 1.0, "left_out": 0.5}, r"left_out=0\.5"),
        ({"bits": 1.0, "group": 0}, "group=0"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Transform(**options)
