"""SUS attention: exact forward, unbiased gradients of the derived variance, the number kept.

The oracle is written with whole T x T matrices in float64 and takes nothing from the package but
the noise.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from sus_checks import delta_from_sample
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import basis
from basis.sus import MODES, SusAttention, mask_variance, sus_attention
from basis.sus.blocks import Heads
from basis.sus.masks import Noise, independent_mask
from basis.sus.statistics import kept_per_row
from harness.memory import saved_bytes
from models import GPT, GPTConfig
from models.gpt import CausalAttention

C = 3.0


def inputs(
    b: int = 1, h: int = 2, h_kv: int = 2, length: int = 24, d: int = 8
) -> tuple[Tensor, ...]:
    """q, k, v and dL/dO; sharper than unit normal, so that some entries are always kept and some
    hardly ever.
    """
    source = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(b, h, length, d, generator=source)
    k, v = (torch.randn(b, h_kv, length, d, generator=source) for _ in range(2))
    return q, k, v, torch.randn(b, h, length, d, generator=source)


def exact_gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    return torch.autograd.grad(output, leaves, grad)


def sus_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, key: int, c: float, mode: str
) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = sus_attention(*leaves, torch.tensor(key), c=c, mode=mode)
    return torch.autograd.grad(output, leaves, grad)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """W (b, h, T, T) in float64."""
    length = q.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(
        torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf
    ).softmax(-1)


def variances(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, c: float) -> tuple[float, ...]:
    """Total variance of dQ, dK, dV under independent masks, by the formulas of the rule's
    derivation.
    """
    weights = probabilities(q, k)
    k, v = (
        x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)
    )  # masks of query heads are independent
    spread = torch.where(weights < 1 / c, weights * (1 / c - weights), 0.0)
    x = grad.double() @ v.double().mT - ((weights @ v.double()) * grad.double()).sum(
        -1, keepdim=True
    )
    scale2 = 1 / q.shape[-1]
    of_q = scale2 * (spread * x**2 * k.double().square().sum(-1)[:, :, None]).sum()
    of_k = scale2 * (spread * x**2 * q.double().square().sum(-1)[..., None]).sum()
    of_v = (spread * grad.double().square().sum(-1)[..., None]).sum()
    return float(of_q), float(of_k), float(of_v)


def draws(mode: str, count: int) -> list[Tensor]:
    """`count` gradients dQ, dK, dV of one input, each under its own key: copies of the input stand
    side by side as sequences.
    """
    many = [x.expand(count, *x.shape[1:]) for x in inputs()]
    return [g.double() for g in sus_gradients(*many, basis.ops.noise.fold("draws", mode), C, mode)]


def z_scores(sample: list[Tensor]) -> list[float]:
    """For dQ, dK, dV the root mean square over elements of (mean - exact) / standard error; 1 if
    there is no bias.

    Elements of one row share their masks, so it wanders by about 0.1.
    """
    found = []
    for drawn, exact in zip(sample, exact_gradients(*inputs()), strict=True):
        error = drawn.std(0) / math.sqrt(len(drawn))
        moving = error > 1e-7  # the first rows keep all their entries
        found.append(float((((drawn.mean(0) - exact[0]) / error)[moving]).square().mean().sqrt()))
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("h", "h_kv"), [(2, 2), (4, 2), (3, 1)])
def test_without_a_limit_it_is_the_exact_gradient(mode: str, h: int, h_kv: int) -> None:
    case = inputs(b=2, h=h, h_kv=h_kv, length=50)
    for exact, found in zip(
        exact_gradients(*case), sus_gradients(*case, 5, 1e9, mode), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_output_is_that_of_exact_attention(mode: str) -> None:
    q, k, v, _ = inputs()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(sus_attention(q, k, v, torch.tensor(1), c=C, mode=mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_over_masks_is_the_exact_gradient(mode: str) -> None:
    sample = draws(mode, 4000)
    for drawn, exact in zip(sample, exact_gradients(*inputs()), strict=True):
        error = drawn.std(0) / math.sqrt(len(drawn))
        # 1,152 elements are looked at: one beyond 4 standard errors is to be expected now and then,
        # beyond 4.5 hardly ever.
        assert ((drawn.mean(0) - exact[0]).abs() <= 4.5 * error + 1e-6).all()
    assert all(0.75 < z < 1.25 for z in z_scores(sample))


def test_delta_from_the_sample_is_biased_and_the_test_sees_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(MODES, "dense", delta_from_sample)
    of_q, of_k, of_v = z_scores(draws("dense", 4000))
    assert of_q > 1.5
    assert of_k > 1.5
    assert of_v == pytest.approx(1, abs=0.15)  # D has no part in dV


@pytest.mark.parametrize("mode", MODES)
def test_variance_is_that_of_the_formula(mode: str) -> None:
    for drawn, expected in zip(draws(mode, 4000), variances(*inputs(), C), strict=True):
        found = float(drawn.var(0).sum())
        if mode == "dense":
            assert found == pytest.approx(expected, rel=0.05)
        else:
            assert 0.3 * expected < found < 1.02 * expected


@pytest.mark.parametrize(("h", "h_kv"), [(2, 2), (4, 2)])
def test_the_formula_is_that_of_the_oracle(
    h: int, h_kv: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = inputs(b=3, h=h, h_kv=h_kv)
    for in_cache in (
        basis.sus.blocks._IN_CACHE,
        300,
    ):  # numbers of a block: all rows, and 6 rows of one group
        monkeypatch.setattr(basis.sus.blocks, "_IN_CACHE", in_cache)
        for c in (1.0, C, 1e9):
            assert mask_variance(*case, c=c) == pytest.approx(variances(*case, c), rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_as_many_entries_are_kept_as_the_probabilities_say(mode: str) -> None:
    q, k, _, _ = inputs(h=4, h_kv=2)
    many = [x.expand(2000, *x.shape[1:]) for x in (q, k)]
    expected, drawn = kept_per_row(
        *many, torch.tensor(basis.ops.noise.fold("kept")), c=C, mode=mode
    )
    sums = (probabilities(q, k) * C).clamp(max=1).sum(-1)
    torch.testing.assert_close(expected[0].double(), sums[0], rtol=1e-5, atol=1e-5)
    assert (sums <= C + 1e-9).all()
    error = (drawn.double().std(0) / math.sqrt(2000)).clamp_min(1e-3)
    assert ((drawn.double().mean(0) - sums[0]).abs() / error).max() < 4.5
    if mode == "sparse":  # the sum rounded up or down
        assert ((drawn - sums).abs() < 1 + 1e-4).all()


def test_masks_of_rows_heads_and_sequences_are_independent() -> None:
    weights = torch.full((6, 8, 400), 1 / 400)
    noise = Noise.of(
        torch.tensor(basis.ops.noise.fold("pairs")),
        Heads(weights[:, None, :8, :1], weights[:, :8, :1], weights),
    )
    noise = Noise(noise.rows.flatten(1), torch.arange(400) * 7919)
    kept = (independent_mask(weights, 200.0, noise) > 0).double().flatten(
        0, 1
    ) - 0.5  # (rows of all heads, columns)
    correlation = 4 * (kept @ kept.mT) / 400
    assert (correlation - torch.eye(48)).abs().max() < 5 / math.sqrt(400)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_rows_draw_what_one_block_does(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = inputs(b=3, h=4, h_kv=2)
    whole = sus_gradients(*case, 7, C, mode)
    monkeypatch.setattr(basis.sus.blocks, "_IN_CACHE", 300)  # 6 rows of one group
    for a, b in zip(whole, sus_gradients(*case, 7, C, mode), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_draws_the_same_mask(mode: str, reentrant: bool) -> None:
    q, k, v, grad = inputs()
    attend = SusAttention(CausalAttention(0.0), C, mode)
    found = []
    for again in (False, True):
        torch.manual_seed(3)  # without a fixed key: from the generator, which a checkpoint restores
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        output = checkpoint(attend, *leaves, use_reentrant=reentrant) if again else attend(*leaves)
        found.append(
            torch.autograd.grad(output, leaves, grad)
            if not reentrant
            else _by_backward(output, leaves, grad)
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _by_backward(output: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    output.backward(grad)
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def model_of(length: int = 64) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=11, block_size=length, n_layer=2, n_head=2, n_embd=16))


def tokens_of(length: int) -> Tensor:
    return torch.randint(11, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", MODES)
def test_kept_bytes_grow_as_the_length(mode: str) -> None:
    kept = {}
    for length in (128, 512):
        model, tokens = model_of(length), tokens_of(length)
        exact = saved_bytes(model, lambda model=model, tokens=tokens: model(tokens, tokens))
        basis.convert(model, basis.SUS(CausalAttention, c=C, mode=mode))
        kept[length] = saved_bytes(model, lambda model=model, tokens=tokens: model(tokens, tokens))[
            "attention"
        ]
        log_sum_exp = 2 * (
            2 * 2 * length * 4
        )  # of two layers: (b, h, T) in float32, which SUS does without
        assert kept[length] == exact["attention"] - log_sum_exp + 2 * 8  # and two keys
    assert kept[512] - 16 == 4 * (kept[128] - 16)


def test_convert_and_revert_leave_the_parameters_and_the_loss() -> None:
    model, tokens = model_of(), tokens_of(64)
    names, loss = list(model.state_dict()), model(tokens, tokens).item()
    changed = basis.convert(model, basis.SUS(CausalAttention, c=C))
    assert changed == ["blocks.0.attn.attend", "blocks.1.attn.attend"]
    assert list(model.state_dict()) == names
    assert model(tokens, tokens).item() == loss
    assert basis.revert(model) == changed
    assert not any(isinstance(module, SusAttention) for module in model.modules())


def test_lean_wraps_sus_and_leaves_its_masks() -> None:
    model, tokens = model_of(), tokens_of(64)
    weight = model.blocks[0].attn.qkv.weight
    exact = torch.autograd.grad(model(tokens, tokens), weight)[0]
    basis.convert(model, basis.SUS(CausalAttention, c=C))
    errors = {}
    for lean in (False, True):
        if lean:
            changed = basis.convert(
                model,
                basis.Lean(norm=False, gelu_bits=None, attention=(CausalAttention, SusAttention)),
            )
            assert changed == ["blocks.0.attn.attend", "blocks.1.attn.attend"]
        found = []
        for step in range(20):
            basis.set_noise_key(model, seed=0, step=step)
            found.append(
                float(
                    (torch.autograd.grad(model(tokens, tokens), weight)[0] - exact).norm()
                    / exact.norm()
                )
            )
        errors[lean] = sum(found) / len(found)
    assert errors[False] > 0.1  # 8 bits alone: 0.01
    assert errors[True] == pytest.approx(errors[False], rel=0.05)
    assert basis.revert(model) == changed  # both at once, and each name once
    assert all(type(block.attn.attend) is CausalAttention for block in model.blocks)


def test_noise_follows_the_key_of_the_model() -> None:
    model, tokens = model_of(), tokens_of(64)
    basis.convert(model, basis.SUS(CausalAttention, c=C))
    found = []
    for step in (0, 0, 1):
        basis.set_noise_key(model, seed=0, step=step)
        found.append(torch.autograd.grad(model(tokens, tokens), model.blocks[0].attn.qkv.weight)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_statistics_tell_what_is_kept_and_change_nothing() -> None:
    model, tokens = model_of(), tokens_of(64)
    basis.convert(model, basis.SUS(CausalAttention, c=C))
    state = torch.get_rng_state()
    found = basis.sus.kept_statistics(model, lambda: model(tokens))
    assert torch.equal(state, torch.get_rng_state())
    assert list(found) == ["blocks.0.attn.attend", "blocks.1.attn.attend"]
    for kept in found.values():
        assert kept.length == 64
        assert 1 <= kept.expected <= C
        assert kept.drawn == pytest.approx(kept.expected, rel=0.02)
        assert kept.share == pytest.approx(kept.expected * 64 / (64 * 65 / 2))


def test_low_precision_is_sampled_in_float32() -> None:
    q, k, v, grad = (x.bfloat16() for x in inputs(length=100))
    for exact, found in zip(
        exact_gradients(q, k, v, grad), sus_gradients(q, k, v, grad, 1, 1e9, "sparse"), strict=True
    ):
        assert found.dtype == torch.bfloat16
        assert float((found - exact).float().norm() / exact.float().norm()) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert sus_attention(*inputs()[:3], torch.tensor(1), c=C).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"c": 0.0}, "c=0.0: must be positive"),
        ({"c": math.inf}, "c=inf: must be positive"),
        ({"c": C, "mode": "thin"}, "mode='thin': must be one of dense, sparse"),
    ],
)
def test_wrong_options_are_named(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        basis.convert(model_of(), basis.SUS(CausalAttention, **wrong))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        sus_attention(q, k[:, :, 1:], v[:, :, 1:], torch.tensor(1), c=C)
    with pytest.raises(ValueError, match="matches no attention module of the type given"):
        basis.convert(nn.Sequential(nn.Linear(2, 2)), basis.SUS(CausalAttention, c=C))
    with pytest.raises(ValueError, match=r"dropout=0\.1: must be 0"):
        basis.convert(nn.Sequential(CausalAttention(0.1)), basis.SUS(CausalAttention, c=C))
