"""The code for nearly normal numbers: error against the theory, bias, bits, bytes."""

import math

import pytest
import torch

from basis.ops import gaussian_code, rotation
from basis.ops.gaussian_code import DISTORTIONS, MOST_BITS, best_steps


def key(seed: int) -> torch.Tensor:
    return torch.tensor(seed)


def normal(rows: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, count, generator=torch.Generator().manual_seed(seed))


def planes(*bits: int) -> torch.Tensor:
    return torch.tensor(
        [MOST_BITS * row + bit for row, count in enumerate(bits) for bit in range(count)]
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_steps_and_distortions_are_those_of_a_normal_variable(bits: int) -> None:
    """By integrating the normal density: the error is the tabled one, and neither a larger nor a
    smaller step does better.
    """
    z = torch.linspace(-9, 9, 2_000_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * (z[1] - z[0])

    def error(step: float) -> float:
        half = 2 ** (bits - 1)
        code = torch.floor(z / step).clamp(-half, half - 1) + 0.5
        return float((weight * (z - code * step).square()).sum())

    step = best_steps()[bits]
    assert error(step) == pytest.approx(DISTORTIONS[bits], rel=2e-3)
    assert error(step) <= min(error(0.99 * step), error(1.01 * step))


@pytest.mark.parametrize("bits", range(1, 9))
def test_error_is_that_of_the_docstring(bits: int) -> None:
    z = normal(2, 1 << 17)[:, None]
    packed, scale = gaussian_code.encode(z, planes(bits, bits))
    error = (
        gaussian_code.decode(packed, scale, planes(bits, bits)) - z
    ).square().mean() / z.square().mean()
    assert float(error) == pytest.approx(DISTORTIONS[bits] / (1 - DISTORTIONS[bits]), rel=0.03)


@pytest.mark.parametrize(
    ("count", "shape"), [(50, (1, 64)), (150, (1, 192)), (4096, (1, 4096)), (4100, (2, 33 * 64))]
)
def test_rotation_is_orthogonal_and_undone(count: int, shape: tuple[int, int]) -> None:
    z = normal(3, count)
    rotated = rotation.rotate(z, key(5))
    assert rotated.shape == (3, *shape)
    flat = rotated.flatten(1)
    torch.testing.assert_close(flat @ flat.t(), z @ z.t(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        rotation.rotate_back(rotated, key(5), count), z, rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(rotated, rotation.rotate(z, key(6)))


def coded(z: torch.Tensor, chosen: torch.Tensor, seed: int) -> torch.Tensor:
    packed, scale = gaussian_code.encode(rotation.rotate(z, key(seed)), chosen)
    return rotation.rotate_back(gaussian_code.decode(packed, scale, chosen), key(seed), z.shape[1])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_without_bias_over_rotations_whatever_the_distribution(bits: int) -> None:
    """Numbers as far from normal as GELU's outputs: the mean over keys comes as near as its own
    noise allows.
    """
    z = torch.nn.functional.gelu(2 * normal(1, 256)) - 0.5
    draws = torch.stack([coded(z, planes(bits), seed) for seed in range(400)])
    error = draws.mean(0) - z
    noise = draws.var(0).sum() / len(
        draws
    )  # of the mean itself: the share of |error|^2 that is chance
    bias = (error.square().sum() - noise).clamp_min(0).sqrt() / z.norm()
    assert float(bias) < {1: 0.06, 2: 0.03, 4: 0.01}[bits]  # one draw is off by 0.75, 0.37 and 0.11


def test_without_rotation_a_bias_is_seen_by_the_same_measure() -> None:
    z = torch.nn.functional.gelu(2 * normal(1, 256)) - 0.5
    packed, scale = gaussian_code.encode(z[:, None], planes(1))
    assert float((gaussian_code.decode(packed, scale, planes(1))[:, 0] - z).norm() / z.norm()) > 0.3


def test_rows_have_bits_of_their_own_and_rows_without_are_zero() -> None:
    z = (normal(4, 1 << 14) * torch.tensor([4.0, 2.0, 1.0, 0.1])[:, None])[:, None]
    chosen = planes(4, 2, 1, 0)
    packed, scale = gaussian_code.encode(z, chosen)
    assert packed.shape == (7, 1, z.shape[2] // 8)
    back = gaussian_code.decode(packed, scale, chosen)
    errors = (back - z).square().mean((1, 2)) / z.square().mean((1, 2))
    for row, bits in enumerate((4, 2, 1)):
        assert float(errors[row]) == pytest.approx(
            DISTORTIONS[bits] / (1 - DISTORTIONS[bits]), rel=0.1
        )
    assert (back[3] == 0).all()


@pytest.mark.parametrize("count", [100, 4200])
def test_blocks_of_rows_change_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 rows in blocks of 8, of which the second has no planes."""
    z = normal(20, count)
    chosen = planes(*[3, 1] * 4, *[0] * 8, *[2, 0] * 2)
    whole = coded(z, chosen, 1)
    monkeypatch.setattr("basis.ops.matrix._CACHED", 1)
    torch.testing.assert_close(coded(z, chosen, 1), whole)


def test_rows_of_zeros_stay_zeros() -> None:
    z = torch.zeros(2, 1, 64)
    packed, scale = gaussian_code.encode(z, planes(3, 1))
    assert (gaussian_code.decode(packed, scale, planes(3, 1)) == 0).all()


def test_packing() -> None:
    bits = torch.randint(2, (3, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = gaussian_code.pack_planes(bits)
    assert packed.shape == (3, 8)
    assert torch.equal(gaussian_code.unpack_planes(packed), bits)


@pytest.mark.parametrize("left_out", [1.0, 2.0])
def test_allocation_is_the_best_of_all(left_out: float) -> None:
    """Against every way to give 7 bits to 4 rows."""
    variances = torch.tensor([1.0, 0.4, 0.1, 0.02])
    table = [left_out, *(d / (1 - d) for d in DISTORTIONS[1:])]
    errors = {
        bits: sum(v * table[b] for v, b in zip(variances.tolist(), bits, strict=True))
        for bits in (
            (a, b, c, 7 - a - b - c)
            for a in range(8)
            for b in range(8 - a)
            for c in range(8 - a - b)
        )
    }
    chosen = gaussian_code.allocate(variances, 7, left_out)
    found = tuple(gaussian_code.bits_by_row(chosen, 4).tolist())
    assert errors[found] <= min(errors.values()) * (1.0 if left_out == 2.0 else 1.01)
    for row, bits in enumerate(found):  # of each row the lowest bits
        assert sorted(int(p) % MOST_BITS for p in chosen if int(p) // MOST_BITS == row) == list(
            range(bits)
        )


def test_no_row_has_a_second_bit_without_a_first() -> None:
    variances = torch.rand(64, generator=torch.Generator().manual_seed(0)) ** 4
    variances[::3] = 0.0
    for left_out in (1.0, 1.005, 2.0):
        for planes in range(1, 8 * 64 + 1):
            chosen = gaussian_code.allocate(variances, planes, left_out)
            present = torch.zeros(64 * MOST_BITS).index_fill_(0, chosen, 1.0).view(64, MOST_BITS)
            assert (present.diff(dim=1) <= 0).all()
