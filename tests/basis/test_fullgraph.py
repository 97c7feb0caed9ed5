"""One compiled graph for the loss of a GPT, whatever the method, activations and attention, with
the gradients of eager mode."""

from typing import Any

import pytest
import torch

import basis
from basis.estimators import ESTIMATORS
from basis.sus import SusAttention
from models import GPT, GPTConfig
from models.gpt import CausalAttention

METHODS: dict[str, dict[str, Any]] = {
    "exact": {},
    "basis": {"rank": 8},
    "count_sketch": {"rank": 8},
    "gaussian": {"rank": 8},
    "row_sampling": {"rows": 8},
    "quantized": {"bits": 4},
    "low_rank": {"rank": 4},
    "subspace": {"rank": 4},
    "transform": {"bits": 1.25},
    "ema_sketch": {"rank": 2, "rows": 32},
}
QUICK = [("basis", "lean", "sus")]
# Each pair of two of the three is in one of them.
EVERY = [
    *((method, *rest) for method in METHODS for rest in (("plain", "exact"), ("lean", "sus"))),
    *(("basis", "recompute", attention) for attention in ("exact", "sus")),
    ("exact", "plain", "sus"),
    ("exact", "lean", "exact"),
]
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id="-".join(case))
    for case in EVERY
]


def model_for(method: str, activations: str, attention: str) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=16))
    if method != "exact":
        # as a compiled graph does, also where attention keeps the input anyway
        basis.convert(model, ESTIMATORS[method](**METHODS[method]), exact_if_kept=False)
    if attention == "sus":
        basis.convert(model, basis.SUS(CausalAttention, c=4.0))
    if activations == "lean":
        basis.convert(model, basis.Lean(attention=(CausalAttention, SusAttention)))
    if activations == "recompute":
        basis.convert(model, basis.Recompute())
    basis.set_noise_key(model, seed=0, step=0)
    return model


def test_every_method_is_tried() -> None:
    assert set(METHODS) == set(ESTIMATORS)


@pytest.mark.parametrize(("method", "activations", "attention"), CASES)
def test_the_loss_is_one_graph_with_the_gradients_of_eager_mode(
    method: str, activations: str, attention: str
) -> None:
    tokens = torch.randint(0, 65, (2, 17), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    found = []
    for compiled in (False, True):
        model = model_for(method, activations, attention)
        torch._dynamo.reset()
        loss = model
        if compiled:
            loss = torch.compile(model, backend="aot_eager", fullgraph=True)
        value = loss(inputs, targets)
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters())])
    for eager, graph in zip(*found, strict=True):
        assert eager is not None
        assert graph is not None
        torch.testing.assert_close(graph, eager, rtol=2e-4, atol=2e-6)


def test_attention_that_does_not_say_it_is_causal_is_not_taken_for_it() -> None:
    class Bidirectional(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    q, k, v = torch.randn(3, 1, 2, 16, 8, generator=torch.Generator().manual_seed(0)).unbind()
    model = torch.nn.ModuleDict({"attend": Bidirectional()})
    basis.convert(model, basis.Lean(norm=False, gelu_bits=None, attention=Bidirectional))
    compiled = torch.compile(model["attend"], backend="aot_eager")
    q.requires_grad_()
    torch.testing.assert_close(compiled(q, k, v), Bidirectional()(q, k, v))
