"""Compressed checkpoint boundaries: forward exact, gradients those at x^, bytes as counted."""

from __future__ import annotations

import functools
from typing import Any

import gpt_checks
import pytest
import torch
from torch import Tensor

import basis
from basis.lean.boundary import Boundary, compiling_blocks, decode, encode
from harness import activations
from harness.activations import ActivationsOptions
from harness.memory import saved_bytes
from models import GPT, GPTConfig

aten = torch.ops.aten
B, T, C, V = 3, 16, 128, 50
TOKENS = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))


def gpt(bits: int | None, *methods: Any, blocks: int = 2, step: int = 0, **options: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, block_size=T, n_layer=blocks, n_head=2, n_embd=C, **options))
    for method in methods:
        basis.convert(model, method, exact_if_kept=False)  # as compiled graphs do
    activations.apply(model, ActivationsOptions(name="checkpoint", boundary=bits))
    basis.set_noise_key(model, seed=0, step=step)
    return model


loss_of = functools.partial(gpt_checks.loss_of, TOKENS)
gradients = functools.partial(gpt_checks.gradients, TOKENS)


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Of all gradients together, in norm."""
    pairs = list(zip(found[1:], exact[1:], strict=True))
    return (sum(float((a - b).square().sum()) for a, b in pairs)
            / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_gradients_are_those_of_the_block_at_the_decoded_input(bits: int, low: bool) -> None:
    """By hand, block after block from the last one, with a dropout that must repeat itself."""
    model = gpt(bits, basis.Quantized(8), dropout=0.1)
    inputs: list[Tensor] = []
    plain = [type(block).forward for block in model.blocks]
    boundaries = [block.boundary for block in model.blocks]
    x = torch.randn(B, T, C, generator=torch.Generator().manual_seed(3)).requires_grad_()
    grad_y = torch.randn(B, T, C, generator=torch.Generator().manual_seed(4))

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=low)

    torch.manual_seed(5)
    y, states = x, []
    for block in model.blocks:
        inputs.append(y.detach())
        states.append(torch.get_rng_state())
        with autocast():
            y = block(y)
    y.backward(grad_y)
    found = [x.grad, *(p.grad for p in model.blocks.parameters())]
    model.zero_grad()

    for i in reversed(range(2)):
        torch.set_rng_state(states[i])
        exact, key = inputs[i], boundaries[i].noise_key
        decoded = decode(encode(exact, bits, key), bits, exact.shape, exact.dtype)
        decoded.requires_grad_()
        assert 0 < (decoded - exact).norm() < (0.02 if bits == 8 else 0.2) * exact.norm()
        with autocast():
            again = plain[i](model.blocks[i], decoded)
        again.backward(grad_y)
        grad_y = decoded.grad
    expected = [grad_y, *(p.grad for p in model.blocks.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0.002, 0.02), (4, 0.02, 0.2)])
def test_the_loss_is_exact_and_gradients_are_near(bits: int, least: float, most: float) -> None:
    exact = gradients(gpt(None))
    found = gradients(gpt(bits))
    assert torch.equal(found[0], exact[0])
    assert least < error(found, exact) < most
    again, other = gradients(gpt(bits)), gradients(gpt(bits, step=1))
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    assert 0.5 < error(other, exact) / error(found, exact) < 2
    assert not torch.equal(other[2], found[2])


@pytest.mark.parametrize(("bits", "most"), [pytest.param(8, 0.2, marks=pytest.mark.slow), (4, 0.3)])
def test_most_of_the_error_averages_out(bits: int, most: float) -> None:
    """Of 40 steps' noise; independent errors would leave 0.16."""
    exact = gradients(gpt(None))
    many = [gradients(gpt(bits, step=step)) for step in range(40)]
    mean = [torch.stack(parts).mean(0) for parts in zip(*many, strict=True)]
    typical = (sum(error(one, exact) ** 2 for one in many) / len(many)) ** 0.5
    assert error(mean, exact) < most * typical


@pytest.mark.parametrize("bits", [8, 4])
def test_a_block_keeps_its_codes_alone(bits: int) -> None:
    few, more = (sum(saved_bytes(m, lambda m=m: loss_of(m)).values())
                 for m in (gpt(bits, blocks=n) for n in (1, 2)))  # fmt: skip
    numbers = B * T * C
    ranges = numbers // 64 * 4 if bits == 8 else numbers // 128 * 4 + 8  # 4: a key too
    assert more - few == numbers * bits // 8 + ranges


# Dynamo's own look at .grad of a block's input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("bits", "method", "most"),
    [
        pytest.param(8, (), 1e-6, marks=pytest.mark.slow),
        (4, (basis.BalancedSketch(4),), 1e-5),
        # it learns from x in eager mode, from x^ here
        pytest.param(8, (basis.EMASketch(2, rows=48),), 0.1, marks=pytest.mark.slow),
    ],
    ids=["exact", "sketch", "learning"],
)
def test_compiled_blocks_give_what_eager_ones_do_from_few_graphs(
    bits: int, method: tuple[Any, ...], most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    quick = functools.partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", quick)
    eager, model = gradients(gpt(bits, *method)), gpt(bits, *method)
    with compiling_blocks():
        compiled = gradients(model)
    torch.testing.assert_close(compiled[0], eager[0])
    assert error(compiled, eager) < most
    # Rounding, restoring, a block's forward, a block with its backward: all blocks share them.
    assert len(graphs) == 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "method",
    [(), pytest.param((basis.Quantized(4),), marks=pytest.mark.slow)],
    ids=["exact", "quantized"],
)
def test_compiled_blocks_do_not_repeat_their_last_product(
    method: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four dense layers: four products forward, three of them again, and eight backward."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    counts: list[int] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        products = (aten.mm.default, aten.addmm.default, aten.bmm.default)
        counts.append(sum(node.target in products for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    block = gpt(8, *method).blocks[0]
    x = torch.randn(B, T, C, requires_grad=True)
    with compiling_blocks():
        block(x).square().sum().backward()
    assert [number for number in counts if number] == [4, 11]


@pytest.mark.parametrize("bits", [3, 16, 0])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"^boundary={bits}: must be one of 8, 4, or null"):
        Boundary(torch.nn.Identity(), bits)
    with pytest.raises(ValueError, match=f"^activations.boundary={bits}: must be one of"):
        ActivationsOptions(name="checkpoint", boundary=bits)
    with pytest.raises(
        ValueError, match=r"^activations.boundary=8: not with activations.selective"
    ):
        ActivationsOptions(name="checkpoint", boundary=8, selective=True)
