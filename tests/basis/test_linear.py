"""The layer: exact forward and dX, what is kept, autocast, compile, edges and refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import basis
from basis import BalancedSketch, Exact
from basis.estimator import Estimator
from basis.estimators import ESTIMATORS
from basis.linear import SketchedLinear, basis_linear
from basis.ops.hashing import draw_hashing
from basis.ops.noise import encode_hashing, fold

ROWS, IN, OUT, RANK = 48, 16, 24, 6


def layer(estimator: Estimator | None = None, **options) -> SketchedLinear:
    torch.manual_seed(0)
    return SketchedLinear(IN, OUT, estimator=estimator or BalancedSketch(RANK), **options)


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(
        *(shape or (ROWS, IN)), generator=torch.Generator().manual_seed(1)
    ).requires_grad_()


def kept_for_backward(run, parameters) -> list[torch.Tensor]:
    """The tensors that autograd saves during `run()`, parameters left out, each storage once."""
    saved: dict[int, torch.Tensor] = {}
    known = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = run()
    assert output.requires_grad
    return list(saved.values())


@pytest.mark.parametrize("shape", [(ROWS, IN), (3, 16, IN), (2, 3, 8, IN), (IN,)])
def test_forward_and_input_and_bias_gradients_are_those_of_linear(shape: tuple[int, ...]) -> None:
    sketched = layer()
    plain = sketched.original()
    x, x_plain = batch(*shape), batch(*shape)
    y, y_plain = sketched(x), plain(x_plain)
    assert torch.equal(y, y_plain)
    grad = torch.randn(y.shape)
    got = torch.autograd.grad(y, (x, sketched.bias), grad)
    expected = torch.autograd.grad(y_plain, (x_plain, plain.bias), grad)
    torch.testing.assert_close(got, expected)


def test_exact_estimator_equals_autograd() -> None:
    sketched = layer(Exact())
    x = batch()
    grad = torch.randn(ROWS, OUT)
    (got,) = torch.autograd.grad(sketched(x), sketched.weight, grad)
    (expected,) = torch.autograd.grad(
        F.linear(x, sketched.weight, sketched.bias), sketched.weight, grad
    )
    torch.testing.assert_close(got, expected)


def test_layer_and_functional_form_agree_given_the_hashing() -> None:
    sketched = layer(BalancedSketch(RANK, shrinkage=0.1))
    sketched.set_noise_key(fold(7))
    bins, signs = draw_hashing(torch.tensor(fold(7)), ROWS, RANK, "balanced")
    x = batch()
    grad = torch.randn(ROWS, OUT)
    y = basis_linear(
        x, sketched.weight, sketched.bias, rank=RANK, bins=bins, signs=signs, shrinkage=0.1
    )
    (expected,) = torch.autograd.grad(y, sketched.weight, grad)
    (got,) = torch.autograd.grad(sketched(x), sketched.weight, grad)
    torch.testing.assert_close(got, expected)
    sketched.set_noise_key(encode_hashing(bins, signs))
    torch.testing.assert_close(torch.autograd.grad(sketched(x), sketched.weight, grad)[0], expected)


@pytest.mark.parametrize("shape", [(ROWS, IN), (3, 16, IN), (IN,)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_may_be_written_to(shape: tuple[int, ...], bias: bool) -> None:
    sketched = layer(Exact(), bias=bias)
    gradients = []
    for one in (sketched, sketched.original()):
        x = batch(*shape)
        y = one(x)
        y += x.detach().sum()
        F.relu(y, inplace=True).square().sum().backward()
        gradients.append((x.grad, one.weight.grad.clone()))
        one.weight.grad = None
    torch.testing.assert_close(*gradients)


def test_input_is_not_kept() -> None:
    sketched = layer()
    kept = kept_for_backward(lambda: sketched(batch()), sketched.parameters())
    assert sum(t.numel() for t in kept if t.is_floating_point()) == RANK * IN
    assert sum(t.untyped_storage().nbytes() for t in kept if not t.is_floating_point()) <= 8
    bins, signs = draw_hashing(torch.tensor(1), ROWS, RANK, "balanced")
    kept = kept_for_backward(
        lambda: basis_linear(batch(), sketched.weight, rank=RANK, bins=bins, signs=signs),
        sketched.parameters(),
    )
    assert sum(t.numel() for t in kept if t.is_floating_point()) == RANK * IN
    assert sum(t.untyped_storage().nbytes() for t in kept if not t.is_floating_point()) <= 8 * ROWS


def test_input_is_freed_once_nobody_else_holds_it() -> None:
    import weakref

    sketched = layer()
    x = batch()
    hidden = x * 2
    gone = weakref.ref(hidden)
    y = sketched(hidden)
    del hidden
    assert gone() is None
    y.sum().backward()
    assert x.grad is not None


def test_autocast_keeps_a_bfloat16_sketch_and_the_parameter_itself() -> None:
    sketched = layer()
    x = batch()
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_for_backward(lambda: sketched(x), sketched.parameters())
        y = sketched(x)
    floats = [t for t in kept if t.is_floating_point()]
    assert [(t.dtype, t.numel()) for t in floats] == [(torch.bfloat16, RANK * IN)]
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert sketched.weight.grad.dtype == torch.float32
    assert sketched.weight.grad.abs().sum() > 0


def test_autocast_gradients_agree_with_float32_to_low_precision() -> None:
    sketched = layer()
    sketched.set_noise_key(3)
    x = batch()

    def grads(enabled: bool) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = sketched(x)
        return torch.autograd.grad(y.float().sin().sum(), (x, sketched.weight, sketched.bias))

    for low, full in zip(grads(True), grads(False), strict=True):
        assert (low - full).norm() < 0.02 * full.norm()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_method_trains_under_autocast(name: str, dtype: torch.dtype) -> None:
    """With a scaled loss, as float16 needs; backward under autocast too, which PyTorch allows."""
    options = {"rank": RANK, "rows": ROWS if name == "ema_sketch" else 2 * RANK, "bits": 6.0}
    fields = ESTIMATORS[name].__dataclass_fields__
    estimator = ESTIMATORS[name](**{k: v for k, v in options.items() if k in fields})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, 32), nn.GELU(), nn.Linear(32, OUT))
    basis.convert(model, estimator)
    gradients = []
    for scale, low in ((1.0, False), (2.0**10, True)):
        reference = copy.deepcopy(model)
        basis.set_noise_key(reference, seed=0, step=0)
        with torch.autocast("cpu", dtype, enabled=low):
            loss = reference(batch().detach()).float().square().mean()
            (scale * loss).backward()
        gradients.append(reference[0].weight.grad / scale)
        assert all(p.grad.isfinite().all() for p in reference.parameters())
    full, low_precision = gradients
    if name not in ("low_rank", "ema_sketch", "row_sampling"):  # their choices depend on rounding
        assert (full - low_precision).norm() < 0.1 * full.norm()


@pytest.mark.slow
def test_compile_fullgraph_gives_the_same_gradients_and_keeps_as_little() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, 64), nn.Tanh(), nn.Linear(64, OUT))
    basis.convert(model, BalancedSketch(RANK), exact_if_kept=False)  # as a compiled graph does
    compiled = torch.compile(model, fullgraph=True)
    x = batch()
    for step in (1, 2):  # a new key must not be baked into the graph
        basis.set_noise_key(model, seed=0, step=step)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    loss = compiled(x).square().sum()
    basis.set_noise_key(
        model, seed=0, step=3
    )  # between forward and backward, as a second micro-batch would
    compiled(x)
    torch.testing.assert_close(
        torch.autograd.grad(loss, list(model.parameters())), expected, rtol=1e-4, atol=1e-4
    )
    kept = kept_for_backward(lambda: compiled(x), model.parameters())
    floats = sorted(t.numel() for t in kept if t.is_floating_point())
    # The first layer's sketch and not its input; Tanh's own output, which Tanh keeps with or
    # without BASIS; the second layer's sketch only if the partitioner does not make it anew from
    # Tanh's output.
    assert set(floats) <= {RANK * IN, RANK * 64, ROWS * 64}
    assert len(floats) == len(set(floats))
    assert (
        sum(t.untyped_storage().nbytes() for t in kept if not t.is_floating_point()) <= 2 * 8 * ROWS
    )


def test_compile_draws_from_the_default_generator_without_set_up() -> None:
    sketched = layer()
    compiled = torch.compile(sketched, fullgraph=True, backend="aot_eager")
    x = batch()
    first, second = (
        torch.autograd.grad(compiled(x).square().sum(), sketched.weight)[0] for _ in range(2)
    )
    assert not torch.allclose(first, second)


def test_default_generator_reproduces_and_advances() -> None:
    sketched = layer()
    x = batch()

    def grad() -> torch.Tensor:
        return torch.autograd.grad(sketched(x).sum(), sketched.weight)[0]

    torch.manual_seed(5)
    first, second = grad(), grad()
    torch.manual_seed(5)
    assert torch.equal(grad(), first)
    assert not torch.equal(first, second)


def test_evaluation_never_advances_the_noise() -> None:
    sketched = layer()
    state = torch.get_rng_state()
    with torch.no_grad():
        basis_linear(batch(), sketched.weight, rank=2)
        sketched.eval()(batch())
    sketched.train()
    sketched.weight.requires_grad_(False)
    sketched(batch())
    assert torch.equal(torch.get_rng_state(), state)


def test_eval_trains_as_training_does_and_keeps_as_little() -> None:
    """A fine-tune without dropout calls eval()."""
    sketched, x = layer(), batch()
    sketched.set_noise_key(5)
    expected = torch.autograd.grad(sketched(x).square().sum(), (x, sketched.weight))
    sketched.eval()
    got = torch.autograd.grad(sketched(x).square().sum(), (x, sketched.weight))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    sketched.noise_key = None  # noise of its own for each forward
    one, two = (torch.autograd.grad(sketched(x).sum(), sketched.weight)[0] for _ in range(2))
    assert not torch.equal(one, two)
    kept = kept_for_backward(lambda: sketched(batch()), sketched.parameters())
    assert sum(t.numel() for t in kept if t.is_floating_point()) == RANK * IN


def test_reentrant_checkpoints_draw_new_noise_each_time() -> None:
    sketched, x = layer(), batch()
    grads = []
    for _ in range(2):
        sketched.weight.grad = None
        checkpoint(sketched, x, use_reentrant=True).sin().sum().backward()
        grads.append(sketched.weight.grad)
    assert not torch.equal(*grads)


@pytest.mark.parametrize("keyed", [True, False])
def test_checkpointing_recomputes_with_the_same_noise(keyed: bool) -> None:
    sketched = layer()
    if keyed:
        sketched.set_noise_key(11)
    x = batch()
    torch.manual_seed(2)
    expected = torch.autograd.grad(sketched(x).sin().sum(), sketched.weight)[0]
    torch.manual_seed(2)
    output = checkpoint(lambda t: sketched(t).sin(), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(output.sum(), sketched.weight)[0], expected)


def test_key_may_change_between_two_forwards_and_their_backwards() -> None:
    sketched = layer()
    x = batch()
    sketched.set_noise_key(1)
    first = sketched(x).sum()
    expected = torch.autograd.grad(sketched(x).sum(), sketched.weight)[0]
    sketched.set_noise_key(2)
    sketched(x)
    assert torch.equal(torch.autograd.grad(first, sketched.weight)[0], expected)


def test_no_work_for_gradients_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("compress", "weight_grad"):
        original = getattr(BalancedSketch, name)
        monkeypatch.setattr(
            BalancedSketch,
            name,
            lambda *a, original=original, name=name: (calls.append(name), original(*a))[1],
        )
    sketched = layer()
    sketched.weight.requires_grad_(False)
    x = batch()
    y = sketched(x)
    y.sum().backward()
    assert calls == []
    assert x.grad is not None
    sketched.weight.requires_grad_(True)
    leaf = batch().detach()
    sketched(leaf).sum().backward()
    assert calls == ["compress", "weight_grad"]
    assert leaf.grad is None
    # The bare formula with a frozen weight prepares nothing either.
    calls.clear()
    basis_linear(batch(), sketched.weight.detach(), rank=2).sum().backward()
    assert calls == []


def test_non_contiguous_input() -> None:
    sketched = layer()
    sketched.set_noise_key(4)
    wide = torch.randn(IN, ROWS)
    a, b = wide.t(), wide.t().contiguous()
    assert not a.is_contiguous()
    grads = [torch.autograd.grad(sketched(x).cos().sum(), sketched.weight)[0] for x in (a, b)]
    torch.testing.assert_close(*grads)
    expanded = sketched(batch()).sum().expand(3)  # a gradient of stride 0
    expanded.sum().backward()


@pytest.mark.parametrize(
    "estimator", [BalancedSketch(RANK), basis.Quantized(4), basis.Subspace(2)], ids=str
)
@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN)])
@pytest.mark.parametrize("autocast", [False, True])
def test_an_empty_batch_is_that_of_linear(
    estimator: Estimator, shape: tuple[int, ...], autocast: bool
) -> None:
    sketched = layer(estimator)
    plain = sketched.original()
    for one in (sketched, plain):
        x = batch(*shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = one(x)
        assert (y.shape, y.dtype) == (
            (*shape[:-1], OUT),
            torch.bfloat16 if autocast else torch.float32,
        )
        gradients = torch.autograd.grad(y.sum(), (x, one.weight, one.bias))
        assert gradients[0].shape == shape
        assert torch.equal(gradients[1], torch.zeros(OUT, IN))
        assert torch.equal(gradients[2], torch.zeros(OUT))
    explicit = {"bins": torch.zeros(0, dtype=torch.int64), "signs": torch.zeros(0)}
    assert basis_linear(batch(*shape), sketched.weight, rank=2, **explicit).shape == (
        *shape[:-1],
        OUT,
    )


@pytest.mark.parametrize(
    "estimator", [BalancedSketch(RANK), basis.LowRank(2), basis.Transform(2.0)], ids=str
)
def test_on_the_meta_device_there_are_shapes(estimator: Estimator) -> None:
    sketched = layer(estimator, device="meta")
    y = sketched(torch.empty(3, ROWS, IN, device="meta"))
    y.sum().backward()
    assert (y.shape, y.device.type) == ((3, ROWS, OUT), "meta")
    assert sketched.weight.grad.shape == (OUT, IN)
    assert sketched.to_empty(device="cpu")(batch()).shape == (ROWS, OUT)


def test_refusals() -> None:
    sketched = layer()
    with pytest.raises(ValueError, match=r"floating point, got torch\.int64"):
        sketched(torch.zeros(3, IN, dtype=torch.int64))
    with pytest.raises(ValueError, match="does not fit weight"):
        sketched(torch.zeros(3, IN + 1))
    with pytest.raises(TypeError, match="estimator must be an Estimator"):
        SketchedLinear(IN, OUT, estimator="basis")  # type: ignore[arg-type]


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # PyTorch's own decompositions
def test_forward_mode_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(layer(), (torch.zeros(3, IN),), (torch.ones(3, IN),))


@pytest.mark.parametrize(
    ("bins", "signs", "message"),
    [
        (torch.zeros(4, dtype=torch.long), None, "go together"),
        (torch.zeros(3, dtype=torch.long), torch.ones(4), "one per row"),
        (torch.tensor([0, 1, 2, 0]), torch.ones(4), r"\[0, 2\)"),
        (torch.tensor([0, -1, 1, 0]), torch.ones(4), r"\[0, 2\)"),
        (torch.tensor([0, 1, 1, 0]), torch.tensor([1.0, 0.5, 1, 1]), r"\+1 or -1"),
    ],
)
def test_explicit_hashing_is_checked(bins, signs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        basis_linear(torch.randn(4, 3), torch.randn(5, 3), rank=2, bins=bins, signs=signs)


def test_works_under_functional_transform() -> None:
    sketched = layer()
    sketched.set_noise_key(1)
    x = batch().detach()
    parameters = dict(sketched.named_parameters())

    def loss(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(sketched, p, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(sketched(x).square().sum(), list(parameters.values()))
    torch.testing.assert_close(tuple(got.values()), expected)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.func.grad(lambda t: torch.func.grad(lambda u: sketched(u).pow(3).sum())(t).sum())(x)
