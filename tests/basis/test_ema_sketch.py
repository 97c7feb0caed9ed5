"""The EMA sketch against its formula written out with torch.linalg, its linearity, and the
shrinkage that follows from it.
"""

import math
from pathlib import Path

import pytest
import torch
from tiny import train_here
from torch import Tensor, nn

import basis
from basis import EMASketch
from basis.diagnostics.budget import fit_budget, kept_bytes
from basis.linear import SketchedLinear
from basis.ops import three_sketch
from models import GPT, GPTConfig

ROWS, IN, OUT = 20, 12, 7
KEY = torch.zeros((), dtype=torch.int64)
CPU = torch.device("cpu")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def after(estimator: EMASketch, inputs: list[Tensor]) -> dict[str, Tensor]:
    state = estimator.initial_state(inputs[0].shape[1], CPU)
    for x in inputs:
        state = dict(estimator.learn(state, x, KEY))
    return state


def estimate(estimator: EMASketch, inputs: list[Tensor], grad_y: Tensor) -> Tensor:
    state = after(estimator, inputs)
    return estimator.weight_grad(estimator.compress(inputs[-1], KEY, state), grad_y)


def by_formula(x: Tensor, rank: int, tests: three_sketch.Tests) -> Tensor:
    """X^ of `x` (B, N) in the words of ROL_Sketch.hpp, for M = X^T with a column per row of X;
    float64.
    """
    m = x.t().double()
    k = min(2 * rank + 1, *m.shape)
    s = min(2 * k + 1, *m.shape)
    upsilon, omega, phi, psi = (tests.upsilon.t(), tests.omega, tests.phi.t(), tests.psi)
    assert (upsilon.shape, omega.shape) == ((k, m.shape[0]), (m.shape[1], k))
    assert (phi.shape, psi.shape) == ((s, m.shape[0]), (m.shape[1], s))
    upsilon, omega, phi, psi = (t.double() for t in (upsilon, omega, phi, psi))
    p = torch.linalg.qr((upsilon @ m).t()).Q
    q = torch.linalg.qr(m @ omega).Q
    c = torch.linalg.pinv(phi @ q) @ (phi @ m @ psi) @ torch.linalg.pinv(psi.t() @ p).t()
    return (q @ c @ p.t()).t()


@pytest.mark.parametrize("rank", [1, 3, 6, 40])
def test_beta_0_is_the_three_sketch_formula_of_the_last_input(rank: int) -> None:
    inputs = [normal(ROWS, IN, seed=seed) for seed in range(3)]
    grad_y = normal(ROWS, OUT, seed=9)
    estimator = EMASketch(rank, rows=ROWS, beta=0.0, seed=5)
    expected = grad_y.t() @ by_formula(inputs[-1], rank, estimator.tests(IN, CPU))
    found = estimate(estimator, inputs, grad_y)
    assert float((found - expected).norm() / expected.norm()) < 1e-4  # float32 against float64
    if rank >= 6:  # k = N
        assert float((found - grad_y.t() @ inputs[-1]).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_average_of_sketches_is_the_sketch_of_the_average(beta: float) -> None:
    inputs = [normal(ROWS, IN, seed=seed) for seed in range(6)]
    weights = [(1 - beta) * beta ** (5 - step) for step in range(6)]
    average = sum(w * x for w, x in zip(weights, inputs, strict=True))
    assert isinstance(average, Tensor)
    estimator = EMASketch(2, rows=ROWS, beta=beta)
    state = after(estimator, inputs)
    tests = estimator.tests(IN, CPU)
    u, o, f, g = (t.double() for t in tests)
    for name, expected in {
        "corange": average @ u,
        "range": average.t() @ o,
        "core": f.t() @ average.t() @ g,
    }.items():
        torch.testing.assert_close(state[name].double(), expected, rtol=1e-4, atol=1e-4)
    assert state["steps"] == 6
    grad_y = normal(ROWS, OUT, seed=9)
    expected = grad_y.t() @ by_formula(
        average / sum(weights), 2, tests
    )  # the weights add up to 1 - beta^t
    found = estimate(estimator, inputs, grad_y)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_gradients_of_zero_mean_features_shrink_and_those_of_a_dominant_mean_do_not() -> None:
    rows, width, rank = 64, 24, 12  # k = N: what is seen is the average, not the projection
    teacher = normal(OUT, width, seed=100)
    for beta in (0.0, 0.9, 0.99):
        estimator = EMASketch(rank, rows=rows, beta=beta)
        steps = 1 if beta == 0 else math.ceil(math.log(0.01) / math.log(beta))  # beta^t = 0.01
        zero_mean = [normal(rows, width, seed=seed) for seed in range(steps)]
        grad_y = (
            zero_mean[-1] @ teacher.t()
        )  # of a linear model with the squared loss: it adds up over rows
        exact = grad_y.t() @ zero_mean[-1]
        found = estimate(estimator, zero_mean, grad_y)
        assert float((found * exact).sum() / exact.square().sum()) == pytest.approx(
            (1 - beta) / 0.99 ** bool(beta), abs=0.02
        )

        mean = 5 * normal(1, width, seed=200)
        shifted = [x + mean for x in zero_mean]
        grad_y = shifted[-1] @ teacher.t()
        exact, found = grad_y.t() @ shifted[-1], estimate(estimator, shifted, grad_y)
        assert float((found * exact).sum() / found.norm() / exact.norm()) > 0.998
        assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.99])
def test_exact_on_the_same_input_of_low_rank_in_every_step(beta: float) -> None:
    x = normal(ROWS, 2, seed=0) @ normal(2, IN, seed=1)
    grad_y = normal(ROWS, OUT, seed=2)
    exact = grad_y.t() @ x
    for steps in (1, 2, 30):
        found = estimate(EMASketch(2, rows=ROWS, beta=beta), [x] * steps, grad_y)
        assert float((found - exact).norm() / exact.norm()) < 1e-4


def test_fewer_rows_are_as_good_as_rows_of_zero_and_more_are_refused() -> None:
    estimator = EMASketch(2, rows=ROWS, beta=0.5)
    whole, short = normal(ROWS, IN, seed=0), normal(13, IN, seed=1)
    filled = torch.cat([short, torch.zeros(7, IN, dtype=torch.float64)])
    torch.testing.assert_close(after(estimator, [whole, short]), after(estimator, [whole, filled]))
    grad_y = normal(13, OUT, seed=2)
    expected = estimate(
        estimator, [whole, filled], torch.cat([grad_y, torch.zeros(7, OUT, dtype=torch.float64)])
    )
    torch.testing.assert_close(
        estimate(estimator, [whole, short], grad_y), expected, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="ema_sketch: an input of 21 rows, and rows=20"):
        after(estimator, [normal(21, IN, seed=0)])


def test_nothing_is_kept_beyond_the_state_whose_bytes_are_those_stated() -> None:
    for rank, k, s in ((1, 3, 7), (2, 5, 11), (5, 11, 12), (9, 12, 12)):
        estimator = EMASketch(rank, rows=ROWS)
        assert kept_bytes(estimator, ROWS, IN) == 0
        layer = SketchedLinear(IN, OUT, estimator=estimator)
        assert sum(t.nbytes for t in layer.state.values()) == 4 * (k * (ROWS + IN) + s * s) + 8
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, into=saved: into.append(t) or t, lambda t: t
        ):  # type: ignore[func-returns-value]
            layer(torch.randn(ROWS, IN))
        known = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
        assert sum(t.nbytes for t in saved if t.untyped_storage().data_ptr() not in known) == 0


def test_a_budget_is_for_the_state() -> None:
    rows, width = 512, 64
    fitted = fit_budget(EMASketch(1, rows=rows), 1 / 4, rows, width)
    sizes = {
        rank: 4 * ((2 * rank + 1) * (rows + width) + (4 * rank + 3) ** 2) + 8
        for rank in range(1, 15)
    }
    assert fitted == EMASketch(
        max(r for r, size in sizes.items() if size <= rows * width), rows=rows
    )  # 4 bytes, 1/4 of them


def two_layers(**options: float) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, 16), nn.Tanh(), nn.Linear(16, OUT))
    # Also the second layer, whose input tanh keeps anyway.
    method = EMASketch(2, rows=ROWS, **options)  # type: ignore[arg-type]
    basis.convert(model, method, exact_if_kept=False)
    return model


def train(model: nn.Module, steps: range) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        basis.set_noise_key(model, seed=0, step=step)
        optimizer.zero_grad()
        model(normal(ROWS, IN, seed=step).float()).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_saved_and_loaded_model_goes_on_bit_for_bit() -> None:
    whole = two_layers()
    weights = train(whole, range(8))
    first, second = two_layers(), two_layers()
    train(first, range(5))
    second.load_state_dict(first.state_dict())
    assert second[0].state["steps"] == 5
    assert torch.equal(train(second, range(5, 8)), weights)
    assert not torch.equal(train(two_layers(beta=0.5), range(8)), weights)


def test_through_the_loss_head_of_a_gpt_and_under_autocast() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(19, (2, 8))
    gradients = []
    for convert, low in ((False, False), (True, False), (True, True)):
        torch.manual_seed(1)
        model = GPT(GPTConfig(vocab_size=19, block_size=8, n_layer=1, n_head=2, n_embd=16))
        if convert:
            basis.convert(
                model, EMASketch(8, rows=16, beta=0.9), include=["blocks.*.mlp.*", "head"]
            )
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            model(tokens, tokens).backward()
        gradients.append([model.head.weight.grad, model.blocks[0].mlp.proj.weight.grad])
    for exact, whole, low_precision in zip(
        *gradients, strict=True
    ):  # k = B: nothing is lost in the first step
        assert float((whole - exact).norm() / exact.norm()) < 2e-3
        assert float((low_precision - exact).norm() / exact.norm()) < 0.05


def test_compiled_without_graph_breaks() -> None:
    layers = [two_layers(), two_layers()]
    x = normal(ROWS, IN, seed=0).float()
    for model, forward in (
        (layers[0], layers[0]),
        (layers[1], torch.compile(layers[1], fullgraph=True, backend="aot_eager")),
    ):
        basis.set_noise_key(model, seed=0, step=0)
        forward(x).square().sum().backward()
    for a, b in zip(*(m.parameters() for m in layers), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layers[0][0].state, layers[1][0].state)


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"rows": 0}, {"beta": 1.0}, {"beta": -0.1}, {"seed": -1}, {"seed": 1 << 56}],
)
def test_wrong_options_are_named(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"^{name}="):
        EMASketch(**({"rank": 2, "rows": 4} | wrong))  # type: ignore[arg-type]


def test_a_run_says_what_its_state_is_of_the_inputs_and_warns_of_micro_batches(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """16 rows, layers of 16 and 64 features: k = 3, s = 7, so (16 + N) 3 + 49 numbers and a counter
    each.
    """
    options = [
        "method=ema_sketch",
        "method.rank=1",
        "method.include=[blocks.*.mlp.*]",
        "steps=2",
        "optim.warmup_steps=0",
    ]
    said = []
    for tokens in (16, 32):
        caplog.clear()
        with caplog.at_level("INFO"):
            train_here(data, tmp_path / str(tokens), *options, f"tokens_per_step={tokens}")
        said.append(caplog.text)
    share = (4 * sum((16 + width) * 3 + 49 for width in (16, 64)) + 2 * 8) / (4 * 16 * (16 + 64))
    for text in said:
        assert f"of inputs, {share:.4f}, as state between steps" in text
    assert ["prefer one micro-batch a step" in " ".join(text.split()) for text in said] == [
        False,
        True,
    ]


def test_rows_follow_the_inputs_unless_they_are_given() -> None:
    assert EMASketch(2).for_inputs(ROWS) == EMASketch(2, rows=ROWS)
    assert EMASketch(2, rows=ROWS + 1).for_inputs(ROWS) == EMASketch(2, rows=ROWS + 1)
    with pytest.raises(ValueError, match=rf"^rows={ROWS - 1}: must be at least {ROWS}"):
        EMASketch(2, rows=ROWS - 1).for_inputs(ROWS)
    with pytest.raises(ValueError, match=r"^rows=None: "):
        SketchedLinear(IN, OUT, estimator=EMASketch(2))
