"""Layers that share a hashing: each by itself as if it drew its own, little to do with each other,
and few operations.
"""

import copy
import io
import math
from collections import Counter
from collections.abc import Callable

import estimator_checks as checks
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import basis
from basis.estimator import Estimator
from basis.linear import SketchedLinear
from basis.ops import hashing as hashing_module
from basis.ops.hashing import Hashing, from_state, own_hashing, shared_hashing
from basis.ops.shared_noise import SharedNoise
from models import GPT, GPTConfig

PLAIN = basis.BalancedSketch(5, invariant_scalars=False)


class Operations(TorchDispatchMode):
    """Counts what is dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations_of_a_step(blocks: int, method: Estimator | None, keyed: bool) -> Counter[str]:
    """In forward and backward of a GPT, after a step that is not counted."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, n_layer=blocks, block_size=32))
    if method is not None:
        basis.convert(model, method, include=["blocks.*"])
    tokens = torch.randint(50, (2, 32))
    for step in range(2):
        if keyed:
            basis.set_noise_key(model, seed=0, step=step)
        with Operations() as seen:
            model(tokens, tokens).backward()
    return seen.counts


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize(
    "method", [basis.BalancedSketch(8), basis.BalancedSketch(8, shrinkage=0.01)], ids=str
)
def test_a_layer_adds_twelve_operations_none_of_which_draws(method: Estimator, keyed: bool) -> None:
    """What two more blocks add, eight dense layers, beyond what they add to an exact model."""
    added: Counter[str] = Counter()
    for model, sign in ((method, 1), (None, -1)):
        for blocks, end in ((4, 1), (2, -1)):
            for name, count in operations_of_a_step(blocks, model, keyed).items():
                added[name] += sign * end * count
    assert sum(added.values()) <= 12 * 8, added
    more = " ".join(name for name, count in added.items() if count > 0)
    forbidden = ("sort", "index_add", "scatter", "to_copy", "rand", "arange", "scalar_dense")
    assert not [word for word in forbidden if word in more], more


@pytest.mark.parametrize(
    ("hashing", "rank"),
    [
        ("balanced", 5),
        *(
            pytest.param(hashing, rank, marks=pytest.mark.slow)
            for hashing, rank in (("balanced", 1), ("balanced", 11), ("uniform", 5))
        ),
    ],
)
def test_a_layer_with_shared_noise_has_the_bias_and_variance_of_its_own(
    hashing: str, rank: int
) -> None:
    x, dy = checks.data()
    estimator = basis.BalancedSketch(rank, hashing=hashing, invariant_scalars=False)
    estimates = estimates_at(estimator, 3, 2500, x, dy)
    checks.assert_unbiased(estimates, dy.t() @ x)
    checks.assert_variance(estimates, dy.t() @ x, oracle.variance(x, dy, rank, hashing), sharp=0.08)


def estimates_at(estimator: Estimator, place: int, count: int, x: Tensor, dy: Tensor) -> Tensor:
    """Estimates of the layer at `place` of 8, one for each of `count` micro-batches."""
    found = []
    for step in range(count):
        noise = SharedNoise(checks.key("step", step), 8)
        state = estimator.shared_noise(noise, place, len(x), x)
        kept = estimator.compress(x, noise.key, state)
        found.append(estimator.weight_grad(kept, dy))
    return torch.stack(found)


def test_errors_of_layers_are_uncorrelated() -> None:
    """Even where both layers have the same X and the same dY, all rows of both nearly equal, so
    that any two pairs of rows have the same product.
    """
    x, dy = checks.data()
    x, dy = x + 5, dy + 5
    errors = [estimates_at(PLAIN, place, 2500, x, dy) - dy.t() @ x for place in (0, 1, 5)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        products = (errors[one] * errors[other]).sum((1, 2))
        assert abs(products.mean() / products.std()) < 4.5 / math.sqrt(len(products))
    # The test sees what one table of signs alone would leave: shifted by a place, most pairs of
    # places in a bin are such a pair again.
    flips = torch.ones(len(x), dtype=x.dtype)
    shifted = []
    for step in range(500):
        noise = SharedNoise(checks.key("step", step), 8)
        one, other = (shared_hashing(noise, place, len(x), x, 5, "balanced") for place in (0, 1))
        pair = [Hashing(h.places, h.first, h.flips, flips).tensors for h in (one, other)]
        shifted.append([PLAIN.sketch(dy, *h).t() @ PLAIN.sketch(x, *h) - dy.t() @ x for h in pair])
    products = torch.stack([(one * other).sum() for one, other in shifted])
    assert products.mean() / products.std() > 4.5 / math.sqrt(len(products))


def model_of(*ranks: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in ranks))
    for name, rank in enumerate(ranks):
        basis.convert(model, basis.BalancedSketch(rank), include=[str(name)])
    return model


def hashings(model: nn.Module, rows: int) -> list[Hashing]:
    layers = [layer for _, layer in basis.sketched_layers(model)]
    found = []
    for layer in layers:
        fixed = layer._fixed_noise
        assert fixed is not None
        state = layer.estimator.shared_noise(*fixed, rows, torch.empty(()))
        found.append(from_state(state))
    return found


def test_layers_share_rows_in_order_at_any_rank_and_no_sign() -> None:
    model = model_of(3, 8)
    basis.set_noise_key(model, seed=0, step=0)
    one, other = hashings(model, 40)
    assert one.places.data_ptr() == other.places.data_ptr()
    assert one.signs.data_ptr() == other.signs.data_ptr()
    assert one.flips.untyped_storage().data_ptr() == other.flips.untyped_storage().data_ptr()
    assert torch.equal(one.flips[1:], other.flips[:-1])  # one table, shifted
    assert not torch.equal(one.by_rows()[1], other.by_rows()[1])
    assert sorted(one.places.tolist()) == list(range(40))
    assert one.first.tolist() == [0, 14, 27]
    basis.set_noise_key(model, seed=0, step=1)
    assert not torch.equal(hashings(model, 40)[0].places, one.places)


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    model.zero_grad()
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    (run or model)(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_the_gradient_is_that_of_the_hashing_by_the_formula() -> None:
    model = model_of(4, 4)
    basis.set_noise_key(model, seed=3, step=1)
    x = torch.randn(24, 16)
    y = model(x)
    y.square().sum().backward()
    bins, signs = hashings(model, 24)[1].by_rows()
    hidden = model[0](x).detach()
    expected = oracle.weight_grad(
        hidden, 2 * y.detach(), bins, signs, 4, invariant_scalars=True, shrinkage=0.0
    )
    torch.testing.assert_close(model[1].weight.grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("keyed", [True, False])
def test_a_recomputed_layer_keeps_what_fits_its_backward(reentrant: bool, keyed: bool) -> None:
    """With keys its gradients are those without a checkpoint. Without, a recomputed layer may draw
    again, but what it keeps is of one draw: R = B is exact.
    """
    model = model_of(4, 4) if keyed else model_of(24, 24)
    if keyed:
        basis.set_noise_key(model, seed=0, step=0)
    expected = gradients(model)
    if keyed:
        basis.set_noise_key(model, seed=0, step=0)
    found = gradients(model, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    torch.testing.assert_close(found, expected)


def test_without_keys_each_pass_draws_once_from_the_generator() -> None:
    model = model_of(4, 4, 4)
    x = torch.randn(24, 16)

    def noise() -> list[SharedNoise | None]:
        model(x)
        return [layer.passes[0]._now for _, layer in basis.sketched_layers(model)]

    torch.manual_seed(5)
    first, second = noise(), noise()
    assert len({id(now) for now in first}) == len({id(now) for now in second}) == 1
    assert first[0] is not second[0]
    torch.manual_seed(5)
    keys = [torch.randint(0, 1 << 62, (), dtype=torch.int64) for _ in range(2)]
    assert [first[0].key, second[0].key] == keys
    torch.manual_seed(5)
    again = gradients(model)
    torch.manual_seed(5)
    assert all(map(torch.equal, gradients(model), again))


def test_a_layer_called_twice_draws_again() -> None:
    model = model_of(4, 4)
    model[0](torch.randn(24, 16))
    first = model[0].passes[0]._now
    model[0](torch.randn(24, 16))
    assert model[0].passes[0]._now is not first


def test_a_layer_by_itself_keeps_a_key_and_no_hashing() -> None:
    layer = SketchedLinear(16, 16, estimator=basis.BalancedSketch(4))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(24, 16))
    assert sum(t.numel() for t in kept if not t.is_floating_point()) == 1


def test_copies_and_saved_models_have_no_noise_of_the_past() -> None:
    model = model_of(4, 4)
    basis.set_noise_key(model, seed=0, step=0)
    expected = gradients(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert other[0]._fixed_noise[0]._drawn == {}
        assert all(map(torch.equal, gradients(other), expected))  # drawn again from the key


@pytest.mark.parametrize("rank", [1, 5, 24])
@pytest.mark.parametrize("hashing", ["balanced", "uniform"])
def test_a_matrix_and_bags_are_the_same_hashing(
    rank: int, hashing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(24, 6, dtype=torch.float64)
    noise = SharedNoise(checks.key(1), 4)
    bags = shared_hashing(noise, 2, 24, x, rank, hashing)
    monkeypatch.setattr(hashing_module, "MATRIX_DEVICES", {"cpu"})
    matrix = shared_hashing(noise, 2, 24, x, rank, hashing)
    assert matrix.by_row
    assert not bags.by_row
    expected = oracle.sketch_matrix(*bags.by_rows(), rank)
    for one in (bags, matrix):
        assert torch.equal(one.matrix(torch.float64), expected)
        torch.testing.assert_close(one.sums(x), expected @ x)
        torch.testing.assert_close(one.by_rows(), bags.by_rows())


def test_balanced_bins_are_random_and_uniform_ones_have_the_right_sizes() -> None:
    """Chi-square of the number of rows in a bin against a binomial distribution's variance."""
    rows, rank, count = 40, 8, 2000
    sizes = []
    for step in range(count):
        first = own_hashing(checks.key(step), rows, torch.empty(()), rank, "uniform").first
        sizes.append(torch.diff(first, append=torch.tensor([rows], dtype=first.dtype)))
    found = torch.stack(sizes).double()
    p = 1 / rank
    assert found.mean(0) == pytest.approx(rows * p, abs=4.5 * math.sqrt(rows * p / count))
    variance = rows * p * (1 - p)
    spread = variance * math.sqrt(2 / count) * 1.1
    assert found.var(0) == pytest.approx(variance, abs=4.5 * spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_under_autocast_has_signs_in_its_precision(dtype: torch.dtype) -> None:
    model = model_of(4, 4)
    basis.set_noise_key(model, seed=0, step=0)
    kept: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        model(torch.randn(24, 16))
    kinds = {t.dtype for t in kept if t.is_floating_point() and t.shape != (16, 16)}
    assert kinds == {dtype}


@pytest.mark.parametrize("matrix", [False, True])
def test_a_graph_has_the_noise_of_eager_mode_and_is_made_once(
    matrix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the graph multiplies with a matrix, as on CUDA."""
    model = model_of(4, 3, 24)
    expected = []
    for step in range(3):
        basis.set_noise_key(model, seed=0, step=step)
        expected.append(gradients(model))
    if matrix:
        monkeypatch.setattr(hashing_module, "MATRIX_DEVICES", {"cpu"})
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(3):
        basis.set_noise_key(model, seed=0, step=step)
        torch.testing.assert_close(gradients(model, compiled), expected[step])
    assert len(graphs) == 1
