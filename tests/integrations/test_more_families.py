"""Families with parts that few others have: sinks of attention, gates of experts' own,
LayerNorms.

`basis.Lean` leaves the loss exact, comes near to the gradients, keeps fewer bytes of the kind, and
is taken back without a trace.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import basis
from basis.diagnostics.kept import kept_by_category

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

VOCABULARY, WIDTH, BATCH, LENGTH = 199, 64, 4, 32
BASE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": LENGTH,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
GPT_OSS = {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
           "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
ATTENTION = "attention"
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    # model, options, how many times fewer bytes of a kind at least
    "gpt-oss": ("GptOss", GPT_OSS, {ATTENTION: 3}),
    "Granite, sliding windows": ("GraniteSWA", BASE, {ATTENTION: 4}),
    "Flint": ("Flint", BASE, {ATTENTION: 4}),
    "Cohere": ("Cohere", BASE, {"norms": 8}),
    "Cohere2": ("Cohere2", BASE, {"norms": 8}),
    "OLMo": ("Olmo", BASE, {"norms": 3}),
    "Nemotron": ("Nemotron", BASE, {"norms": 3}),
}


def made(family: str) -> Any:
    kind, options, _ = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config", None)
    if config is None:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "bias" in name:  # sinks, norms and biases count
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.train()


def batch() -> dict[str, Any]:
    """Texts, the second of which is padded at its beginning."""
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    seen = torch.ones_like(ids)
    seen[1, :5] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": seen, "use_cache": False}


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(**batch()).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


APPLIED = {"gpt-oss": 5.0, "Granite, sliding windows": 5.0, "Flint": 5.0}
"""How many times fewer bytes in all, of `basis.apply`."""


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("family", FAMILIES)
def test_lean_is_exact_forward_near_backward_and_taken_back(family: str) -> None:
    plain = made(family)
    model = copy.deepcopy(plain)
    loss, exact = step(plain)
    before, _ = kept_by_category(model, batch())
    basis.convert(model, basis.Lean(attention="sdpa"))
    same, found = step(model)
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=0.0)
    assert found.keys() == exact.keys()
    for name, grad in found.items():
        assert grad.dtype == exact[name].dtype
        assert (grad - exact[name]).norm() < 0.25 * exact[name].norm(), name
    after, _ = kept_by_category(model, batch())
    for kind, times in FAMILIES[family][2].items():
        assert before[kind] > times * after[kind], (kind, before, after)
    basis.revert(model)
    assert kinds(model) == kinds(plain)
    again, restored = step(model)
    assert again == loss
    assert all(torch.equal(restored[name], grad) for name, grad in exact.items())


@pytest.mark.parametrize("family", ["gpt-oss", "Granite, sliding windows", "Flint"])
def test_attention_with_sinks_alone(family: str) -> None:
    """Gradients of all that is before it, the sinks among them, as near as 8 bits are."""
    plain = made(family)
    model = copy.deepcopy(plain)
    loss, exact = step(plain)
    lean = basis.Lean(norm=False, gelu_bits=None, gated_bits=None, attention="sdpa")
    assert basis.convert(model, lean) == [f"model.layers.{i}.self_attn" for i in range(2)]
    same, found = step(model)
    assert same == loss
    for name, grad in found.items():
        assert (grad - exact[name]).norm() < 0.03 * exact[name].norm(), name
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, plain(**batch()).logits)


@pytest.mark.parametrize("family", APPLIED)
def test_all_in_one_line(family: str) -> None:
    plain = made(family)
    model = copy.deepcopy(plain)
    loss, exact = step(plain)
    report = basis.apply(model, "8x", sample=batch(), lean=True, head=True)
    assert report.before > APPLIED[family] * report.after
    same, found = step(model)
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=0.0)
    assert found.keys() == exact.keys()
    one, two = (torch.cat([x[n].flatten() for n in exact]) for x in (found, exact))
    assert torch.cosine_similarity(one, two, dim=0) > 0.97
    if family == "gpt-oss":
        gate = model.model.layers[0].mlp.experts.own_gate
        assert type(gate).__name__ == "LeanExpertsGate"
    basis.revert(model)
    assert kinds(model) == kinds(plain)
    again, restored = step(model)
    assert again == loss
    assert all(torch.equal(restored[name], grad) for name, grad in exact.items())
