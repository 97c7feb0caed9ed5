"""The tied embedding against autograd's own sum of two gradients, and where that sum lies."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import basis
from basis.embedding import tied_embedding
from harness.memory import cpu_peak_bytes, tensor_bytes
from models import GPT, GPTConfig

V, C, T = 23, 16, 8


def tied_gpt(vocab_size: int = V, dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(vocab_size=vocab_size, block_size=T, n_layer=1, n_head=2, n_embd=C, tie_head=True)
    ).to(dtype)


def batch(vocab_size: int = V) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocab_size, (3, T + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def plain_loss(model: GPT) -> Tensor:
    """From whole logits: the embedding and the head each by autograd."""
    inputs, targets = batch()
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def same(got: list[Tensor], expected: list[Tensor], factor: float = 1.0) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, factor * b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_gradients_are_those_of_autograd_however_often_they_are_asked_for(factor: float) -> None:
    model = tied_gpt()
    expected = list(torch.autograd.grad(plain_loss(model), list(model.parameters())))
    loss = factor * model(*batch())
    assert "_TiedEmbedding" in str(tied_embedding(model.wte, batch()[0])[0].grad_fn)
    for _ in range(2):  # nothing may be written to what a retained graph keeps
        same(
            list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)),
            expected,
            factor,
        )
    loss.backward()
    (factor * model(*batch())).backward()  # on top of the first one's
    same([p.grad for p in model.parameters()], expected, 2 * factor)


def test_functional_gradient() -> None:
    model = tied_gpt()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, batch())

    got = torch.func.grad(loss)(parameters)
    same(list(got.values()), list(torch.autograd.grad(plain_loss(model), list(model.parameters()))))


def test_either_gradient_alone() -> None:
    model = tied_gpt()
    tokens, targets = batch()
    rows, weight = tied_embedding(model.wte, tokens)
    assert weight is not None
    (grad,) = torch.autograd.grad(rows.sum(), model.wte.weight)
    torch.testing.assert_close(
        grad, torch.bincount(tokens.flatten(), minlength=V)[:, None].expand(V, C).double()
    )
    x = torch.randn(*tokens.shape, C, dtype=torch.float64)
    rows, weight = tied_embedding(model.wte, tokens)
    (grad,) = torch.autograd.grad(
        basis.linear_cross_entropy(model.head, x, targets, weight=weight), model.wte.weight
    )
    expected = F.cross_entropy(model.head(x).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(grad, torch.autograd.grad(expected, model.wte.weight)[0])


def test_the_usual_way_where_it_is_needed() -> None:
    tokens, _ = batch()
    for embedding in (
        nn.Embedding(V, C, padding_idx=0),
        nn.Embedding(V, C, sparse=True),
        nn.Embedding(V, C).requires_grad_(False),
    ):
        rows, weight = tied_embedding(embedding, tokens)
        assert weight is None
        assert torch.equal(rows, embedding(tokens))
    with torch.no_grad():
        assert tied_embedding(nn.Embedding(V, C), tokens)[1] is None


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_one_gradient_of_the_weight_exists(factor: float) -> None:
    """At a vocabulary that outweighs the rest: parameters, the gradients, and less than another V x
    C tensor.
    """
    model = tied_gpt(5000, torch.float32)
    basis.convert(model, basis.BalancedSketch(2))
    tokens, targets = batch(5000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    peak = cpu_peak_bytes(model, optimizer, lambda _: (factor * model(tokens, targets)).backward())
    parameters = tensor_bytes(model.parameters())
    # The gradient, and in forward a block of logits, 24 x V, 1.5 times the parameters. PyTorch's
    # own way needs two gradients.
    assert parameters < peak - parameters < 1.8 * parameters
