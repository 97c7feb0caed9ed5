"""Lean versions of what today's blocks are made of: RMSNorm, gated MLPs, activations written out,
dropout. Forward exact, gradients within what the essays state, few bytes, and the way back.

The classes are look-alikes of those of transformers; tests/integrations has the real ones.
"""

import copy
import pickle

import pytest
import torch
from lookalike_blocks import (
    LOW,
    ROWS,
    WIDE,
    FusedMLP,
    GatedRMSNorm,
    GemmaRMSNorm,
    LateRMSNorm,
    LlamaMLP,
    LlamaRMSNorm,
    MultipliedMLP,
    N,
    NewGELUActivation,
    QuickGELUActivation,
    ReLUSquaredActivation,
    ScaledRMSNorm,
    T5Gated,
    T5LayerNorm,
    errors,
    gradients,
    kept_by,
    made,
    normal,
)
from torch import nn

import basis
from basis.lean import (
    LeanGatedMLP,
    LeanRMSNorm,
)
from basis.lean.rms_norm import kind_of
from basis.linear import SketchedLinear

NORMS = [nn.RMSNorm, LlamaRMSNorm, GemmaRMSNorm, T5LayerNorm, LateRMSNorm]


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", NORMS)
def test_rms_norm_is_exact_forward_near_backward_and_eight_bits(
    kind: type[nn.Module], low: bool
) -> None:
    norm = kind(N, eps=1e-5)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    x = normal(4, ROWS // 4, N) * torch.logspace(-3, 2, 4)[:, None, None]
    if low:
        norm, x = norm.to(LOW), x.to(LOW)
    lean = nn.Sequential(copy.deepcopy(norm))
    assert basis.convert(lean, basis.Lean()) == ["0"]
    assert isinstance(lean[0], LeanRMSNorm)
    assert isinstance(lean[0], kind)
    (y, exact), (z, found) = gradients(norm, x), gradients(lean, x)
    assert z.dtype == y.dtype
    assert torch.equal(z, y)
    dx, dw = errors(found, exact)
    assert dx < (0.005 if low else 0.002)
    assert 0 < dw < 0.015
    assert kept_by(lean, x) == ROWS * (N + 4 + 4)  # codes, a scale of the 64, r
    basis.revert(lean)
    assert type(lean[0]) is kind
    assert vars(lean[0]).keys() == vars(norm).keys()


def test_gradient_of_the_rms_norms_weight_is_unbiased() -> None:
    norm = nn.Sequential(LlamaRMSNorm(N))
    x = normal(8, N)
    (exact,) = gradients(norm, x)[1][1:]
    basis.convert(norm, basis.Lean())
    draws = torch.stack([gradients(norm, x, seed)[1][1] for seed in range(400)])
    z = (draws.mean(0) - exact) / (draws.std(0) / 400**0.5)
    assert z.abs().max() < 4


def test_a_norm_that_computes_anything_else_is_left_alone() -> None:
    assert kind_of(LlamaRMSNorm(N)) == "llama"
    others = [ScaledRMSNorm(N), GatedRMSNorm(N), nn.RMSNorm((2, N)), nn.RMSNorm(N, None, False)]
    assert [kind_of(norm) for norm in others] == [None] * len(others)
    with torch.device("meta"):
        assert kind_of(LateRMSNorm(N)) == "late"


GATED = [
    LlamaMLP,
    lambda: LlamaMLP(nn.GELU()),
    lambda: LlamaMLP(QuickGELUActivation()),
    lambda: LlamaMLP(nn.ReLU()),
    FusedMLP,
    T5Gated,
]
STATED = {8: (0.003, 0.012), 4: (0.05, 0.14), 2: (0.25, 0.7)}


@pytest.mark.parametrize("bits", STATED)
@pytest.mark.parametrize("make", GATED, ids=["llama", "gelu", "quick", "relu", "fused", "t5"])
def test_gated_mlp_is_exact_forward_and_near_backward(make: object, bits: int) -> None:
    mlp = made(make)
    x = normal(2, ROWS // 2, N)
    y, exact = gradients(mlp, x)
    keys = list(mlp.state_dict())
    lean = nn.Sequential(mlp)
    wanted = ["0", "0.dropout"] if isinstance(mlp, T5Gated) else ["0"]
    assert basis.convert(lean, basis.Lean(gated_bits=bits)) == wanted
    assert isinstance(lean[0], LeanGatedMLP)
    assert isinstance(lean[0], type(mlp))
    basis.set_noise_key(lean, seed=0, step=0)  # else keys come from the generator of T5's dropout
    z, found = gradients(lean, x)
    assert torch.equal(z, y)
    least, most = STATED[bits]
    names = ("x", *(name for name, _ in mlp.named_parameters()))
    shares = dict(zip(names, errors(found, exact), strict=True))
    for name, error in shares.items():
        if name in ("down_proj.bias",):
            assert error < 1e-6
        elif name in ("down_proj.weight", "wo.weight"):
            assert 0.004 < error < 0.012  # y in 8 bits
        elif isinstance(getattr(mlp, "act_fn", None), nn.ReLU):
            assert error < most  # halves of the groups are zeros
        else:
            assert least < error < most, name
    assert basis.revert(lean) == wanted
    assert [type(m) for m in lean[0].modules()] == [type(m) for m in mlp.modules()]
    assert list(lean[0].state_dict()) == keys


def test_gradients_of_a_gated_mlp_are_unbiased() -> None:
    """At 2 bits, where one draw is off by half."""
    mlp = nn.Sequential(made(LlamaMLP))
    x = normal(16, N)
    exact = gradients(mlp, x)[1]
    basis.convert(mlp, basis.Lean(gated_bits=2))
    draws = [gradients(mlp, x, seed)[1] for seed in range(100)]
    means = [torch.stack(values).mean(0) for values in zip(*draws, strict=True)]
    once, of_mean = errors(draws[0], exact), errors(means, exact)
    for one, mean in list(zip(once, of_mean, strict=True))[:6]:  # all but the bias of `down`
        assert mean < 1.5 * one / 100**0.5


def test_bytes_of_a_gated_mlp_as_counted_by_hand() -> None:
    model, x = nn.Sequential(made(LlamaMLP)).to(LOW), normal(ROWS, N).to(LOW)
    assert kept_by(model, x) == 4 * ROWS * WIDE * 2
    basis.convert(model, basis.Lean())
    two = 2 * (ROWS * WIDE // 2 + ROWS * 4 + 8)  # codes of 4 bits, a range a row, the key
    assert kept_by(model, x) == two + ROWS * WIDE + ROWS * 4 + 8  # and y in 8 bits
    basis.convert(model, basis.Exact())
    assert kept_by(model, x) == two + ROWS * WIDE * 2  # y as `down`, which is a module, keeps it
    assert all(isinstance(m, SketchedLinear) for m in model[0].children() if "Lin" in str(m))
    basis.convert(model, basis.BalancedSketch(ROWS // 8))
    assert kept_by(model, x) < two + ROWS * WIDE * 2 // 8 + 3 * ROWS * N * 2 // 8
    basis.revert(model)
    assert type(model[0].down_proj) is nn.Linear
    for parameter in model[0].down_proj.parameters():
        parameter.requires_grad_(False)
    basis.convert(model, basis.Lean())
    assert kept_by(model, x) == two


def test_a_down_with_hooks_is_called_as_a_module() -> None:
    model, seen = nn.Sequential(made(LlamaMLP)), []
    model[0].down_proj.register_forward_hook(lambda *_: seen.append("called"))
    basis.convert(model, basis.Lean())
    gradients(model, normal(ROWS, N))
    assert seen == ["called"]


def test_an_mlp_that_computes_anything_else_is_left_alone() -> None:
    more = made(LlamaMLP)
    more.norm = nn.Identity()
    for mlp in (made(MultipliedMLP), more, made(lambda: LlamaMLP(nn.Tanh()))):
        found = basis.convert(nn.Sequential(mlp, nn.GELU()), basis.Lean())
        assert "0" not in found
    plain = nn.Sequential(made(LlamaMLP))
    assert basis.convert(plain, basis.Lean(gated_bits=None)) == ["0.act_fn"]
    with pytest.raises(ValueError, match=r"^gated_bits=3: must be one of 8, 4, 2"):
        basis.Lean(gated_bits=3)


BLOCK = [
    lambda: nn.Sequential(LlamaRMSNorm(N), LlamaMLP()),
    lambda: nn.Sequential(nn.RMSNorm(N), FusedMLP(), nn.SiLU()),
    lambda: nn.Sequential(GemmaRMSNorm(N), NewGELUActivation()),
    lambda: nn.Sequential(nn.ReLU(), nn.Linear(N, N), ReLUSquaredActivation()),
]


QUICK = (0, False)
CASES = [
    pytest.param(
        BLOCK[i],
        dynamic,
        marks=() if (i, dynamic) == QUICK else pytest.mark.slow,
        id=f"{i}-{dynamic}",
    )
    for i in range(len(BLOCK))
    for dynamic in (False, True)
]


@pytest.mark.parametrize(("make", "dynamic"), CASES)
def test_one_graph_has_the_gradients_of_eager_mode(make: object, dynamic: bool) -> None:
    model = made(make)
    if dynamic and torch.__version__.startswith("2.11") and len(list(model[1].children())):
        pytest.skip("2.11 fails on codes of a few bits where the number of rows is symbolic")
    basis.convert(model, basis.Lean())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    basis.set_noise_key(model, seed=0, step=0)
    for rows in (ROWS, ROWS // 2) if dynamic else (ROWS,):
        x = normal(rows, N)
        (y, eager), (z, graph) = gradients(model, x), gradients(compiled, x)
        torch.testing.assert_close(z, y)
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-4)


def test_dropout_is_one_graph() -> None:
    model = nn.Sequential(nn.Dropout(0.3))
    basis.convert(model, basis.Lean())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    _, (found,) = gradients(compiled, torch.ones(ROWS, N))
    factors = found / normal(ROWS, N)
    left = factors != 0
    torch.testing.assert_close(factors[left], torch.full_like(factors[left], 1 / 0.7))
    assert 0.6 < left.float().mean() < 0.8


def test_copies_pickles_and_graphs_for_inference() -> None:
    model = made(lambda: nn.Sequential(LlamaRMSNorm(N), LlamaMLP(), nn.Dropout(0.1)))
    x = normal(4, N)
    wanted = copy.deepcopy(model).eval()(x)
    basis.convert(model, basis.Lean())
    basis.convert(model, basis.Lean(gated_bits=8))
    assert model[1].lean_bits == 8
    model.eval()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for one in copies:
        assert torch.equal(one(x), wanted)
        assert type(one[0]) is type(model[0])
        assert basis.revert(one) == ["0", "1", "2"]
        assert type(one[1]) is LlamaMLP
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), wanted)
    assert not any("derive" in str(node.target) for node in exported.graph.nodes)
    traced = torch.fx.symbolic_trace(nn.Sequential(model[0]))
    assert any(node.op == "call_module" for node in traced.graph.nodes)


def test_no_noise_is_drawn_without_gradients() -> None:
    model = nn.Sequential(LlamaRMSNorm(N), made(LlamaMLP))
    x = normal(4, N)
    wanted = model(x)
    basis.convert(model, basis.Lean())
    model.eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
    assert torch.equal(torch.get_rng_state(), state)
