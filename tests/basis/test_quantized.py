"""Rounding to a few bits: unbiased, variance as derived, nothing clipped, codes packed without
loss.
"""

import itertools

import oracle as reference
import pytest
import torch
import torch.nn.functional as F
from estimator_checks import assert_unbiased, assert_variance, data, draws, estimate, key, relative

from basis import Quantized
from basis.diagnostics.budget import counted_bytes, kept_bytes
from basis.ops.bits import pack, unit, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 13, 64])
def test_packed_codes_come_back(bits: int, count: int) -> None:
    codes = torch.randint(1 << bits, (count, 3), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    packed = pack(codes, bits)
    per_unit, size = unit(bits)
    assert packed.shape == (-(-count // per_unit) * size, 3)
    assert size / per_unit == bits / 8
    assert torch.equal(unpack(packed, bits, count), codes)
    end = count // per_unit * per_unit  # the codes of some rows are in the bytes of those rows
    assert torch.equal(packed[: end // per_unit * size], pack(codes[:end], bits))
    assert torch.equal(unpack(pack(codes[:, 0], bits), bits, count), codes[:, 0])


def ranges(estimator: Quantized, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """lo and step of each number, as kept."""
    _, kept, *_ = estimator.compress(x, key(0), {})
    pair = kept.view(torch.bfloat16).unflatten(1, (-1, 2)).double()  # as little-endian machines do
    wide = pair.repeat_interleave(min(estimator.group, x.shape[1]), 1)[:, : x.shape[1]]
    low, step = wide.unbind(-1)
    return low, step


@pytest.mark.parametrize(
    ("bits", "dither"),
    [
        (1, "none"),
        (1.75, "subtractive"),
        *(
            pytest.param(bits, dither, marks=pytest.mark.slow)
            for bits, dither in itertools.product((1, 2, 4, 1.75), ("subtractive", "none"))
            if (bits, dither) not in {(1, "none"), (1.75, "subtractive")}
        ),
    ],
)
def test_unbiased_and_variance_as_derived(dither: str, bits: float) -> None:
    x, dy = data(24, 9)
    estimator = Quantized(bits, group=4, dither=dither)  # groups of 4, 4 and 1
    estimates = draws(estimator, x, dy, 1500)
    assert_unbiased(estimates, dy.t() @ x)
    each = reference.rounding_variance(x, *ranges(estimator, x), dither)
    assert_variance(estimates, dy.t() @ x, float((dy.square().sum(1)[:, None] * each).sum()))


@pytest.mark.parametrize("name", ["LayerNorm", "GELU"])
def test_subtractive_dither_about_halves_the_variance(name: str) -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    x = F.layer_norm(x, (256,)) if name == "LayerNorm" else F.gelu(x)
    errors = {}
    for dither in ("subtractive", "none"):
        estimator = Quantized(4, dither=dither)
        errors[dither] = float(
            (estimator.factors(estimator.compress(x, key(1), {}), 256).left - x).square().mean()
        )
    assert errors["subtractive"] / errors["none"] == pytest.approx(
        {"LayerNorm": 0.505, "GELU": 0.56}[name], abs=0.02
    )


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_errors_stay_within_half_a_step_at_the_ends_of_the_range_too(
    bits: int, scale: float
) -> None:
    x = (
        torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 3, 64)[:, None]
    )
    x = (x + 0.1 * x.abs().amax(1, keepdim=True)) * scale
    estimator = Quantized(bits, group=8)
    low, step = ranges(estimator, x)
    exact_step = (x.double().unfold(1, 8, 8).amax(-1) - x.double().unfold(1, 8, 8).amin(-1)) / (
        2**bits - 1
    )
    assert (step[:, :32:8] >= exact_step).all()
    assert (low <= x).all()
    for i in range(30):
        error = estimator.factors(estimator.compress(x, key(i), {}), 64).left.double() - x
        assert (error.abs() <= 0.5001 * step + 1e-6 * x.abs()).all()


def test_numbers_that_are_all_alike_come_back() -> None:
    x = torch.full((8, 16), 3.3).double()
    assert relative(Quantized(8).factors(Quantized(8).compress(x, key(1), {}), 8).left, x) < 1e-4
    assert torch.equal(
        Quantized(1).factors(Quantized(1).compress(0 * x, key(1), {}), 8).left, 0 * x
    )


@pytest.mark.parametrize("bits", [3, 4, 2.5, 7.75])
def test_blocks_of_rows_change_nothing(bits: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = data(45, 9)
    whole = estimate(Quantized(bits), x, dy, key(1))
    monkeypatch.setattr("basis.ops.matrix._CACHED", 1)
    torch.testing.assert_close(estimate(Quantized(bits), x, dy, key(1)), whole)


def test_each_bit_halves_the_error() -> None:
    x, dy = data(200, 64)
    errors = [relative(estimate(Quantized(bits), x, dy, key(1)), dy.t() @ x) for bits in (4, 6, 8)]
    assert errors[0] / errors[1] == pytest.approx(63 / 15, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(255 / 63, rel=0.25)


def test_a_share_of_the_rows_has_a_bit_more() -> None:
    """At 2.5 bits the first half of the rows is what 3 bits make of it, the rest what 2 bits do;
    bytes are the mean.
    """
    x, _ = data(64, 33)
    halves = {bits: Quantized(bits, group=8).compress(x, key(1), {}) for bits in (2, 2.5, 3)}
    left = {bits: Quantized(bits, group=8).factors(kept, 64).left for bits, kept in halves.items()}
    assert torch.equal(left[2.5][:32], left[3][:32])
    assert torch.equal(left[2.5][32:], left[2][32:])
    size = {bits: kept[0].nbytes for bits, kept in halves.items()}
    assert size[2.5] == (size[2] + size[3]) / 2
    assert len(Quantized(1.5).compress(x[:3], key(1), {})[0]) == 1, (
        "too few rows for a finer part of 8"
    )


def test_the_formula_of_bytes_is_what_is_kept() -> None:
    bits = (1, 1.0625, 1.5, 2, 2.9375, 3, 4, 5.25, 6, 7.5, 8)
    sizes, groups = ((1, 1), (13, 7), (48, 20), (301, 130)), (1, 8, 128)
    for (rows, width), group, some in itertools.product(sizes, groups, bits):
        for dtype in (torch.float16, torch.float32):
            estimator = Quantized(some, group)
            kept = estimator.compress(torch.ones(rows, width, dtype=dtype), key(1), {})
            size = sum(t.untyped_storage().nbytes() for t in kept)
            assert estimator.bytes_of(rows, width, dtype) == size, (estimator, rows, width)
            whole = rows * width * dtype.itemsize
            assert kept_bytes(estimator, rows, width, dtype) == min(size, whole)


@pytest.mark.parametrize("some", [1.5, 8])
def test_the_formula_of_bytes_is_the_count(some: float) -> None:
    for rows, width, dtype in ((8, 4, torch.float32), (4096, 11008, torch.bfloat16)):
        args = (Quantized(some), rows, width, dtype)
        assert kept_bytes(*args) == counted_bytes(*args)
