"""Inputs that are made again: the plain gradients to the last bit, six of sixteen units less."""

from __future__ import annotations

import copy
import functools
from typing import Any

import gpt_checks
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import basis
from basis.lean.recompute import COMPILER, NotedGELU, NotedLayerNorm, RecomputingLinear
from harness.memory import saved_bytes, saved_bytes_total
from models import GPT, GPTConfig

B, T, C, V, HEADS = 3, 16, 64, 50, 2
TOKENS = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))
UNIT = B * T * C * 4


def gpt(*methods: Any, blocks: int = 2, dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, block_size=T, n_layer=blocks, n_head=HEADS, n_embd=C, dropout=dropout))
    for method in methods:
        basis.convert(model, method)
    basis.set_noise_key(model, seed=0, step=0)
    return model


loss_of = functools.partial(gpt_checks.loss_of, TOKENS)
gradients = functools.partial(gpt_checks.gradients, TOKENS)


METHODS = [(), (basis.BalancedSketch(4),), (basis.Exact(),), (basis.Lean(gelu_bits=None),)]


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m[0]).__name__ if m else "plain")
def test_gradients_are_the_plain_ones_to_the_last_bit(method: tuple[Any, ...], low: bool) -> None:
    plain = gradients(gpt(*method, dropout=0.1), low)
    again = gradients(gpt(*method, basis.Recompute(), dropout=0.1), low)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def kept(*methods: Any, blocks: int, low: bool = False) -> dict[str, int]:
    model = gpt(*methods, blocks=blocks)
    return saved_bytes(model, lambda: loss_of(model, low))


def test_a_block_keeps_ten_units_of_sixteen() -> None:
    """Counted by hand: q, k, v, output; both norms' inputs; GELU's input. Statistics beside."""
    few, more = (kept(basis.Recompute(), blocks=n) for n in (1, 2))
    found = {name: size - few[name] for name, size in more.items() if size != few[name]}
    rows = B * T
    assert found == {
        "attention": 4 * UNIT + rows * HEADS * 4,  # log-sum-exp
        "norms": 2 * UNIT + 2 * 2 * rows * 4,  # mean and deviation
        "activations": 4 * UNIT,
    }
    assert few["linear inputs"] == 0  # the head's are its own category
    plain_few, plain_more = (sum(kept(blocks=n).values()) for n in (1, 2))
    assert (plain_more - plain_few) - sum(found.values()) == 6 * UNIT


def test_with_a_method_nothing_more_is_kept_than_before() -> None:
    method = basis.Quantized(4)
    assert kept(method, basis.Recompute(), blocks=2) == kept(method, blocks=2)


@pytest.mark.parametrize(
    "low", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
def test_compiled_it_is_one_graph_that_keeps_as_little(low: bool) -> None:
    from torch._functorch import config

    def found(settings: dict[str, bool], *methods: Any, blocks: int) -> tuple[int, list[Tensor]]:
        torch._dynamo.reset()
        model = gpt(*methods, blocks=blocks)
        run = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
        with config.patch(settings):
            size = saved_bytes_total(model, lambda: loss_of(run, low))
            loss_of(run, low).backward()
        return size, [p.grad for p in model.parameters()]

    (one, _), (two, grads) = (found(COMPILER, basis.Recompute(), blocks=n) for n in (1, 2))
    plain_one, plain_two = (found({}, blocks=n)[0] for n in (1, 2))
    eager = [sum(kept(basis.Recompute(), blocks=n, low=low).values()) for n in (1, 2)]
    assert two - one <= 1.01 * (eager[1] - eager[0])
    assert two - one < plain_two - plain_one
    for a, b in zip(grads, gradients(gpt(), low)[1:], strict=True):
        torch.testing.assert_close(
            a, b, rtol=0, atol=(1e-2 if low else 1e-5) * float(b.abs().max())
        )


def pair(*between: nn.Module, norm: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(norm or nn.LayerNorm(8), *between, nn.Linear(8, 5))


X = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))


class Doubled(nn.Module):
    """Writes into what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2.0)


@pytest.mark.parametrize(
    "model",
    [
        pair(),
        pair(norm=nn.LayerNorm(8, elementwise_affine=False)),
        pair(norm=nn.LayerNorm((7, 8), bias=False)),
        pair(norm=nn.GELU()),
        pair(nn.GELU("tanh"), nn.Linear(8, 8, bias=False)),
        pair(Doubled()),
        pair(nn.Identity(), nn.Dropout(0.0)),
        pair(nn.Tanh()),
    ],
    ids=["norm", "no weight", "two dimensions", "gelu", "chain", "written to", "nothing", "tanh"],
)
def test_whatever_stands_between_the_gradients_are_right(model: nn.Sequential) -> None:
    found = []
    for again in (False, True):
        one = copy.deepcopy(model)
        if again:
            basis.convert(one, basis.Recompute())
        x = X.clone().requires_grad_()
        one(x).sin().sum().backward()
        found.append([x.grad, *(p.grad for p in one.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_changed_parameter_of_the_norm_is_noticed() -> None:
    model = pair()
    basis.convert(model, basis.Recompute())
    y = model(X)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_frozen_layers_and_inputs_keep_what_they_did() -> None:
    for frozen in (0, 1):
        model = pair()
        model[frozen].requires_grad_(False)
        plain = copy.deepcopy(model)
        basis.convert(model, basis.Recompute())
        for one in (model, plain):
            one(X).square().sum().backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_checkpoints_and_transforms(reentrant: bool) -> None:
    model = pair()
    plain = copy.deepcopy(model)
    basis.convert(model, basis.Recompute())
    x = X.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    plain(X).square().sum().backward()
    expected = [p.grad for p in plain.parameters()]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (X,)).square().sum()

    found = torch.func.grad(loss)({n: p.detach() for n, p in model.named_parameters()})
    assert all(torch.equal(f, g) for f, g in zip(found.values(), expected, strict=True))


def test_second_derivatives_are_refused() -> None:
    model = pair()
    basis.convert(model, basis.Recompute())
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(model(X).square().sum(), model[1].weight, create_graph=True)


def test_revert_and_parameters() -> None:
    model = gpt()
    before = {name: type(module) for name, module in model.named_modules()}
    parameters, state = dict(model.named_parameters()), list(model.state_dict())
    changed = basis.convert(model, basis.Recompute())
    assert len(changed) == 2 * (2 + 4 + 1) + 2  # norms, dense layers, GELU; ln_f and the head
    kinds = {type(model.blocks[0].ln_1), type(model.blocks[0].mlp.gelu), type(model.head)}
    assert kinds == {NotedLayerNorm, NotedGELU, RecomputingLinear}
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == state
    assert sorted(basis.revert(model)) == sorted(changed)
    assert {name: type(module) for name, module in model.named_modules()} == before
