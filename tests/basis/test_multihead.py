"""nn.MultiheadAttention and the Transformer layers around it: what PyTorch computes, with sketches
of what the projections read.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import basis
from basis.convert import left_alone
from basis.diagnostics.adaptive_rank import set_rank
from basis.layers.attention import SketchedAttention

SKETCH = basis.BalancedSketch(6, invariant_scalars=False)
N, L, S, E, H = 3, 5, 7, 8, 2


class Holder(nn.Module):
    """A model of one attention."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(E, H, **options)

    def forward(self, *inputs: Tensor, **options: Any) -> Any:
        return self.attention(*inputs, **options)


def made(method: basis.estimator.Estimator | None = None, **options: Any) -> Holder:
    model = Holder(**options)
    if method is not None:
        assert basis.convert(model, method, exact_if_kept=False) == ["attention"]
    return model


def results(model: nn.Module, inputs: list[Tensor], **options: Any) -> list[Tensor | None]:
    """Outputs, input gradients, gradients of parameters."""
    model.zero_grad()
    leaves = {id(x): x.clone().requires_grad_() for x in inputs}
    y, weights = model(*(leaves[id(x)] for x in inputs), **options)
    loss = y.square().sum() + (0.0 if weights is None else weights.square().sum())
    loss.backward()
    found = [y, weights, *(x.grad for x in leaves.values())]
    return [None if t is None else t.detach() for t in found] + [p.grad for p in model.parameters()]


def number(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


causal = nn.Transformer.generate_square_subsequent_mask
padding = torch.tensor([[False] * S, [False] * (S - 1) + [True], [False] * (S - 3) + [True] * 3])
x, y, z = number(L, N, E), number(S, N, E), 2 * number(S, N, E)
bx, by = number(N, L, E), number(N, S, E)
CASES: dict[str, tuple[dict[str, Any], list[Tensor], dict[str, Any]]] = {
    "self": ({}, [x, x, x], {}),
    "self, no weights": ({}, [x, x, x], {"need_weights": False}),
    "batch first": ({"batch_first": True}, [bx, bx, bx], {"need_weights": False}),
    "no bias": ({"bias": False}, [x, x, x], {}),
    "causal": (
        {},
        [x, x, x],
        {"attn_mask": causal(L), "is_causal": True, "need_weights": False},
    ),
    "causal with weights": ({}, [x, x, x], {"attn_mask": causal(L), "is_causal": True}),
    "bool mask": ({}, [x, y, y], {"attn_mask": number(L, S) > 1, "average_attn_weights": False}),
    "mask of each head": ({}, [x, y, y], {"attn_mask": number(N * H, L, S)}),
    "cross, padded": (
        {"batch_first": True},
        [bx, by, by],
        {"key_padding_mask": padding, "need_weights": False},
    ),
    "both masks": ({}, [x, y, y], {"key_padding_mask": padding, "attn_mask": number(L, S) > 1}),
    "three inputs": ({}, [x, y, z], {}),
    "other widths": ({"kdim": 6, "vdim": 4}, [x, y[..., :6], y[..., :4]], {}),
    "not batched": ({}, [x[:, 0], y[:, 0], y[:, 0]], {"key_padding_mask": padding[1]}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_method_that_keeps_all_gives_what_pytorch_gives(case: str) -> None:
    options, inputs, call = CASES[case]
    plain = results(made(**options), inputs, **call)
    for method in (basis.Exact(), basis.BalancedSketch(64, invariant_scalars=False)):
        torch.testing.assert_close(results(made(method, **options), inputs, **call), plain)


@pytest.mark.parametrize("case", ["self", "cross, padded", "other widths"])
def test_outputs_and_input_gradients_are_exact_and_weight_gradients_unbiased(case: str) -> None:
    options, inputs, call = CASES[case]
    exact = results(made(**options), inputs, **call)
    model = made(SKETCH, **options)
    known = 2 + len({id(t) for t in inputs})
    draws = []
    for step in range(150):
        basis.set_noise_key(model, seed=0, step=step)
        found = results(model, inputs, **call)
        torch.testing.assert_close(found[:known], exact[:known])
        draws.append(found[known:])
    estimated = 0
    for index, (name, p) in enumerate(model.named_parameters()):
        stack, wanted = torch.stack([draw[index] for draw in draws]), exact[known + index]
        if p.ndim == 1:
            torch.testing.assert_close(stack[0], wanted)
            continue
        estimated += 1
        z = (stack.mean(0) - wanted) / (stack.std(0) / len(draws) ** 0.5)
        assert stack.std(0).min() > 0, name
        assert z.square().mean() < 1.7, name
    assert estimated == (4 if "kdim" in options else 2)


def test_self_attention_keeps_one_sketch_and_no_input() -> None:
    wide = number(40, N, E)

    def matrices(method: basis.estimator.Estimator | None) -> list[tuple[int, ...]]:
        model, kept = made(), []
        if method is not None:
            basis.convert(model, method)

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(wide, wide, wide, need_weights=False)
        return [shape for shape in kept if shape[-1:] == (E,)]

    assert matrices(SKETCH).count((6, E)) == 1  # out_proj reads what attention keeps anyway
    assert (40 * N, E) in matrices(None)
    assert (40 * N, E) not in matrices(SKETCH)


def test_it_is_found_named_and_put_back() -> None:
    model = made()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    basis.convert(model, SKETCH)
    layers = dict(basis.sketched_layers(model))
    assert list(layers) == ["attention", "attention.out_proj"]
    assert layers["attention"].weight is model.attention.in_proj_weight
    assert isinstance(model.attention, SketchedAttention)
    assert isinstance(model.attention, nn.MultiheadAttention)
    assert left_alone(model, SKETCH) == []
    basis.convert(model, lambda name, layer: basis.BalancedSketch(layer.out_features // E))
    assert [layer.estimator.rank for _, layer in basis.sketched_layers(model)] == [3, 1]
    set_rank(model, 2)
    assert [layer.estimator.rank for _, layer in basis.sketched_layers(model)] == [2, 2]
    assert type(copy.deepcopy(model).attention) is type(model.attention)
    assert list(model.state_dict()) == keys
    assert basis.revert(model) == ["attention"]
    assert type(model.attention) is nn.MultiheadAttention
    assert type(model.attention.out_proj) is NonDynamicallyQuantizableLinear
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert set(vars(model.attention)) == set(vars(made().attention))
    assert list(model.state_dict()) == keys


def test_what_is_learned_is_in_the_state_dict_and_loads() -> None:
    method = basis.Transform(bits=4.0, every=1)
    model = made(method)
    for inputs in ([x, x, x], [x, y, y]):
        results(model, inputs)
    state = model.state_dict()
    other = made(method)
    other.load_state_dict(state)
    torch.testing.assert_close(other.state_dict(), state)
    other.load_state_dict(made().state_dict())
    assert sum("estimator_" in key for key in state) == 2 * len(model.attention.state)


def test_attention_that_adds_keys_is_left_with_the_reason() -> None:
    for options, why in (({"add_bias_kv": True}, "has biases"), ({"add_zero_attn": True}, "adds")):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H, **options), "b": nn.Linear(99, 99)})
        assert basis.convert(model, SKETCH) == ["b"]
        inside = "the attention around it uses its weight, and does not call it"
        left = {entry.name: entry.why for entry in left_alone(model, SKETCH)}
        assert left["a"].startswith(why)
        assert left["a.out_proj"] == inside
        with pytest.raises(ValueError, match=rf"a \(MultiheadAttention: {why}.*{inside}"):
            basis.convert(model, SKETCH, include=["a*"])


def layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "encoder":
        single = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(single, 2, enable_nested_tensor=False)
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16, 0.0, batch_first=True), 2)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_transformer_layers_are_sketched_whole(kind: str) -> None:
    plain, model = layer(kind), layer(kind)
    inputs = (bx,) if kind == "encoder" else (bx, by)
    changed = basis.convert(model, basis.Exact())
    assert len(changed) == 2 * (3 if kind == "encoder" else 4)
    assert {entry.kind for entry in left_alone(model, basis.Exact())} == {"LayerNorm"}
    for net in (plain, model):
        net(*inputs).square().sum().backward()
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], [p.grad for p in plain.parameters()]
    )
    for net in (plain.eval(), model.eval()):
        with torch.no_grad():  # PyTorch's fast path, in the encoder
            torch.testing.assert_close(net(*inputs), plain(*inputs))
    basis.convert(model, SKETCH)
    model(*inputs).sum().backward()
    basis.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_layers_that_read_one_memory_keep_one_sketch_of_it() -> None:
    model, kept = layer("decoder"), []
    basis.convert(model, SKETCH, include=["*.multihead_attn"])

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tuple(tensor.shape), tensor.data_ptr()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(bx, by)
    sketches = [entry for entry in kept if entry[0] == (6, E)]
    # In each layer one of the queries and one of the memory, the same in both layers.
    assert len(set(sketches)) == 3
