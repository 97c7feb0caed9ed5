"""How the head goes through its rows: CUDA's blocks on the CPU against a cross-entropy in float64,
what they hold and launch, and that a compiled graph does not grow with them.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from basis import BalancedSketch, Exact, linear_cross_entropy
from basis.estimator import Estimator
from basis.head_blocks import Wanted, head_sums
from basis.head_sizes import SIZES, Sizes, blocks_of, most_rows
from basis.linear import SketchedLinear
from basis.ops import kernels
from harness.memory import LiveBytes, saved_bytes_total

ROWS, IN, CLASSES, PADDED = 48, 16, 211, 256
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def by_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CUDA's blocks, 8 rows each."""
    rows(monkeypatch, 8)
    with blocks_of("cuda"):
        yield


def rows(monkeypatch: pytest.MonkeyPatch, number: int, kind: str = "cuda") -> None:
    monkeypatch.setitem(SIZES, kind, Sizes(1, least=number))


def head(estimator: Estimator, dtype: torch.dtype = torch.float32) -> SketchedLinear:
    torch.manual_seed(0)
    layer = SketchedLinear.from_linear(nn.Linear(IN, CLASSES, bias=False, dtype=dtype), estimator)
    layer.set_noise_key(7)
    return layer


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(ROWS, IN, generator=generator)
    return x.to(dtype).requires_grad_(), torch.randint(CLASSES, (ROWS,), generator=generator)


def exact(weight: Tensor, x: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Loss, dX, dW in float64 from whole logits."""
    w, x = (t.detach().double().requires_grad_() for t in (weight, x))
    loss = F.cross_entropy(x @ w.t(), targets)
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def found_by(layer: SketchedLinear, x: Tensor, targets: Tensor) -> list[Tensor]:
    loss = linear_cross_entropy(layer, x, targets)
    return [loss.detach(), *torch.autograd.grad(loss, (x, layer.weight))]


def test_rows_of_a_block_by_vocabulary() -> None:
    SIZES["cuda"] = Sizes(200 * 2**20, 2048, 128)  # as the module has them; put back by the fixture
    device = torch.device("cpu")
    assert most_rows(50257, BF16, device) == 2048
    assert most_rows(32000, BF16, device) == 3200
    assert most_rows(50257, torch.float32, device) == 2048
    assert most_rows(128_256, BF16, device) == 2048
    assert most_rows(65, BF16, device) > 500_000
    with blocks_of("cpu"):
        assert most_rows(50257, BF16, device) == 333  # 64 MiB of float32


@pytest.mark.parametrize("fast", [False, True], ids=["operators", "kernel"])
def test_float32_to_a_millionth(fast: bool) -> None:
    if fast:
        pytest.importorskip("triton")
    layer, (x, targets) = head(Exact()), batch()
    with kernels.forced(fast):
        found = found_by(layer, x, targets)
    for got, wanted in zip(found, exact(layer.weight, x, targets), strict=True):
        assert relative(got, wanted) < 1e-6


@pytest.mark.parametrize("low_weight", [False, True], ids=["autocast", "bfloat16 throughout"])
def test_bfloat16_errs_by_its_logits_alone(low_weight: bool) -> None:
    """Against float64 from the same rounded X and W: logits, dY and dX are rounded to 8 binary
    digits once each; the loss is not, nor is the sum over blocks.
    """
    layer, (x, targets) = head(Exact(), BF16 if low_weight else torch.float32), batch(BF16)
    with torch.autocast("cpu", BF16, enabled=not low_weight):
        loss, grad_x, grad_weight = found_by(layer, x, targets)
    assert loss.dtype == torch.float32
    assert (grad_x.dtype, grad_weight.dtype) == (BF16, layer.weight.dtype)
    wanted = exact(layer.weight.to(BF16), x, targets)
    assert relative(loss, wanted[0]) < 1e-3
    assert relative(grad_x, wanted[1]) < 6e-3
    assert relative(grad_weight, wanted[2]) < 6e-3


def test_the_loss_is_taken_in_float32_from_rounded_logits() -> None:
    layer, (x, targets) = head(Exact(), BF16), batch(BF16)
    loss = linear_cross_entropy(layer, x, targets)
    logits = (x @ layer.weight.t()).double()
    torch.testing.assert_close(
        loss.double(), F.cross_entropy(logits, targets), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("ignored", [0, 5, ROWS])
@pytest.mark.parametrize("estimator", [BalancedSketch(8), BalancedSketch(8, center=True)], ids=str)
def test_a_sketch_in_bfloat16_is_that_of_vocabulary_major_blocks(
    estimator: Estimator, ignored: int
) -> None:
    layer, (x, targets) = head(estimator), batch(BF16)
    targets[:ignored] = -100
    with torch.autocast("cpu", BF16):
        found = found_by(layer, x, targets)
        with blocks_of("cpu"):
            wanted = found_by(layer, x, targets)
    for got, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            got.double(),
            other.double(),
            rtol=0.05,
            atol=0.02 * float(other.abs().max().nan_to_num()),
            equal_nan=True,
        )


class Count(TorchDispatchMode):
    """Operators that do something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not function.is_view:
            self.names.append(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("fast", "most"), [(False, 20), (True, 4)], ids=["operators", "kernel"])
def test_operators_of_a_block(fast: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel, itself not counted: three products, and the logits at the targets."""
    if fast:
        pytest.importorskip("triton")
    layer, (x, targets) = head(Exact()), batch()
    counts = []
    for number in (8, 16):  # 6 blocks, 3 blocks
        rows(monkeypatch, number)
        with kernels.forced(fast), Count() as count:
            linear_cross_entropy(layer, x, targets, ignore_index=None)
        # Triton's interpreter moves arguments about, in eager mode.
        moves = {"aten.set_", "aten.empty", "aten.new_empty", "aten.copy_"} if fast else set()
        counts.append(sum(name not in moves for name in count.names))
    assert 0 < counts[0] - counts[1] <= 3 * most


@pytest.mark.parametrize("estimator", [Exact(), BalancedSketch(4)], ids=["exact", "sketch"])
def test_bytes_held_are_one_block_the_weight_and_the_results(estimator: Estimator) -> None:
    layer, (x, targets) = head(estimator), batch(BF16)
    with (
        torch.autocast("cpu", BF16),
        LiveBytes([x, layer.weight, targets]) as live,
    ):
        start = live._now
        loss = linear_cross_entropy(layer, x, targets)
    assert loss.requires_grad
    k = IN if isinstance(estimator, Exact) else 4
    block, weight = 2 * 8 * PADDED, 2 * PADDED * IN
    results = 2 * ROWS * IN + 4 * PADDED * k
    in_float32 = 4 * 8 * CLASSES  # the plain way's piece of a block, which a kernel does without
    numbers_a_row = ROWS * (3 * 8 + 3 * 4 + 2 * k * 2)  # targets, losses, L
    small = 2 * PADDED * k + numbers_a_row + 4096  # a product that is rounded, outside CUDA
    peak = max(now for _, now in live.series) - start
    assert block + weight + results <= peak
    assert peak <= block + weight + results + in_float32 + small
    assert peak < 2 * ROWS * CLASSES + weight + results  # whole logits are more


def test_all_blocks_share_a_buffer() -> None:
    layer, (x, targets) = head(Exact(), BF16), batch(BF16)
    storages: dict[int, int] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.out and result.shape[1] == PADDED:
                storages[result.data_ptr()] = storages.get(result.data_ptr(), 0) + 1
            return result

    with Watch():
        linear_cross_entropy(layer, x, targets)
    assert list(storages.values()) == [ROWS // 8]


def test_a_sketch_keeps_the_factors_of_its_gradient() -> None:
    layer, (x, targets) = head(BalancedSketch(4)), batch()
    kept = saved_bytes_total(layer, lambda: linear_cross_entropy(layer, x, targets))
    assert kept == 4 * (ROWS * IN + 4 * (CLASSES + IN))
    plain = head(Exact())
    kept = saved_bytes_total(plain, lambda: linear_cross_entropy(plain, x, targets))
    assert kept == 4 * (ROWS * IN + CLASSES * IN)


def nodes_of_forward(layer: SketchedLinear, x: Tensor, targets: Tensor) -> list[str]:
    """The operators of the compiled graph of a head's forward."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    found: list[list[str]] = []

    def compiler(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        found.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler)
    compiled = torch.compile(
        lambda x: linear_cross_entropy(layer, x, targets), backend=backend, fullgraph=True
    )
    got = torch.autograd.grad(compiled(x), (x, layer.weight))
    wanted = torch.autograd.grad(linear_cross_entropy(layer, x, targets), (x, layer.weight))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    return found[0]


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "estimator",
    [pytest.param(Exact(), marks=pytest.mark.slow), BalancedSketch(4)],
    ids=["exact", "sketch"],
)
def test_a_compiled_graph_does_not_grow_with_the_blocks(
    kind: str, estimator: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, (x, targets) = head(estimator), batch()
    with blocks_of(kind):
        graphs = []
        for number in (2, 24):
            rows(monkeypatch, number, kind)
            graphs.append(nodes_of_forward(layer, x, targets))
    assert graphs[0] == graphs[1]
    assert sum("head_sums" in name for name in graphs[0]) == 1


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("case", ["left", "whole", "neither"])
def test_the_operator_is_what_it_says_to_a_compiler(kind: str, case: str) -> None:
    """Shapes, strides and dtypes of what it returns, and that it changes no argument."""
    layer, (x, targets) = head(Exact(), BF16), batch(BF16)
    left = torch.ones(ROWS, 3, dtype=BF16) if case == "left" else None
    flags = (case == "whole", case != "whole", case == "left")
    arguments = (x.detach(), layer.weight.detach(), targets, -100, left, *flags)
    with blocks_of(kind):
        torch.library.opcheck(
            torch.ops.basis.head_sums, arguments, test_utils=("test_schema", "test_faketensor")
        )
        real = torch.ops.basis.head_sums(*arguments)
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments]
            fake = torch.ops.basis.head_sums(*fakes)
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_sums_are_those_of_the_gradient_of_the_logits() -> None:
    layer, (x, targets) = head(Exact(), torch.float64), batch(torch.float64)
    left = torch.randn(ROWS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits = (x @ layer.weight.t()).detach().requires_grad_()
    loss = F.cross_entropy(logits, targets)
    (grad_y,) = torch.autograd.grad(loss, logits)
    wanted = (
        loss.detach(),
        grad_y @ layer.weight,
        grad_y.t() @ left,
        grad_y.square().sum(),
        grad_y.sum(0),
    )
    for kind in SIZES:
        with blocks_of(kind), torch.no_grad():
            asked = Wanted(squares=True, sums=True)
            found = head_sums(x, layer.weight, targets, None, left, asked).tensors()
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-14)
            whole = head_sums(x, layer.weight, targets, None, None, Wanted(whole=True)).product
            torch.testing.assert_close(whole, grad_y.t(), rtol=1e-11, atol=1e-14)


def test_the_operator_tells_its_floating_point_operations() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layer, (x, targets) = head(Exact()), batch()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.ops.basis.head_sums(x, layer.weight, targets, None, x, False, False, False)
    assert counter.get_total_flops() == 3 * 2 * ROWS * IN * CLASSES
