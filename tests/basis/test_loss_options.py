"""What a fused head's loss may have beside the cross-entropy, against PyTorch's own functions from
whole logits: values and gradients, with and without ignored targets, in both layouts of blocks.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from basis import BalancedSketch, Exact, linear_cross_entropy
from basis.head_sizes import SIZES, Sizes, blocks_of
from basis.linear import SketchedLinear
from basis.ops import kernels
from basis.ops.softmax import Terms, softmax_gradient_

ROWS, IN, CLASSES = 12, 8, 37
OPTIONS: dict[str, dict[str, Any]] = {
    "bias": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.05},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": 0.25},
    "sum": {"reduction": "sum"},
    "count": {"num_items_in_batch": 29},
    "count on the device": {"num_items_in_batch": torch.tensor(29)},
    "all": {
        "label_smoothing": 0.2,
        "z_loss": 0.03,
        "softcap": 4.0,
        "logit_scale": 1.5,
        "num_items_in_batch": 29,
    },
}


@pytest.fixture(params=["cpu", "cuda"], ids=["vocabulary-major", "row-major"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The blocks of either device, of five rows each, on the CPU."""
    for name in SIZES:
        monkeypatch.setitem(SIZES, name, Sizes(1, least=5))
    with blocks_of(request.param):
        yield request.param


def case(dtype: torch.dtype, bias: bool, ignored: int) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(IN, CLASSES, bias=bias, dtype=dtype)
    x = 3 * torch.randn(3, 4, IN, dtype=dtype)
    targets = torch.randint(CLASSES, (3, 4))
    targets.view(-1)[:ignored] = -100
    return layer, x.requires_grad_(), targets


def by_pytorch(
    layer: nn.Linear,
    x: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    logits = layer(x).flatten(0, -2) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rows = targets.flatten()
    losses = F.cross_entropy(logits, rows, label_smoothing=label_smoothing, reduction="none")
    losses = losses + z_loss * torch.where(rows != -100, torch.logsumexp(logits, 1) ** 2, 0.0)
    if num_items_in_batch is not None:
        return losses.sum() / num_items_in_batch
    return losses.sum() if reduction == "sum" else losses.sum() / (rows != -100).sum()


def gradients(loss: Tensor, layer: nn.Linear, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (x, *layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("ignored", [None, 5])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_are_pytorchs(
    name: str, bias: bool, ignored: int | None, dtype: torch.dtype
) -> None:
    layer, x, targets = case(dtype, bias, ignored or 0)
    ignore_index = None if ignored is None else -100
    loss = linear_cross_entropy(layer, x, targets, ignore_index=ignore_index, **OPTIONS[name])
    wanted = by_pytorch(layer, x, targets, **OPTIONS[name])
    precise = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {}
    torch.testing.assert_close(loss, wanted, **precise)
    torch.testing.assert_close(
        gradients(3 * loss, layer, x), gradients(3 * wanted, layer, x), **precise
    )
    with torch.no_grad():  # from whole logits
        whole = linear_cross_entropy(layer, x, targets, ignore_index=ignore_index, **OPTIONS[name])
    torch.testing.assert_close(whole, wanted.detach(), **precise)


@pytest.mark.parametrize("ignored", [0, 5])
def test_label_smoothing_of_a_mean_is_that_of_cross_entropy(ignored: int) -> None:
    layer, x, targets = case(torch.float64, True, ignored)
    loss = linear_cross_entropy(layer, x, targets, label_smoothing=0.3)
    wanted = F.cross_entropy(layer(x).flatten(0, -2), targets.flatten(), label_smoothing=0.3)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    layer, x, targets = case(torch.float64, True, 2)
    parts = {"weight": layer.weight, "bias": layer.bias, "input": x}
    parts.pop(frozen).requires_grad_(False)
    loss = linear_cross_entropy(layer, x, targets, **OPTIONS["all"])
    wanted = by_pytorch(layer, x, targets, **OPTIONS["all"])
    left = tuple(parts.values())
    torch.testing.assert_close(torch.autograd.grad(loss, left), torch.autograd.grad(wanted, left))


@pytest.mark.parametrize("center", [False, True])
def test_a_sketched_head_estimates_no_more_than_its_weight_gradient(center: bool) -> None:
    """With as many bins as rows and no shrinkage that is exact too; in fewer it is that of the
    sketched layer before PyTorch's functions.
    """
    layer, x, targets = case(torch.float64, True, 3)
    for rank in (4, ROWS):
        sketched = SketchedLinear.from_linear(layer, BalancedSketch(rank, center=center))
        sketched.set_noise_key(7)
        loss = linear_cross_entropy(sketched, x, targets, **OPTIONS["all"])
        wanted = by_pytorch(sketched, x, targets, **OPTIONS["all"])
        torch.testing.assert_close(loss, wanted)
        got = gradients(2 * loss, sketched, x)
        torch.testing.assert_close(got, gradients(2 * wanted, sketched, x))


def test_micro_batches_divided_by_their_joint_count_are_one_batch() -> None:
    """4 micro-batches with 1, 2, 0 and 3 ignored targets. Their means add up to something else."""
    layer = nn.Linear(IN, CLASSES, dtype=torch.float64)
    x, targets = torch.randn(16, IN, dtype=torch.float64), torch.randint(CLASSES, (16,))
    targets[[0, 4, 5, 12, 13, 14]] = -100
    count = int((targets != -100).sum())
    micro = list(zip(x.split(4), targets.split(4), strict=True))

    def accumulated(**options: Any) -> tuple[Tensor, Tensor]:
        layer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for rows, classes in micro:
            loss = linear_cross_entropy(layer, rows, classes, **options)
            loss.backward()
            total += loss.detach()
        assert layer.weight.grad is not None
        return total, layer.weight.grad

    loss = linear_cross_entropy(layer, x, targets)
    wanted = (loss.detach(), torch.autograd.grad(loss, layer.weight)[0])
    torch.testing.assert_close(accumulated(num_items_in_batch=count), wanted)
    torch.testing.assert_close(accumulated(num_items_in_batch=torch.tensor([count])), wanted)
    total, grad = accumulated()
    assert float(total) > 3.5 * float(wanted[0])
    assert float(grad.norm()) > 3 * float(wanted[1].norm())


@pytest.mark.parametrize("name", ["bias", "count on the device", "all"])
@pytest.mark.parametrize("rows", [5, ROWS], ids=["blocks", "one block"])
def test_compiled_without_a_break(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in SIZES:
        monkeypatch.setitem(SIZES, kind, Sizes(1, least=rows))
    layer, x, targets = case(torch.float32, True, 2)
    layer = SketchedLinear.from_linear(layer, Exact())

    def loss(x: Tensor) -> Tensor:
        return 2 * linear_cross_entropy(layer, x, targets, **OPTIONS[name])

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled(x), layer, x), gradients(loss(x), layer, x))


def test_a_changing_count_compiles_at_most_twice() -> None:
    layer, x, targets = case(torch.float32, False, 2)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, count: linear_cross_entropy(layer, x, targets, num_items_in_batch=count),
        fullgraph=True,
        backend=backend,
    )
    for count in (7, 9, 11, 13):
        wanted = linear_cross_entropy(layer, x, targets, num_items_in_batch=count)
        torch.testing.assert_close(compiled(x, count), wanted)
    assert graphs <= 2


def test_the_operator_is_what_it_says_to_a_compiler() -> None:
    layer, x, targets = case(torch.bfloat16, True, 2)
    left = torch.ones(ROWS, 3, dtype=torch.bfloat16)
    own = (layer.bias.detach(), torch.tensor(29.0), 0.1, 0.02, 3.0, 0.5, False)
    weights = (x.detach().flatten(0, 1), layer.weight.detach(), targets.flatten())
    torch.library.opcheck(
        torch.ops.basis.head_sums,
        (*weights, -100, left, False, True, True, *own),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("fast", [False, True], ids=["operators", "kernel"])
@pytest.mark.parametrize(
    ("classes", "padded"), [(1, 64), (211, 256), (8200, 8256)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("terms", [Terms(0.1), Terms(0.0, 0.03), Terms(softcap=5.0),
                                   Terms(0.2, 0.01, 6.0)], ids=str)  # fmt: skip
def test_terms_of_rows(fast: bool, classes: int, padded: int, terms: Terms, kind: str) -> None:
    if kind == "cpu":
        pytest.skip("rows are row-major alone")
    if fast:
        pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(classes)
    y = 4 * torch.randn(5, padded, generator=generator)
    targets = torch.randint(classes, (5,), generator=generator)
    shares = torch.tensor([0.2, 0.2, 0.5, 0.0, 1.0])
    exact = y[:, :classes].double().requires_grad_()
    logits = terms.softcap * torch.tanh(exact / terms.softcap) if terms.softcap else exact
    wanted = F.cross_entropy(
        logits, targets, label_smoothing=terms.label_smoothing, reduction="none"
    )
    wanted = wanted + terms.z_loss * logits.logsumexp(1) ** 2
    (grad,) = torch.autograd.grad((wanted * shares).sum(), exact)
    losses, squares = torch.empty(2, 5)
    with kernels.forced(fast):
        softmax_gradient_(y, classes, targets, shares, losses, squares, terms)
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[:, :classes].double(), grad, rtol=3e-5, atol=1e-6)
    torch.testing.assert_close(squares.double(), grad.square().sum(1), rtol=1e-4, atol=1e-10)
    assert not y[:, classes:].any()


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_options_that_are_left_out_cost_no_operator(kind: str) -> None:
    """A block of the plain loss: its product, the loss and dY, dX, and dW."""
    layer, x, targets = case(torch.float32, False, 0)
    with kernels.forced(False), Count() as count:
        linear_cross_entropy(layer, x, targets, ignore_index=None)
    assert count.names["aten.exp_.default"] == 3
    for name in ("tanh_", "square", "addmm", "sub_.Tensor"):
        counted = sum(n for op, n in count.names.items() if op.startswith(f"aten.{name}"))
        allowed = {"sub_.Tensor": 3, "addmm": 3, "square": 0}.get(name, 0)  # dW, largest logits
        assert counted <= allowed, name


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("label_smoothing", 1.5),
        ("label_smoothing", True),
        ("z_loss", -1.0),
        ("z_loss", "much"),
        ("softcap", 0.0),
        ("softcap", float("nan")),
        ("logit_scale", None),
        ("reduction", "none"),
        ("num_items_in_batch", 0),
        ("num_items_in_batch", 2.5),
        ("num_items_in_batch", torch.ones(2)),
    ],
)
def test_a_wrong_option_is_named(option: str, value: Any) -> None:
    layer, x, targets = case(torch.float32, False, 0)
    with pytest.raises(ValueError, match=f"^{option}"):
        linear_cross_entropy(layer, x, targets, **{option: value})


def test_a_count_of_a_sum_is_refused() -> None:
    layer, x, targets = case(torch.float32, False, 0)
    with pytest.raises(ValueError, match="leave reduction as it is"):
        linear_cross_entropy(layer, x, targets, reduction="sum", num_items_in_batch=3)
