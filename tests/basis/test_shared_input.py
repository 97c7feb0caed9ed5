"""Layers that read one tensor keep one sketch of it, as one layer of all their outputs would; and
no sketch takes more bytes than its input.
"""

import copy
import gc
from collections.abc import Callable
from typing import Any, cast

import estimator_checks as checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import basis
from basis.diagnostics.budget import kept_bytes
from basis.estimator import Estimator
from basis.linear import SketchedLinear

ROWS, WIDTH, OUT = 24, 16, 8
SKETCH = basis.BalancedSketch(6)
# Without the norms of dY, which are those of each layer's own dY.
LINEAR_IN_DY = basis.BalancedSketch(6, invariant_scalars=False)
METHODS = [
    LINEAR_IN_DY,
    basis.Quantized(bits=4),
    basis.Transform(bits=1.0),
    basis.Subspace(4),
    basis.EMASketch(3, rows=ROWS),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


class Three(nn.Module):
    """Three layers that read what a norm returns, as q, k and v do. edit: what is done to it before
    the second one reads it; read: what each makes of it first.
    """

    def __init__(
        self,
        edit: Callable[[Tensor], object] = lambda h: None,
        read: Callable[[Tensor], Tensor] = lambda h: h,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, OUT, bias=False) for _ in range(3))
        self.edit, self.read = edit, read

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = self.q(self.read(h))
        self.edit(h)
        return torch.cat((q, self.k(self.read(h)), self.v(self.read(h))), -1)


class One(nn.Module):
    """The same as one layer."""

    def __init__(self, three: Three) -> None:
        super().__init__()
        self.norm, self.q = three.norm, nn.Linear(WIDTH, 3 * OUT, bias=False)
        layers = [cast(nn.Linear, three.q), cast(nn.Linear, three.k), cast(nn.Linear, three.v)]
        with torch.no_grad():
            self.q.weight.copy_(torch.cat([layer.weight for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.q(self.norm(x)))


class Pair(nn.Module):
    """A model of two parts, so that there is more than one dense layer."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.last = part, nn.Linear(3 * OUT, 4)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(torch.sin(self.part(x))))


def models(method: Estimator, read: Callable[[Tensor], Tensor] = lambda h: h) -> tuple[Pair, Pair]:
    torch.manual_seed(0)
    three = Pair(Three(read=read))
    one = copy.deepcopy(Pair(One(cast(Three, three.part))))
    one.last.load_state_dict(three.last.state_dict())
    for model in (three, one):
        basis.convert(model, method, include=["part.*"])
    return three, one


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(2, ROWS // 2, WIDTH, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, x: Tensor, run: Callable[..., Any] | None = None) -> list[Tensor]:
    model.zero_grad()
    (model if run is None else run)(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def kept(model: nn.Module, x: Tensor, run: Callable[..., Any] | None = None) -> int:
    """Bytes of distinct storages that autograd saves, without parameters, buffers and `x`."""
    known = [*model.parameters(), *model.buffers(), x]
    own = {t.untyped_storage()._cdata for t in known}
    seen: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        (model if run is None else run)(x)
    return sum(storage.nbytes() for storage in seen.values())


@every_method
def test_three_layers_are_to_a_method_what_one_layer_would_be(method: Estimator) -> None:
    three, one = models(method)
    for step in range(2):  # those that learn have learned something in the second
        for model in (three, one):
            basis.set_noise_key(model, seed=0, step=step)
        # The norm's two, then the weights of q, k, v or of all at once.
        found, wanted = (gradients(model, inputs(step)) for model in (three, one))
        assert checks.relative(torch.cat(found[2:5]), wanted[2]) < 1e-5
        assert checks.relative(found[0], wanted[0]) < 1e-6


@every_method
def test_kept_once(method: Estimator) -> None:
    three, one = models(method)
    for model in (three, one):
        basis.set_noise_key(model, seed=0, step=0)
    assert 0 <= kept(three, inputs()) - kept(one, inputs()) <= 3 * 8  # keys
    exact = copy.deepcopy(three)
    basis.revert(exact)
    saved = kept(exact, inputs()) - kept(three, inputs())
    whole = ROWS * WIDTH * 4
    assert saved > 0.9 * (whole - kept_bytes(method, ROWS, WIDTH)) - 300  # keys and hashing


def test_noise_is_new_in_each_pass_and_the_same_within_one() -> None:
    """Also where one batch comes round again, with keys and without."""
    three, _ = models(SKETCH)
    x = inputs()
    for keyed in (True, False):
        seen = []
        for step in range(2):
            if keyed:
                basis.set_noise_key(three, seed=0, step=step)
            seen.append(gradients(three, x))
        assert checks.relative(seen[0][2], seen[1][2]) > 0.1
        for _, layer in basis.sketched_layers(three):
            layer.noise_key = None
    first = nn.Sequential(nn.Linear(WIDTH, OUT), nn.Linear(OUT, OUT))
    basis.convert(first, basis.Quantized(bits=1))
    assert checks.relative(*(gradients(first, x)[0] for _ in range(2))) > 0.1


def test_what_was_written_to_is_another_input() -> None:
    def double(h: Tensor) -> None:
        with torch.no_grad():
            h.mul_(2)

    torch.manual_seed(0)
    model = Pair(Three(edit=double))

    def by_hand(x: Tensor) -> Tensor:
        h = model.part.norm(x)  # type: ignore[union-attr, operator]
        layers = cast(Any, model.part)
        read = torch.cat((layers.q(h), layers.k(2 * h), layers.v(2 * h)), -1)
        return cast(Tensor, model.last(torch.sin(read)))

    exact = gradients(model, inputs(), by_hand)
    basis.convert(model, basis.Quantized(bits=8), include=["part.*"])
    for found, wanted in zip(gradients(model, inputs())[2:5], exact[2:5], strict=True):
        assert checks.relative(found, wanted) < 0.02


def read_casts(model: Pair) -> None:
    for _, layer in basis.sketched_layers(model):
        cast(Any, layer).reads_casts = True


@every_method
def test_adapters_share_what_was_cast_for_each(method: Estimator) -> None:
    torch.manual_seed(0)
    three, one = models(method, read=lambda h: h.to(torch.float32))
    for model in (three, one):
        cast(Any, model.part).norm.double()  # so that float32 is a cast, for each reader its own
        basis.set_noise_key(model, seed=0, step=0)
    x = inputs().double()
    run = lambda x: one.last(torch.sin(one.part.q(one.part.norm(x).float())))  # noqa: E731
    before = copy.deepcopy(three)
    read_casts(three)
    found, wanted = gradients(three, x), gradients(one, x, run)
    gradients(before, x)  # what is learned is learned now
    if not isinstance(method, basis.EMASketch):  # which keeps averages, and nothing of one input
        assert kept(before, x) > kept(three, x)
    assert abs(kept(three, x) - kept(one, x, run)) < 200
    assert checks.relative(torch.cat(found[2:5]), wanted[2]) < 1e-5
    gc.collect()
    assert cast(Any, three.part).q._fixed_noise[0].cast is None


def test_a_cast_of_what_was_written_to_is_another_input() -> None:
    torch.manual_seed(0)
    model = Pair(Three(edit=lambda h: h.mul_(2), read=lambda h: h.to(torch.float32)))
    cast(Any, model.part).norm.double()
    x = inputs().double()
    exact = gradients(model, x)
    basis.convert(model, basis.Quantized(bits=8), include=["part.*"])
    read_casts(model)
    for found, wanted in zip(gradients(model, x)[2:5], exact[2:5], strict=True):
        assert checks.relative(found, wanted) < 0.02


def test_other_precisions_methods_and_hand_set_keys_are_not_mixed() -> None:
    x = inputs()

    def key_sets(change: Callable[[Pair], object]) -> int:
        three, _ = models(basis.Quantized(bits=1))
        basis.set_noise_key(three, seed=0, step=0)
        change(three)
        gradients(three, x)
        noise, _ = cast(Any, three.part).q._fixed_noise
        h = three.part.norm(x)  # type: ignore[union-attr, operator]
        layers = cast(Any, three.part)
        for layer in (layers.q, layers.k, layers.v):
            layer(h)
        return len({id(entry.reading) for entry in noise.readings.values()}) + sum(
            layer._fixed_noise is None for layer in (layers.q, layers.k, layers.v)
        )

    def other_method(model: Pair) -> None:
        cast(Any, model.part).k.estimator = basis.Quantized(bits=8)

    assert key_sets(lambda model: None) == 1
    assert key_sets(lambda model: cast(Any, model.part).k.set_noise_key(5)) == 2
    three, _ = models(basis.Quantized(bits=1))
    other_method(three)
    exact = copy.deepcopy(three)
    basis.revert(exact)
    found, wanted = gradients(three, x), gradients(exact, x)
    assert checks.relative(found[3], wanted[3]) < 0.02 < checks.relative(found[4], wanted[4])
    # Under autocast what is read is a copy in the low precision, and one sketch of it is kept.
    with torch.autocast("cpu", torch.bfloat16):
        cast(Any, three.part).k.estimator = basis.Quantized(bits=1)
        once = kept(three, x)
        for layer in ("k", "v"):
            getattr(three.part, layer).weight.requires_grad_(False)
        assert once - kept(three, x) < 3 * 8  # no sketch, a few empty or 8-byte tensors


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint_the_gradients_are_the_same(reentrant: bool) -> None:
    three, _ = models(SKETCH)
    basis.set_noise_key(three, seed=0, step=0)
    x = inputs().requires_grad_()
    plain = gradients(three, x)

    def run(x: Tensor) -> Tensor:
        return cast(
            Tensor, three.last(torch.sin(checkpoint(three.part, x, use_reentrant=reentrant)))
        )

    for found, wanted in zip(gradients(three, x, run), plain, strict=True):
        assert torch.equal(found, wanted)


def test_nothing_is_remembered_longer_than_the_input() -> None:
    three, _ = models(SKETCH)
    basis.set_noise_key(three, seed=0, step=0)
    noise, _ = cast(Any, three.part).q._fixed_noise
    gradients(three, inputs())
    gc.collect()
    assert noise.readings == {}
    copied = copy.deepcopy(three)
    assert cast(Any, copied.part).q._fixed_noise[0].readings == {}


@pytest.mark.parametrize(
    "method",
    [
        LINEAR_IN_DY,
        *(pytest.param(m, marks=pytest.mark.slow) for m in (METHODS[1], METHODS[2], METHODS[3])),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_compiled_graph_shares_as_eager_mode_does(method: Estimator) -> None:
    three, one = models(method)
    eager = copy.deepcopy(three)
    run, run_one = (torch.compile(m, fullgraph=True, backend="aot_eager") for m in (three, one))
    for step in range(2):
        for model in (eager, three, one):
            basis.set_noise_key(model, seed=0, step=step)
        found, wanted = gradients(three, inputs(step), run), gradients(eager, inputs(step))
        for a, b in zip(found, wanted, strict=True):
            assert checks.relative(a, b) < 1e-5
    x = inputs()
    assert kept(three, x, run) - kept(one, x, run_one) <= 64
    assert not vars(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return cast(Tensor, self.last(torch.tanh(self.out(y))))


def test_an_input_that_is_kept_anyway_is_kept_as_it_is() -> None:
    """Attention's output and that of tanh; x itself is not the result of anything."""
    torch.manual_seed(0)
    model = Attention()
    x = inputs().requires_grad_()
    exact, bytes_exact = gradients(model, x), kept(model, x)
    basis.convert(model, SKETCH)
    found = gradients(model, x)
    names = [name for name, _ in model.named_parameters()]
    off = {n: checks.relative(a, b) for n, a, b in zip(names, found, exact, strict=True)}
    assert off["qkv.weight"] > 0.1
    assert off["out.weight"] == off["last.weight"] == 0
    assert kept(model, x) <= bytes_exact + kept_bytes(SKETCH, ROWS, WIDTH) + 2 * ROWS * 8
    basis.convert(model, SKETCH, exact_if_kept=False)
    off_all = [checks.relative(a, b) for a, b in zip(gradients(model, x), exact, strict=True)]
    assert off_all[names.index("out.weight")] > 0.1


def test_an_input_that_lean_attention_keeps_in_few_bits_is_sketched() -> None:
    class Core(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.qkv = Core(), nn.Linear(WIDTH, 3 * WIDTH)
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
            return cast(Tensor, self.out(self.core(q, k, v).transpose(1, 2).flatten(2)))

    torch.manual_seed(0)
    model = Whole()
    exact = gradients(model, inputs())
    basis.convert(model, SKETCH)
    assert torch.equal(gradients(model, inputs())[2], exact[2])
    basis.convert(model, basis.Lean(attention=Core))
    assert checks.relative(gradients(model, inputs())[2], exact[2]) > 0.1


@pytest.mark.parametrize("rank", [ROWS, ROWS + 40])
def test_a_rank_of_all_rows_keeps_the_input_itself(rank: int) -> None:
    layer = nn.Linear(WIDTH, OUT, bias=False)
    x = torch.sin(inputs().requires_grad_())  # kept by nobody else
    exact = torch.autograd.grad(layer(x).square().sum(), layer.weight, retain_graph=True)[0]
    for method in (basis.BalancedSketch(rank), basis.CountSketch(rank), basis.Gaussian(rank)):
        sketched = SketchedLinear.from_linear(layer, method)
        assert kept(sketched, x) == 0
        found = torch.autograd.grad(sketched(x).square().sum(), layer.weight, retain_graph=True)[0]
        assert torch.equal(found, exact)
        assert kept_bytes(method, ROWS, WIDTH) == ROWS * WIDTH * 4
    shrunk = SketchedLinear.from_linear(layer, basis.BalancedSketch(rank, shrinkage=0.5))
    found = torch.autograd.grad(shrunk(x).square().sum(), layer.weight, retain_graph=True)[0]
    assert checks.relative(found, exact / 4) < 1e-6


def test_results_of_an_operation_with_several_compile_in_one_graph() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.q, self.k = nn.Linear(WIDTH, 8), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.both(x).chunk(2, -1)
            return cast(Tensor, self.q(first) * self.k(first) + self.k(second))

    model = Parts()
    basis.convert(model, basis.Quantized(bits=8))
    basis.set_noise_key(model, seed=0, step=0)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, wanted = gradients(model, inputs(), run), gradients(model, inputs())
    for a, b in zip(found, wanted, strict=True):
        assert checks.relative(a, b) < 0.02
