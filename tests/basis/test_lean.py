"""Lean layers: unbiased rounding, the few-bit GELU against a search by hand, gradients near the
exact ones, bytes as counted.
"""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import basis
from basis.lean import LeanAttention, LeanGELU, LeanLayerNorm
from basis.lean.gelu import derivative, steps
from basis.ops.bits import pack, unpack
from basis.ops.rounding import Rounded, block_length, restore, round_to_int8
from harness.memory import saved_bytes
from models import GPT, GPTConfig
from models.gpt import CausalAttention

B, T, C, V, HEADS = 3, 16, 64, 50, 2


def gpt(lean: bool = True, **parts) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=V, block_size=T, n_layer=2, n_head=HEADS, n_embd=C))
    if lean:
        basis.convert(model, basis.Lean(attention=CausalAttention, **parts))
    basis.set_noise_key(model, seed=0, step=0)
    return model


def gradients(model: GPT) -> tuple[float, dict[str, Tensor]]:
    tokens = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.item(), {
        name.replace(".attend.attend", ".attend"): p.grad for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("width", [128, 24])
def test_rounding_is_unbiased_and_within_a_step(width: int) -> None:
    x = (
        torch.randn(20, width, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 3, 20)[:, None]
    )
    x[3] = 0
    block = 64 if width == 128 else width
    step = (
        x.view(20, -1, block).abs().amax(-1, keepdim=True).expand(-1, -1, block).reshape(x.shape)
        / 127
    )
    errors = torch.stack(
        [restore(round_to_int8(x, torch.tensor(7919 * i)), x.dtype) - x for i in range(2000)]
    )
    assert (errors.abs() <= step * (1 + 1e-5)).all()
    assert (errors[:, 3] == 0).all()
    z = errors.mean(0) / (step / 2 / 2000**0.5).clamp_min(
        1e-30
    )  # a deviation is at most half a step
    assert z.abs().max() < 4.5
    assert round_to_int8(x, torch.tensor(1)).codes.dtype == torch.int8


def test_rounding_noise_of_neighbours_is_independent() -> None:
    x = torch.full((40, 64), 0.5)
    x[:, 0] = 127  # the scale is 1: one half is rounded up or down evenly
    ups = (
        torch.stack(
            [restore(round_to_int8(x, torch.tensor(31 * i)), x.dtype)[:, 1:] for i in range(800)]
        )
        - 0.5
    )
    for shifted in (ups.roll(1, 1), ups.roll(1, 2)):
        assert abs(float((ups * shifted).mean()) * 4) < 0.01


@pytest.mark.parametrize("width", [64, 96])
def test_restored_row_by_row_is_restored_at_once(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """37 rows in blocks of 8: multiplied in float32, rounded to bfloat16 once."""
    monkeypatch.setattr("basis.ops.matrix._CACHED", 1)
    x = torch.randn(37, 1, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scales = round_to_int8(x, torch.tensor(5))
    expected = codes * scales.repeat_interleave(block_length(width), -1)
    assert torch.equal(restore(Rounded(codes, scales), x.dtype), expected.bfloat16())
    vector = restore(Rounded(codes[0, 0], scales[0, 0]), x.dtype)
    assert torch.equal(vector, expected[0, 0].bfloat16())


def slope_of(x: Tensor, approximate: str) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.gelu(x, approximate=approximate).sum(), x)[0]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_derivative_is_autograds(approximate: str) -> None:
    x = torch.linspace(-5, 5, 41, dtype=torch.float64)
    expected = torch.tensor([derivative(v, approximate) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(slope_of(x, approximate), expected)


def test_gelu_steps_are_the_best_there_are() -> None:
    """Against a search over all divisions of a coarse grid, with the levels that belong to them."""
    boundaries, levels = steps(2, "tanh")
    x = torch.linspace(-6, 6, 4801, dtype=torch.float64)
    slope, weight = slope_of(x, "tanh"), torch.exp(-0.5 * (x / 1.5) ** 2)
    # Sums of w, w s and w s^2 over x <= cut: an interval's least squared error about its own mean
    # is S2 - S1^2 / S0, each a difference of two such sums.
    sums = torch.stack([weight, weight * slope, weight * slope**2]).cumsum(1)
    sums = torch.nn.functional.pad(sums, (1, 0))

    def error(cuts: Tensor) -> Tensor:
        """Of each division (count,), its cuts (count, 3) in order."""
        ends = torch.nn.functional.pad(torch.searchsorted(x, cuts, right=True), (1, 1))
        ends[:, -1] = len(x)
        s0, s1, s2 = sums[:, ends].diff(dim=-1)
        return (s2 - s1**2 / s0).sum(-1)

    grid = torch.arange(-25, 26, dtype=torch.float64) / 10
    best = float(error(torch.combinations(grid, 3)).min())
    assert float(error(torch.tensor([boundaries], dtype=torch.float64))) <= best * 1.001
    code = sum((x > cut).long() for cut in boundaries)
    means = [float((weight * slope)[code == i].sum() / weight[code == i].sum()) for i in range(4)]
    assert levels == pytest.approx(means, abs=0.01)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_lean_gelu_is_exact_forward_and_stepwise_backward(bits: int, approximate: str) -> None:
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = LeanGELU(approximate, bits)(x)
    assert torch.equal(y, F.gelu(x, approximate=approximate))
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    boundaries, levels = steps(bits, approximate)
    assert torch.equal(grad, 3.0 * torch.tensor(levels)[sum((x > b).long() for b in boundaries)])
    codes = torch.randint(1 << bits, (13,), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, 13), codes)
    assert pack(codes, bits).numel() == -(-13 * bits // 8)


def test_lean_norm_is_exact_forward_and_near_backward() -> None:
    plain, x = (
        nn.LayerNorm(C),
        torch.randn(40, C, generator=torch.Generator().manual_seed(0)).requires_grad_(),
    )
    nn.init.normal_(plain.weight)
    lean = nn.Sequential(plain)
    basis.convert(lean, basis.Lean())
    assert isinstance(lean[0], LeanLayerNorm)
    grad_y = torch.randn(40, C)
    inputs = (x, plain.weight, plain.bias)
    y = lean(x)
    assert torch.equal(y, plain(x))
    got, expected = (torch.autograd.grad(out, inputs, grad_y) for out in (y, plain(x)))
    torch.testing.assert_close(got[2], expected[2])
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert 0 < (a - b).norm() < 0.02 * b.norm()


def test_gradients_of_a_gpt_are_near_and_its_loss_the_same() -> None:
    loss, exact = gradients(gpt(lean=False))
    for parts, most in (({"gelu_bits": None}, 0.03), ({}, 0.2), ({"gelu_bits": 4}, 0.08)):
        lean_loss, lean = gradients(gpt(**parts))
        assert lean_loss == loss
        assert lean.keys() == exact.keys()
        error = sum(float((lean[n] - exact[n]).square().sum()) for n in exact) ** 0.5
        assert error < most * sum(float(g.square().sum()) for g in exact.values()) ** 0.5


def test_noise_is_that_of_the_key() -> None:
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(gpt())[1].values(), gradients(gpt())[1].values(), strict=True)
    )
    other = gpt()
    basis.set_noise_key(other, seed=0, step=1)
    assert not torch.equal(gradients(other)[1]["wpe.weight"], gradients(gpt())[1]["wpe.weight"])


def test_bytes_as_counted_by_hand() -> None:
    model = gpt()
    basis.convert(model, basis.BalancedSketch(4))
    tokens = torch.zeros(B, T, dtype=torch.int64)
    table = saved_bytes(model, lambda: model(tokens, tokens))
    rows = B * T
    assert table["norms"] == 5 * (
        rows * C + rows * 4 + 2 * rows * 4
    )  # codes, a scale a block of 64, mean and deviation
    assert table["activations"] == 2 * rows * 4 * C // 4  # two bits
    scales = rows * HEADS * 4
    assert table["attention"] == 2 * (
        4 * (rows * C + scales) + rows * HEADS * 4
    )  # q, k, v, output, and the log-sum-exp
    assert table["linear inputs"] == 0


def test_attention_lets_go_of_queries_keys_and_values() -> None:
    made: list[weakref.ref[torch.UntypedStorage]] = []

    def qkv_of(model: GPT) -> None:
        def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            made.append(weakref.ref(output.untyped_storage()))

        for block in model.blocks:
            block.attn.qkv.register_forward_hook(look)

    model = gpt()
    qkv_of(model)
    tokens = torch.zeros(B, T, dtype=torch.int64)
    loss = model(tokens, tokens)
    assert loss.requires_grad
    assert [storage() for storage in made] == [None, None]


def test_revert_and_parameters() -> None:
    model = gpt(lean=False)
    before = {name: type(module) for name, module in model.named_modules()}
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    changed = basis.convert(model, basis.Lean(attention=CausalAttention))
    assert len(changed) == 2 * 4 + 1
    assert type(model.blocks[0].attn.attend) is LeanAttention
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert sorted(basis.revert(model)) == sorted(changed)
    assert {name: type(module) for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="gelu_bits=3"):
        LeanGELU(bits=3)


def test_nothing_is_rounded_without_gradients() -> None:
    model = gpt()
    tokens = torch.zeros(B, T, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(model(tokens), gpt(lean=False)(tokens))


@pytest.mark.parametrize(
    ("sketched", "lean", "low", "most"),
    [
        (False, False, False, 16.05),
        (True, False, False, 10.2),
        (True, True, False, 2.5),
        (True, True, True, 10.2 / 4),
    ],
)
def test_units_of_a_gpt2_block(sketched: bool, lean: bool, low: bool, most: float) -> None:
    """Bytes a block of width 768 keeps at 4 x 1,024 tokens, in units of B x T x C float32, on fake
    tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def kept(blocks: int) -> int:
        with torch.device("meta"):
            model = GPT(
                GPTConfig(vocab_size=64, block_size=1024, n_layer=blocks, n_head=12, n_embd=768)
            )
        if sketched:
            basis.convert(model, basis.BalancedSketch(64))
        if lean:
            basis.convert(model, basis.Lean(attention=CausalAttention))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            tokens = torch.zeros(4, 1024, dtype=torch.int64)

            def forward() -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    return model(tokens, tokens)

            return sum(saved_bytes(model, forward).values())

    units = (kept(3) - kept(2)) / (4096 * 768 * 4)
    assert most / 1.35 < units <= most


# Dynamo's own look at .grad, where the hooks of the attention break the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("attention", [(), CausalAttention], ids=["norm and gelu", "all"])
@pytest.mark.slow  # a graph with lean layers that is quick to make: test_fullgraph.py
def test_compiled_lean_layers_are_near_and_keep_less(
    attention: type[nn.Module] | tuple[()],
) -> None:
    """Attention's four tensors may be saved in another order there, and draw other noise; the rest
    is equal to eager.
    """
    from harness.memory import saved_bytes_total

    tokens = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))
    kept, found = {}, {}
    for lean in (False, True):
        torch.compiler.reset()
        model = gpt(lean=False)
        if lean:
            basis.convert(model, basis.Lean(attention=attention))
            basis.set_noise_key(model, seed=0, step=0)
        compiled = torch.compile(model, backend="aot_eager")
        kept[lean] = saved_bytes_total(model, lambda f=compiled: f(tokens[:, :-1], tokens[:, 1:]))
        compiled(tokens[:, :-1], tokens[:, 1:]).backward()
        found[lean] = {name: p.grad for name, p in model.named_parameters()}
    assert kept[True] < 0.8 * kept[False]
    error = sum(float((found[True][n] - g).square().sum()) for n, g in found[False].items()) ** 0.5
    assert 0 < error < 0.2 * sum(float(g.square().sum()) for g in found[False].values()) ** 0.5


def test_reentrant_checkpoints_of_lean_layers_draw_new_noise_each_time() -> None:
    torch.manual_seed(0)
    norm = LeanLayerNorm(64)
    x = torch.randn(8, 64, requires_grad=True)
    grads = []
    for _ in range(2):
        norm.weight.grad = None
        checkpoint(norm, x, use_reentrant=True).sin().sum().backward()
        grads.append(norm.weight.grad)
    assert not torch.equal(*grads)
    state = torch.get_rng_state()
    with torch.no_grad():
        norm.eval()(x)
    assert torch.equal(torch.get_rng_state(), state)
