"""PyTorch's attention with q, k, v and output in 8 bits: grouped queries, masks, dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from basis.lean import sdpa
from basis.lean.sdpa import _repeated, _summed, kernel_by_rule, lean_sdpa

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 40, 16
KEY = torch.tensor(0x3ABCDEF987654321)


def heads(groups: int = HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, count, LENGTH, WIDTH) for count in (HEADS, groups, groups)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def padding() -> Tensor:
    """A causal mask (b, 1, T, T) of a batch whose second text is shorter."""
    mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[1, :, :, 30:] = False
    return mask


def as_numbers() -> Tensor:
    return torch.zeros(padding().shape).masked_fill(~padding(), float("-inf"))


MASKS = {"causal": lambda: None, "padded": padding, "as numbers": as_numbers}


def kept_by(run: object) -> tuple[int, Tensor]:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    return sum(kept.values()), output


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(output, inputs, torch.ones_like(output).cumsum(-1).sin()))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("groups", [HEADS, 2, 1])
def test_output_is_exact_and_gradients_near(groups: int, masked: str, dropout: float) -> None:
    inputs, mask = heads(groups), MASKS[masked]()
    torch.manual_seed(1)
    plain = F.scaled_dot_product_attention(
        *(*inputs, mask, dropout, mask is None), scale=0.3, enable_gqa=groups < HEADS
    )
    exact = gradients(plain, inputs)
    torch.manual_seed(1)
    lean = lean_sdpa(*inputs, mask, KEY, causal=mask is None, dropout=dropout, scale=0.3)
    state = torch.get_rng_state()
    assert torch.equal(lean, plain)
    for found, wanted in zip(gradients(lean, inputs), exact, strict=True):
        assert 0 < (found - wanted).norm() < 0.03 * wanted.norm()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_kept_is_counted_by_hand() -> None:
    """k and v with their own heads; a mask once for two layers, as it was given."""
    inputs, mask = heads(1), padding()
    number = BATCH * LENGTH * (WIDTH + 4)  # codes of a head and a scale
    lse = BATCH * HEADS * LENGTH * 4
    causal, first = kept_by(lambda: lean_sdpa(*inputs, None, KEY, causal=True))
    assert causal == number * (2 * HEADS + 2) + lse

    def layers() -> Tensor:
        return sum(lean_sdpa(*inputs, mask, KEY + i, causal=False) for i in range(2))

    masked, second = kept_by(layers)
    assert masked == 2 * causal + mask.numel()
    dropped, third = kept_by(lambda: lean_sdpa(*inputs, None, KEY, causal=True, dropout=0.1))
    assert dropped == number * (HEADS + 2)
    whole, last = kept_by(lambda: lean_sdpa(*inputs, None, KEY, causal=True, whole=True))
    assert whole == number * (HEADS + 2) + lse + 4 * BATCH * HEADS * LENGTH * WIDTH
    exact, _ = kept_by(lambda: F.scaled_dot_product_attention(*heads(), is_causal=True))
    assert exact > 3.5 * causal
    assert all(one.requires_grad for one in (first, second, third, last))


def test_rounding_values_and_output_leaves_no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """With q and k as they are: V and O stand in linear places."""
    inputs = heads()
    exact = gradients(F.scaled_dot_product_attention(*inputs, is_causal=True), inputs)
    restore = sdpa.restore_all

    def restored(kept: object, dtypes: object) -> list[Tensor]:
        _, _, v, out = restore(kept, dtypes)
        return [inputs[1].detach(), inputs[0].detach(), v, out]

    monkeypatch.setattr(sdpa, "restore_all", restored)
    draws = [
        gradients(lean_sdpa(*inputs, None, KEY + 7919 * i, causal=True), inputs) for i in range(100)
    ]
    for i, wanted in enumerate(exact[:2]):
        values = torch.stack([draw[i] for draw in draws])
        once, of_mean = ((x - wanted).norm() for x in (values[0], values.mean(0)))
        assert 0 < of_mean < 1.3 * once / 10


def test_gradients_of_repeated_keys_are_summed() -> None:
    """As the kernel wants them that knows no groups, on CUDA."""
    _, k, _ = heads(2)
    repeated = _repeated(k, HEADS)
    assert torch.equal(repeated[:, 1], k[:, 0])
    grad = torch.randn(repeated.shape, generator=torch.Generator().manual_seed(1))
    (wanted,) = torch.autograd.grad(repeated, k, grad)
    torch.testing.assert_close(_summed(grad, k), wanted)


def test_a_learned_bias_is_left_to_pytorch() -> None:
    bias = as_numbers().requires_grad_()
    assert lean_sdpa(*heads(), bias, KEY, causal=False) is None


def test_the_rule_for_graphs() -> None:
    inputs = heads()
    assert kernel_by_rule(inputs[0], padding()) == "cpu"
    assert kernel_by_rule(inputs[0], dropout=0.1) is None
    with torch.device("meta"):
        assert kernel_by_rule(torch.empty(1, 1, 8, 8)) is None
    with sdpa_kernel(SDPBackend.MATH):  # as asked for
        lean = lean_sdpa(*inputs, None, KEY, causal=True)
    assert "Again" in type(lean.grad_fn).__name__


@pytest.mark.parametrize("groups", [HEADS, 1])
@pytest.mark.parametrize("masked", ["causal", "padded"])
@pytest.mark.slow
def test_one_graph_has_the_gradients_of_eager_mode(groups: int, masked: str) -> None:
    inputs, mask = heads(groups), MASKS[masked]()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lean_sdpa(q, k, v, mask, KEY, causal=mask is None)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    eager, graph = attend(*inputs), compiled(*inputs)
    torch.testing.assert_close(graph, eager)
    torch.testing.assert_close(gradients(graph, inputs), gradients(eager, inputs))
