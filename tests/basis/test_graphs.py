"""Graphs of converted models: torch.export, torch.jit.trace and torch.fx take them as plain."""

import copy
import warnings

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

import basis
from basis.exchange import StandIn


class Causal(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.attend = nn.LayerNorm(8), nn.Linear(8, 24), Causal()
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        return self.mlp(self.attend(q, k, v).transpose(1, 2).flatten(2))


METHODS = [
    basis.BalancedSketch(4),
    basis.Quantized(4),
    basis.Transform(2.0),
    basis.EMASketch(2, rows=15),
    basis.Lean(attention=Causal),
    basis.SUS(Causal, c=3),
    basis.Recompute(),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def block(method: object = None) -> Block:
    torch.manual_seed(0)
    model = Block()
    if method is not None:
        basis.convert(model, method)
    return model


def operations(model: nn.Module, **options: object) -> list[str]:
    program = torch.export.export(model, (X,), **options)
    torch.testing.assert_close(program.module()(X), model(X))
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@every_method
def test_an_export_of_a_model_in_eval_is_that_of_the_plain_one(method: object) -> None:
    model = block(method).eval()
    assert operations(model) == operations(block().eval())
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(model, (X,), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(X[:2]), model(X[:2]))
    torch.testing.assert_close(model(X), block().eval()(X))


@every_method
def test_a_trace_of_a_model_in_eval_is_that_of_the_plain_one(method: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit goes, slowly
        traced = torch.jit.trace(block(method).eval(), X)
        plain = torch.jit.trace(block().eval(), X)
    torch.testing.assert_close(traced(X), plain(X))
    assert "Function" not in str(traced.inlined_graph)


@every_method
@pytest.mark.parametrize("training", [True, False])
def test_a_symbolic_graph_calls_the_layers_as_modules(method: object, training: bool) -> None:
    """As it calls nn.Linear: the graph trains with the same gradients and keeps as little."""
    model = block(method).train(training)
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    called = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    replaced = {name for name, module in model.named_modules() if isinstance(module, StandIn)}
    assert replaced <= called
    results = []
    for one in (model, graph):
        one.zero_grad()
        basis.set_noise_key(one, seed=0, step=0)
        one(X).square().sum().backward()
        results.append([p.grad.clone() for p in one.parameters()])
    torch.testing.assert_close(*results)


def test_an_export_of_a_model_in_training_has_the_sketch() -> None:
    assert len(operations(block(basis.BalancedSketch(4)))) > 2 * len(operations(block()))


DYNAMIC = [
    basis.BalancedSketch(8),
    basis.BalancedSketch(8, invariant_scalars=False, shrinkage=0.1, center=True),
    basis.CountSketch(8),
    basis.Gaussian(8),
    basis.Gaussian(8, distribution="rademacher"),
    basis.RowSampling(8),
    basis.Quantized(4),
    basis.LowRank(4),
    basis.Subspace(4),
    basis.Transform(2.0),
    basis.EMASketch(2, rows=64),
    basis.Exact(),
    basis.Recompute(),
    basis.Lean(),
]


QUICK = (DYNAMIC[0],)


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow, id=str(m)) for m in DYNAMIC],
)
def test_a_graph_for_any_batch_has_the_gradients_of_eager_mode(method: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))
    basis.convert(model, method)
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", dynamic=True)
    for step, rows in enumerate((64, 40)):
        x = torch.randn(rows, 16)
        gradients = []
        for one in (model, compiled):
            one.zero_grad()
            basis.set_noise_key(one, seed=0, step=step)
            one(x).square().mean().backward()
            gradients.append([p.grad.clone() for p in one.parameters()])
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
