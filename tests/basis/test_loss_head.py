"""The fused head: its loss and gradients against F.cross_entropy of F.linear, and everything that
must lead around it.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis import BalancedSketch, Exact, linear_cross_entropy
from basis.estimator import Estimator
from basis.head_sizes import SIZES, Sizes, blocks_of
from basis.linear import SketchedLinear

ROWS, IN, CLASSES = 12, 8, 37


@pytest.fixture(params=["cpu", "cuda"], ids=["vocabulary-major", "row-major"], autouse=True)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs with the blocks of either device, on the CPU."""
    with blocks_of(request.param):
        yield request.param


@pytest.fixture(
    params=[ROWS, 4, 1], ids=["one block", "blocks of 4 rows", "row by row"], autouse=True
)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every test runs with the logits whole and in blocks."""
    rows = request.param
    for kind in SIZES:
        monkeypatch.setitem(SIZES, kind, Sizes(1, least=rows))
    return rows


def head(
    estimator: Estimator | None = None, dtype: torch.dtype = torch.float64, bias: bool = False
) -> nn.Linear:
    torch.manual_seed(0)
    plain = nn.Linear(IN, CLASSES, bias=bias, dtype=dtype)
    return plain if estimator is None else SketchedLinear.from_linear(plain, estimator)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(3, 4, IN, generator=generator, dtype=dtype)
    return x.requires_grad_(), torch.randint(CLASSES, (3, 4), generator=generator)


def unfused(layer: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(layer(x).flatten(0, -2), targets.flatten())


@pytest.mark.parametrize("estimator", [None, Exact()], ids=["nn.Linear", "Exact"])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_exact_head_equals_cross_entropy_of_linear(
    estimator: Estimator | None, factor: float
) -> None:
    layer, (x, targets) = head(estimator), batch()
    loss = linear_cross_entropy(layer, x, targets)
    expected_loss = unfused(head(), x, targets)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-13, atol=0)
    got = torch.autograd.grad(factor * loss, (x, layer.weight))
    plain = head()
    expected = torch.autograd.grad(factor * unfused(plain, x, targets), (x, plain.weight))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("rank", [1, 5, 9, 64])
@pytest.mark.parametrize("scalars", [True, False])
def test_sketched_head_equals_the_sketched_layer_before_a_cross_entropy(
    rank: int, scalars: bool
) -> None:
    layer, (x, targets) = (
        head(BalancedSketch(rank, invariant_scalars=scalars, shrinkage=0.01)),
        batch(),
    )
    assert isinstance(layer, SketchedLinear)
    layer.set_noise_key(7)
    fused, plain = linear_cross_entropy(layer, x, targets), unfused(layer, x, targets)
    got, expected = (torch.autograd.grad(loss, (x, layer.weight)) for loss in (fused, plain))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)
    exact = torch.autograd.grad(unfused(layer.original(), x, targets), layer.weight)[0]
    assert rank >= ROWS or not torch.allclose(got[1], exact, rtol=0.05)


def test_large_logits_do_not_overflow_and_float32_keeps_its_digits() -> None:
    layer, (x, targets) = head(dtype=torch.float32), batch(torch.float32)
    x = (1e4 * x).detach().requires_grad_()
    loss = linear_cross_entropy(layer, x, targets)
    torch.testing.assert_close(loss, unfused(layer, x, targets), rtol=1e-6, atol=0)
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_under_autocast_products_are_low_and_the_loss_is_float32() -> None:
    layer, (x, targets) = head(dtype=torch.float32), batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(layer, x, targets)
    assert loss.dtype == torch.float32
    grad_x, grad_weight = torch.autograd.grad(loss, (x, layer.weight))
    assert (grad_x.dtype, grad_weight.dtype) == (torch.float32, torch.float32)
    expected = torch.autograd.grad(unfused(layer, x, targets), (x, layer.weight))
    for got, exact in zip((grad_x, grad_weight), expected, strict=True):
        assert (got - exact).norm() < 0.02 * exact.norm()


# Of all: test_head_blocks.py.
@pytest.mark.parametrize(("kind", "blocks"), [("cuda", 4)], indirect=True)
def test_compiled_without_a_break(kind: str, blocks: int) -> None:
    layer, (x, targets) = head(BalancedSketch(4), torch.float32), batch(torch.float32)
    assert isinstance(layer, SketchedLinear)
    layer.set_noise_key(7)
    compiled = torch.compile(
        lambda x: linear_cross_entropy(layer, x, targets), fullgraph=True, backend="aot_eager"
    )
    got = torch.autograd.grad(2 * compiled(x), (x, layer.weight))
    expected = torch.autograd.grad(2 * linear_cross_entropy(layer, x, targets), (x, layer.weight))
    torch.testing.assert_close(got, expected)


def test_functional_gradient() -> None:
    layer, (x, targets) = head(), batch()

    def loss(weight: Tensor) -> Tensor:
        return torch.func.functional_call(
            _Head(layer), {"layer.weight": weight}, (x.detach(), targets)
        )

    got = torch.func.grad(loss)(layer.weight.detach())
    torch.testing.assert_close(
        got, torch.autograd.grad(unfused(layer, x, targets), layer.weight)[0]
    )
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.func.grad(lambda w: torch.func.grad(loss)(w).sum())(layer.weight.detach())


class _Head(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(self.layer, x, targets)


def test_what_is_frozen_gets_no_gradient() -> None:
    layer, (x, targets) = head(), batch()
    layer.weight.requires_grad_(False)
    (grad,) = torch.autograd.grad(linear_cross_entropy(layer, x, targets), x)
    torch.testing.assert_close(grad, torch.autograd.grad(unfused(layer, x, targets), x)[0])
    layer.weight.requires_grad_(True)
    linear_cross_entropy(layer, x.detach(), targets).backward()
    assert layer.weight.grad is not None


def test_kept_are_the_two_gradients_and_no_logits() -> None:
    layer, (x, targets) = head(), batch()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = linear_cross_entropy(layer, x, targets)
    assert loss.requires_grad
    assert sorted(t.numel() for t in saved) == sorted([ROWS * IN, CLASSES * IN])


@pytest.mark.parametrize("kind", ["bias", "hook", "no grad", "float16"])
def test_the_unfused_way_where_it_is_needed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, (x, targets) = head(bias=kind == "bias"), batch()
    if (
        kind == "float16"
    ):  # its small gradients need the scale of the loss, which is known in backward only
        layer, x = layer.half(), x.detach().half().requires_grad_()
        monkeypatch.setattr("basis.loss_head._LinearCrossEntropyFunction", None)
        scaled = 32768 * linear_cross_entropy(layer, x, targets)
        assert torch.autograd.grad(scaled, layer.weight)[0].count_nonzero() == layer.weight.numel()
        return
    seen: list[Tensor] = []
    if kind == "hook":
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.set_grad_enabled(kind != "no grad"):
        loss = linear_cross_entropy(layer, x, targets)
    torch.testing.assert_close(loss, unfused(layer, x, targets), rtol=1e-13, atol=0)
    assert len(seen) == (2 if kind == "hook" else 0)
    assert loss.requires_grad == (kind != "no grad")


class Unfactored(Exact):
    """An estimator that needs dY whole, as the README's example does."""

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> None:
        return None


def test_an_estimator_without_factors_is_given_the_whole_gradient() -> None:
    layer, (x, targets) = head(Unfactored()), batch()
    got = torch.autograd.grad(linear_cross_entropy(layer, x, targets), (x, layer.weight))
    torch.testing.assert_close(
        got, torch.autograd.grad(unfused(layer.original(), x, targets), (x, layer.weight))
    )


def test_never_more_than_a_block_of_logits(blocks: int) -> None:
    """No tensor of forward or backward has more rows of V numbers than a block (the gradient's own
    N rows aside).
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    layer, (x, targets) = head(BalancedSketch(2, shrinkage=0.01)), batch()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if (
                    isinstance(tensor, Tensor)
                    and CLASSES in tensor.shape
                    and IN not in tensor.shape
                ):
                    largest = max(largest, tensor.numel() // CLASSES)
            return result

    with Watch():
        linear_cross_entropy(layer, x, targets).backward()
    assert largest == max(blocks, 2)  # or the sketch's own R rows


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_rows_or_values_it_is_pytorchs(device: str) -> None:
    layer = head(BalancedSketch(5)).to(device)
    x = torch.empty(
        0 if device == "cpu" else 3, IN, dtype=torch.float64, device=device, requires_grad=True
    )
    loss = linear_cross_entropy(layer, x, torch.empty(len(x), dtype=torch.int64, device=device))
    grad, grad_x = torch.autograd.grad(loss, (layer.weight, x))
    assert (grad.shape, grad_x.shape) == ((CLASSES, IN), x.shape)
    assert device == "meta" or (loss.isnan() and torch.equal(grad, torch.zeros_like(grad)))


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("ignored", [1, 7, ROWS])
@pytest.mark.parametrize("estimator", [None, Exact(), BalancedSketch(ROWS)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_ignored_targets_are_those_of_cross_entropy(
    ignore_index: int, ignored: int, estimator: Estimator | None, training: bool
) -> None:
    layer, (x, targets) = head(estimator), batch()
    targets[targets == 3] = 4
    targets.view(-1)[torch.arange(ROWS)[-ignored:]] = ignore_index
    plain = head()
    logits = plain(x).flatten(0, -2)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index)
    with torch.set_grad_enabled(training):
        loss = linear_cross_entropy(layer, x, targets, ignore_index=ignore_index)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=0, equal_nan=True)
    if training:
        got = torch.autograd.grad(loss, (x, layer.weight))
        wanted = torch.autograd.grad(expected, (x, plain.weight))
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-12)


def test_refusals() -> None:
    layer, (x, targets) = head(), batch()
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(layer, x, targets[:2])
    for with_grad in (True, False):
        for wrong in (CLASSES, -1):
            targets[1, 2] = wrong
            with (
                torch.set_grad_enabled(with_grad),
                pytest.raises(
                    ValueError, match=rf"\[0, {CLASSES}\).*ignore_index=-100, got {wrong}"
                ),
            ):
                linear_cross_entropy(layer, x, targets)
    targets[1, 2] = -100
    with pytest.raises(ValueError, match=rf"\[0, {CLASSES}\), got -100"):
        linear_cross_entropy(layer, x, targets, ignore_index=None)
