"""The kernels of transform coding, in Triton's interpreter, against the plain operators."""

import pytest
import torch

from basis import Transform
from basis.ops import gaussian_code, kernels, rotation

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("forced")


@pytest.fixture
def key() -> torch.Tensor:
    return torch.tensor(0x3ABCDEF987654321)


def planes(*bits: int) -> torch.Tensor:
    return torch.tensor([8 * row + bit for row, count in enumerate(bits) for bit in range(count)])


@pytest.mark.parametrize("count", [1, 64, 100, 1000, 4096, 4100])  # the last is two chunks
def test_codes_scales_and_numbers_are_those_of_the_operators(count: int, key: torch.Tensor) -> None:
    bits = (1, 0, 8, 3, 2, 0, 5)
    z = torch.randn(7, count, generator=torch.Generator().manual_seed(count))
    z[3] = 2.0  # nothing is left of it
    shift = torch.tensor([0.0, 1.0, -0.5, 2.0, 3.0, 0.0, 1e-3])
    packed, scale = gaussian_code.compress(z.clone(), shift, key, planes(*bits))
    with kernels.forced(False):
        expected = gaussian_code.compress(z.clone(), shift, key, planes(*bits))
    assert packed.shape == expected[0].shape
    torch.testing.assert_close(scale, expected[1], rtol=1e-5, atol=1e-6)
    other = gaussian_code.unpack_planes(packed) != gaussian_code.unpack_planes(expected[0])
    assert other.double().mean() < 1e-4, "a number within rounding of a boundary"
    restored = gaussian_code.restore(packed, scale, key, planes(*bits), count, torch.float32)
    with kernels.forced(False):
        again = gaussian_code.restore(packed, scale, key, planes(*bits), count, torch.float32)
    torch.testing.assert_close(restored, again, rtol=1e-5, atol=1e-5)
    assert (restored[[1, 3, 5]] == 0).all()
    if count >= 1000:
        centred = z - shift[:, None]
        error = (restored - centred).square().mean(1) / centred.square().mean(1)
        for row in (0, 2, 4, 6):
            distortion = gaussian_code.DISTORTIONS[bits[row]]
            assert float(error[row]) == pytest.approx(distortion / (1 - distortion), rel=0.4)


@pytest.mark.parametrize(("width", "group"), [(24, 768), (25, 12)])
@pytest.mark.parametrize("outputs", [3, 40])
def test_a_weight_gradient_is_that_of_the_operators(
    width: int, group: int, outputs: int, key: torch.Tensor
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, width, generator=generator) + 1.0
    grad_y = torch.randn(150, outputs, generator=generator)
    estimator = Transform(2.0, directions=0.6, group=group)
    state = estimator.initial_state(width, x.device)
    for _ in range(3):
        state = estimator.learn(state, x, key)
    found = estimator.weight_grad(estimator.compress(x, key, state), grad_y)
    with kernels.forced(False):
        expected = estimator.weight_grad(estimator.compress(x, key, state), grad_y)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_kernels_are_what_runs(key: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("plain")

    for name in ("encode", "decode", "rotate", "rotate_back"):
        monkeypatch.setattr(gaussian_code, name, broken)
    monkeypatch.setattr(rotation, "rotate", broken)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    estimator = Transform(2.0)
    kept = estimator.compress(x, key, estimator.initial_state(8, x.device))
    assert estimator.weight_grad(kept, x[:, :3]).shape == (3, 8)
