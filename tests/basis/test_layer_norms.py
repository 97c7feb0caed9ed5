"""LayerNorms that families write for themselves: told by what they compute, to the last bit; their
gradients against autograd's in float64.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import basis
from basis.lean import norm
from basis.lean.layer_norms import LeanOtherLayerNorm, other_kind_of
from basis.lean.norm import norm_of_rows, normalized

WIDTH = 24
KEY = torch.tensor(0x3ABCDEF987654321)


class WrittenOutLayerNorm(nn.Module):
    """In float32, one operation after the other, as Cohere's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.variance_epsilon = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        mean = wide.mean(-1, keepdim=True)
        variance = (wide - mean).pow(2).mean(-1, keepdim=True)
        n = (wide - mean) * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight.to(torch.float32) * n).to(x.dtype)


class BareLayerNorm(nn.Module):
    """Without parameters, as OLMo's."""

    def __init__(self) -> None:
        super().__init__()
        self.normalized_shape = (WIDTH,)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.to(torch.float32), self.normalized_shape, eps=1e-5).to(x.dtype)


class LayerNormOnePlus(nn.LayerNorm):
    """The weight is added to one, as Nemotron's."""

    def __init__(self) -> None:
        super().__init__(WIDTH, eps=1e-3)
        nn.init.normal_(self.weight, std=0.3)
        nn.init.normal_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1.0, self.bias, self.eps)


class LayerNormByTwo(LayerNormOnePlus):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 2.0, self.bias, self.eps)


KINDS = {"cohere": WrittenOutLayerNorm, "olmo": BareLayerNorm, "1p": LayerNormOnePlus}


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(5, 7, WIDTH, generator=torch.Generator().manual_seed(1)) + 0.5
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("single", [True, False])
def test_gradients_are_those_of_autograd(
    single: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "round_to_int8", lambda x, key: (x, x.new_empty(0)))
    monkeypatch.setattr(norm, "restore", lambda kept, dtype: kept[0])
    generator = torch.Generator().manual_seed(2)
    weight, shift = torch.randn(2, WIDTH, generator=generator, dtype=torch.float64).unbind()
    given = [rows(torch.float64), weight.requires_grad_()]
    if bias and not single:
        given.append(shift.requires_grad_())
    x, w, *b = given
    y = F.layer_norm(x, (WIDTH,), w, b[0] if b else None, 1e-3)
    seed = torch.ones_like(y).cumsum(-1).sin()
    z = normalized(x, w, b[0] if b else None, 1e-3, single, key=KEY)
    torch.testing.assert_close(z, y, rtol=1e-12, atol=1e-12)
    assert torch.equal(z, norm_of_rows(x, w, b[0] if b else None, 1e-3, single)[0])
    exact, found = (torch.autograd.grad(out, given, seed) for out in (y, z))
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_told_and_replaced_in_place(kind: str) -> None:
    torch.manual_seed(0)
    plain = KINDS[kind]()
    assert other_kind_of(plain) == kind
    model = nn.Sequential(plain)
    x = rows()
    y = model(x)
    seed = torch.ones_like(y).cumsum(-1).sin()
    given = [x, *model.parameters()]
    exact = torch.autograd.grad(y, given, seed)
    assert basis.convert(model, basis.Lean()) == ["0"]
    assert isinstance(model[0], LeanOtherLayerNorm)
    z = model(x)
    assert torch.equal(z, y)
    for one, wanted in zip(torch.autograd.grad(z, given, seed), exact, strict=True):
        assert (one - wanted).norm() < 0.02 * wanted.norm()
    low = rows(torch.bfloat16)
    found = model(low)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, plain(low))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))
    assert basis.revert(model) == ["0"]
    assert type(model[0]) is KINDS[kind]


def test_others_are_left_alone() -> None:
    assert other_kind_of(LayerNormByTwo()) is None
    assert other_kind_of(nn.LayerNorm(WIDTH)) is None
    heads = WrittenOutLayerNorm()
    heads.weight = nn.Parameter(torch.ones(2, WIDTH))  # a weight for each head
    assert other_kind_of(heads) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_has_the_gradients_of_eager_mode(kind: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(KINDS[kind]())
    basis.convert(model, basis.Lean())
    basis.set_noise_key(model, seed=0, step=0)
    x = rows()
    runs = model, torch.compile(model, backend="aot_eager", fullgraph=True)
    (a, b) = (torch.autograd.grad(run(x).square().sum(), x)[0] for run in runs)
    torch.testing.assert_close(a, b)
