"""The kernels of quantised rows, in Triton's interpreter, against the plain operators: the same
codes, ranges and numbers; and against the formula in float64.
"""

import pytest
import torch

from basis import Quantized
from basis.ops import group_code, kernels

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("forced")

SHAPES = [
    # rows, width, group
    (16, 64, 32),
    (13, 33, 8),  # neither rows nor columns divide
    (9, 1, 128),  # one column
    (1, 40, 128),  # one row, a group wider than the matrix
    (21, 130, 128),
    (300, 20, 3),  # several programs
]
BITS = [1, 2, 3, 4, 5, 6, 7, 8, 2.5, 7.75]
# Each width of a code and each shape; all with all are slow.
QUICK = {(1, 0), (2, 1), (3, 2), (4, 5), (5, 4), (6, 0), (7, 3), (8, 1), (2.5, 4), (7.75, 2)}


@pytest.fixture
def key() -> torch.Tensor:
    return torch.tensor(0x3ABCDEF987654321)


def plain(x: torch.Tensor, key: torch.Tensor, bits: float, group: int) -> list[torch.Tensor]:
    with kernels.forced(False):
        return list(group_code.encode(x, key, bits, group))


@pytest.mark.parametrize(
    ("bits", "shape"),
    [
        pytest.param(bits, shape, marks=() if (bits, number) in QUICK else pytest.mark.slow)
        for bits in BITS
        for number, shape in enumerate(SHAPES)
    ],
)
def test_codes_ranges_and_numbers_are_those_of_the_operators(
    bits: float, shape: tuple[int, int, int], key: torch.Tensor
) -> None:
    rows, width, group = shape
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)) ** 3
    codes, ranges = group_code.encode(x, key, bits, group)
    expected = plain(x, key, bits, group)
    assert torch.equal(codes, expected[0])
    assert torch.equal(ranges, expected[1])
    for dithered in (True, False):
        form = group_code.Form(bits, group, dithered, torch.float32)
        restored = group_code.decode(codes, ranges, key, form)
        with kernels.forced(False):
            assert torch.equal(restored, group_code.decode(codes, ranges, key, form))
        low, step = group_code.unpack_ranges(ranges, torch.float64)
        wide = [t.repeat_interleave(min(group, width), 1)[:, :width] for t in (low, step)]
        most = (0.5001 if dithered else 1.0001) * wide[1]
        assert ((restored.double() - x.double()).abs() <= most + 1e-6 * x.abs()).all()


def test_the_kernels_are_what_runs(key: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("plain")

    monkeypatch.setattr(group_code, "_encode", broken)
    monkeypatch.setattr(group_code, "_decode", broken)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    kept = Quantized(4).compress(x, key, {})
    assert Quantized(4).factors(kept, 16).left.shape == x.shape
    with pytest.raises(AssertionError, match="plain"):
        Quantized(4).compress(x.double(), key, {})  # for which there is no kernel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once(dtype: torch.dtype, key: torch.Tensor) -> None:
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = group_code.encode(x, key, 4, 16)
    assert torch.equal(kept[0], plain(x, key, 4, 16)[0])
    form = group_code.Form(4, 16, True, dtype)
    with kernels.forced(False):
        expected = group_code.decode(*kept, key, form)
    torch.testing.assert_close(group_code.decode(*kept, key, form), expected, rtol=2**-7, atol=0)


def test_an_input_of_any_strides_is_read_in_place(key: torch.Tensor) -> None:
    wide = torch.randn(3, 24, 50, generator=torch.Generator().manual_seed(0))
    for x in (wide[1, :, 5:45], wide[0].t(), wide[:, 0].expand(3, 50), wide[2, ::2, ::3]):
        codes, ranges = group_code.encode(x, key, 3, 16)
        expected = plain(x.contiguous(), key, 3, 16)
        assert torch.equal(codes, expected[0])
        assert torch.equal(ranges, expected[1])
