"""dY in the place of logits, by PyTorch's operators and by the Triton kernel, against a softmax in
float64; and products that are added up.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from basis.ops import kernels, softmax
from basis.ops.softmax import add_product, softmax_gradient_

KINDS = [
    "plain",
    pytest.param("kernel", marks=pytest.mark.skipif(not kernels._INSTALLED, reason="needs triton")),
]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.forced(request.param == "kernel"):
        yield request.param


def logits(rows: int, classes: int, padded: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * classes)
    y = 4 * torch.randn(rows, padded, generator=generator)
    return y.to(dtype), torch.randint(classes, (rows,), generator=generator)


def expected(y: Tensor, targets: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and dY in float64, by definition."""
    y = y.double()
    p = y.exp() / y.exp().sum(1, keepdim=True)
    losses = -p.gather(1, targets[:, None])[:, 0].log()
    onehot = torch.zeros_like(p).scatter_(1, targets[:, None], 1.0)
    return losses, shares.double()[:, None] * (p - onehot)


@pytest.mark.parametrize(
    ("classes", "padded"),
    [(1, 1), (1, 64), (5, 64), (64, 64), (211, 256), (211, 211), (4096, 4096), (8200, 8256)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_and_loss_of_each_row(
    kind: str, classes: int, padded: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "_PIECE", 2 * classes)  # the plain way: two rows at a time
    y, targets = logits(5, classes, padded, dtype)
    if classes > 64:
        y[1, :classes] -= 300.0  # no exponential of it is a number
        y[2, :classes] += 300.0
    shares = torch.tensor([0.2, 0.2, 0.5, 0.0, 1.0])
    losses, squares = torch.empty(2, 5)
    exact = y[:, :classes].double()
    wanted_losses, wanted = expected(exact - exact.amax(1, True), targets, shares)
    softmax_gradient_(y, classes, targets, shares, losses, squares)
    torch.testing.assert_close(losses.double(), wanted_losses, rtol=1e-5, atol=1e-5)
    # bfloat16: rounded once, half a unit of its 8 binary digits; Triton's interpreter cuts them off
    low = 2**-7 if kind == "kernel" else 2**-8
    tolerance = low if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(y[:, :classes].double(), wanted, rtol=tolerance, atol=1e-7)
    assert not y[:, classes:].any()
    torch.testing.assert_close(squares.double(), wanted.square().sum(1), rtol=1e-4, atol=1e-12)


def test_rows_of_a_larger_buffer_and_no_others_are_written(kind: str) -> None:
    buffer, targets = logits(6, 211, 256, torch.bfloat16)
    before = buffer.clone()
    losses, squares = torch.empty(2, 3)
    softmax_gradient_(buffer[1:4], 211, targets[1:4], torch.ones(3), losses, squares)
    assert torch.equal(buffer[[0, 4, 5]], before[[0, 4, 5]])
    assert not torch.equal(buffer[1:4], before[1:4])


def test_float64_is_left_to_operators() -> None:
    y, targets = logits(3, 7, 7, torch.float64)
    shares = torch.ones(3, dtype=torch.float64)
    losses, squares = torch.empty(2, 3, dtype=torch.float64)
    wanted_losses, wanted = expected(y, targets, shares)
    with kernels.forced():
        softmax_gradient_(y, 7, targets, shares, losses, squares)
    torch.testing.assert_close((losses, y), (wanted_losses, wanted), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_added_up_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand small ones on a large number, which would not move in bfloat16."""
    monkeypatch.setattr(softmax, "_LENGTH", 3)  # some rows at a time
    a, b = torch.full((7, 2), 0.5, dtype=dtype), torch.ones(2, 5, dtype=dtype)
    total = torch.full((7, 5), 1000.0)
    for _ in range(1000):
        assert add_product(total, a, b) is total
    assert torch.equal(total, torch.full((7, 5), 2000.0))
