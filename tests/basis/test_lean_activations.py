"""Lean activations and dropout: forward exact, gradients within what the essays state, few bits."""

import pickle

import pytest
import torch
from lookalike_blocks import (
    LOW,
    ROWS,
    WIDE,
    N,
    NewGELUActivation,
    QuickGELUActivation,
    ReLUSquaredActivation,
    SiLUActivation,
    errors,
    gradients,
    kept_by,
    normal,
)
from torch import nn

import basis
from basis.lean import (
    LeanActivation,
    LeanDropout,
    LeanReLUSquared,
)


@pytest.mark.parametrize(("bits", "most"), [(2, 0.16), (4, 0.05)])
@pytest.mark.parametrize("kind", [SiLUActivation, nn.SiLU, NewGELUActivation, QuickGELUActivation])
def test_activations_are_exact_forward_and_stepwise_backward(
    kind: type[nn.Module], bits: int, most: float
) -> None:
    plain, lean = kind(), nn.Sequential(kind())
    basis.convert(lean, basis.Lean(gelu_bits=bits))
    assert isinstance(lean[0], LeanActivation)
    x = normal(ROWS, N)
    (y, exact), (z, found) = gradients(plain, x), gradients(lean, x)
    assert torch.equal(z, y)
    (error,) = errors(found, exact)
    assert 0.01 < error < most
    steps = torch.autograd.grad(lean(x.requires_grad_()).sum(), x)[0]
    assert len(steps.unique()) == 2**bits
    assert kept_by(lean, x) == ROWS * N * bits // 8
    basis.revert(lean)
    assert type(lean[0]) is kind


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_relu_is_exact_and_one_bit(low: bool) -> None:
    """In any layout; a sketched layer behind it keeps its sketch, though PyTorch keeps ReLU's
    output.
    """
    plain, lean = nn.ReLU(), nn.Sequential(nn.ReLU())
    basis.convert(lean, basis.Lean(gelu_bits=4))
    assert isinstance(lean[0], LeanActivation)
    images = normal(2, 16, 8, 8).to(LOW if low else torch.float32)
    images[0, 0] = 0.0  # where the derivative is zero
    for x in (images, images.to(memory_format=torch.channels_last), images.mT):
        (y, exact), (z, found) = gradients(plain, x), gradients(lean, x)
        assert torch.equal(z, y)
        assert torch.equal(found[0], exact[0])
    assert kept_by(lean, images) == images.numel() // 8
    assert basis.revert(lean) == ["0"]
    assert type(lean[0]) is nn.ReLU
    model, x = nn.Sequential(nn.Linear(N, WIDE), nn.ReLU(), nn.Linear(WIDE, N)), normal(ROWS, N)
    basis.convert(model, basis.Quantized(bits=2), include=["2"])
    assert kept_by(model, x) == 4 * ROWS * WIDE  # as ReLU keeps it
    basis.convert(model, basis.Lean())
    assert kept_by(model, x) < ROWS * WIDE // 8 + 0.3 * ROWS * WIDE
    with pytest.raises(ValueError, match="no module to make lean"):
        basis.convert(nn.Sequential(nn.ReLU(inplace=True), nn.ReLU6()), basis.Lean())


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_square_of_relu_is_four_bits_whatever_its_inputs_size(scale: float) -> None:
    plain, lean = ReLUSquaredActivation(), nn.Sequential(ReLUSquaredActivation())
    assert basis.convert(lean, basis.Lean()) == ["0"]
    assert isinstance(lean[0], LeanReLUSquared)
    x = scale * normal(ROWS, WIDE)
    x[:, :2] = -1.0  # every group has a zero
    y, exact = gradients(plain, x)
    draws = [gradients(lean, x, seed) for seed in range(64)]
    assert all(torch.equal(z, y) for z, _ in draws)
    found = [grads for _, grads in draws]
    assert 0.02 < errors(found[0], exact)[0] < 0.08
    assert not found[0][0][x <= 0].any()
    mean = [torch.stack([grads[0] for grads in found]).mean(0)]
    assert errors(mean, exact)[0] < 1.5 * errors(found[0], exact)[0] / 8  # no bias
    assert kept_by(lean, x) == ROWS * WIDE // 2 + 4 * ROWS + 8  # codes, a range a row, the key
    basis.convert(lean, basis.Lean(gelu_bits=4))
    basis.set_noise_key(lean, seed=0, step=0)
    assert torch.equal(gradients(lean, x, 0)[1][0], gradients(lean, x, 1)[1][0])
    assert torch.equal(pickle.loads(pickle.dumps(lean))(x), y)
    basis.revert(lean)
    assert type(lean[0]) is ReLUSquaredActivation


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_dropout_is_exact_and_one_bit(low: bool) -> None:
    plain, lean = nn.Dropout(0.3), nn.Sequential(nn.Dropout(0.3))
    basis.convert(lean, basis.Lean())
    assert type(lean[0]) is LeanDropout
    x = normal(ROWS, N)
    x[0] = 0  # whose dropping shows in the gradient alone
    x = x.to(LOW) if low else x
    (y, exact), (z, found) = gradients(plain, x), gradients(lean, x)
    assert torch.equal(z, y)
    torch.testing.assert_close(found, exact)
    assert (found[0][0] == 0).any()
    assert kept_by(lean, x) == ROWS * N // 8
    assert torch.equal(lean.eval()(x), x)
    basis.revert(lean)
    assert type(lean[0]) is nn.Dropout
    for nothing in (nn.Dropout(0.0), nn.Dropout(0.1, inplace=True)):
        with pytest.raises(ValueError, match="no module to make lean"):
            basis.convert(nn.Sequential(nothing), basis.Lean())
