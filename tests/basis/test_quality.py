"""The gradient-quality panel against gradients formed by hand and the variance formula."""

import math

import pytest
import torch
from oracle import variance
from torch import nn

import basis
from basis import BalancedSketch, Exact, gradient_quality
from models import GPT, GPTConfig

ROWS = 12


def mlp() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)), torch.randn(ROWS, 6)


def test_of_one_draw_as_formed_by_hand() -> None:
    model, x = mlp()
    model(x).square().sum().backward()
    exact = [p.grad.clone() for p in model.parameters() if p.ndim == 2]
    basis.convert(model, BalancedSketch(3, shrinkage=0.1), exact_if_kept=False)
    basis.set_noise_key(model, seed=0, step=5)
    model.zero_grad()
    model(x).square().sum().backward()
    estimates = [p.grad.clone() for p in model.parameters() if p.ndim == 2]
    before = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    quality = gradient_quality(model, lambda: model(x).square().sum())
    assert list(quality) == ["0", "2", "all"]
    flat = [*zip(exact, estimates, strict=True)]
    flat.append(tuple(torch.cat([t.flatten() for t in side]) for side in zip(*flat, strict=True)))  # type: ignore[arg-type]
    for (t, e), q in zip(flat, quality.values(), strict=True):
        assert q.relative_error == pytest.approx(float((e - t).norm() / t.norm()), rel=1e-5)
        assert q.cosine == pytest.approx(float((e * t).sum() / e.norm() / t.norm()), rel=1e-5)
        assert q.norm_ratio == pytest.approx(float(e.norm() / t.norm()), rel=1e-5)
        assert set(q.metrics()) == {"relative_error", "cosine", "norm_ratio"}
    # Nothing about the model is changed by looking.
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))
    assert [layer.estimator for _, layer in basis.sketched_layers(model)] == [
        BalancedSketch(3, shrinkage=0.1)
    ] * 2


@pytest.mark.parametrize("hashing", ["balanced", pytest.param("uniform", marks=pytest.mark.slow)])
def test_variance_and_bias_of_the_unbiased_sketch(hashing: str) -> None:
    model, x = mlp()
    layer, inputs = model[2], torch.tanh(model[0](x)).detach()
    grad_y = 2 * layer(inputs).detach()
    expected = variance(inputs, grad_y, 3, hashing) / float((grad_y.t() @ inputs).square().sum())
    basis.convert(
        model,
        BalancedSketch(3, hashing=hashing, invariant_scalars=False),
        include=["2"],
        exact_if_kept=False,
    )
    basis.set_noise_key(model, seed=1, step=0)
    quality = gradient_quality(model, lambda: model(x).square().sum(), masks=3000)["2"]
    assert quality.variance == pytest.approx(expected, rel=0.1)
    assert quality.bias < 3 * math.sqrt(expected / 3000)


def test_shrinkage_is_seen_as_bias_and_no_variance() -> None:
    model, x = mlp()
    basis.convert(model, BalancedSketch(ROWS, shrinkage=0.1))
    basis.set_noise_key(model, seed=1, step=0)
    for quality in gradient_quality(model, lambda: model(x).square().sum(), masks=4).values():
        assert quality.bias == pytest.approx(1 - 0.9**2, rel=1e-4)
        assert quality.norm_ratio == pytest.approx(0.9**2, rel=1e-4)
        assert quality.cosine == pytest.approx(1, rel=1e-6)
        assert quality.variance < 1e-8


def test_through_the_loss_head_of_a_gpt() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=19, block_size=8, n_layer=1, n_head=2, n_embd=16))
    tokens = torch.randint(19, (2, 8))
    model(tokens, tokens).backward()
    exact = model.head.weight.grad.clone()
    basis.convert(model, BalancedSketch(2), include=["blocks.*.mlp.*", "head"])
    basis.set_noise_key(model, seed=0, step=0)
    model.zero_grad()
    model(tokens, tokens).backward()
    estimate = model.head.weight.grad
    quality = gradient_quality(model, lambda: model(tokens, tokens))
    assert list(quality) == ["blocks.0.mlp.fc", "blocks.0.mlp.proj", "head", "all"]
    assert quality["head"].relative_error == pytest.approx(
        float((estimate - exact).norm() / exact.norm()), rel=1e-5
    )


def test_edges() -> None:
    model, x = mlp()
    assert gradient_quality(model, lambda: model(x).sum()) == {}
    basis.convert(model, Exact())
    quality = gradient_quality(model, lambda: model(x).square().sum(), masks=2)["all"]
    assert (quality.bias, quality.variance) == pytest.approx((0, 0), abs=1e-6)
    zero = gradient_quality(model, lambda: 0 * model(x).sum(), masks=2)["0"]
    assert all(math.isnan(value) for value in zero.metrics().values())
    for masks in (-1, 1):
        with pytest.raises(ValueError, match="masks="):
            gradient_quality(model, lambda: model(x).sum(), masks=masks)
    twice = nn.Sequential(layer := nn.Linear(6, 6), layer)
    basis.convert(twice, Exact())
    with pytest.raises(ValueError, match="used twice"):
        gradient_quality(twice, lambda: twice(x).sum())
    assert type(twice[0].estimator) is Exact


def test_a_loss_that_cannot_be_compared_is_refused_in_words() -> None:
    model, x = mlp()
    basis.convert(model, BalancedSketch(3))
    with pytest.raises(TypeError, match=r"a function that computes the loss.* got a Tensor"):
        gradient_quality(model, model(x).sum())  # type: ignore[arg-type]
    for loss, got in (
        (lambda: model(x).sum().item(), "a float"),
        (lambda: model(x), r"shape \(12, 4\)"),
    ):
        with pytest.raises(TypeError, match=f"a scalar tensor with graph, got {got}"):
            gradient_quality(model, loss)
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients, and they are off"):
        gradient_quality(model, lambda: model(x).sum())
    with pytest.raises(ValueError, match=r"^masks=2\.5"):
        gradient_quality(model, lambda: model(x).sum(), masks=2.5)  # type: ignore[arg-type]
    assert [layer.estimator for _, layer in basis.sketched_layers(model)] == [BalancedSketch(3)] * 2
