"""Each operator on a GPU against the CPU, under the same key: the published cases, estimators, the
loss head, lean layers, SUS.

Noise is the same on both, so what differs is rounding, and the few numbers that rounding pushes
over an edge of a code.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from estimator_checks import estimate, key, relative
from golden_checks import CASES, check_operator
from step_cases import METHODS
from torch import Tensor, nn

import basis
from basis.estimator import Estimator
from basis.estimators import ESTIMATORS
from basis.lean import LeanAttention, LeanGELU, LeanLayerNorm
from basis.lean.sdpa import lean_sdpa
from basis.linear import SketchedLinear
from basis.state import learned_from_scratch
from basis.sus import MODES, sus_attention
from models.gpt import CausalAttention

pytestmark = pytest.mark.gpu
# Bases of a subspace are found up to a rotation, and a sign is chosen by rounding.
ROTATES = ("low_rank", "subspace", "ema_sketch")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def estimator_of(method: str) -> Estimator:
    return ESTIMATORS[method.partition(",")[0]](**METHODS[method])


def assert_alike(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Codes: all but one in a thousand are the same. Numbers: to `tolerance` in norm."""
    found = found.detach().cpu()
    assert found.shape == expected.shape
    if not found.numel():
        return
    if found.is_floating_point():
        assert relative(found, expected.detach()) < tolerance
    else:
        assert float((found != expected).double().mean()) < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_operator_matches_published_values(case: str, device: str) -> None:
    check_operator(case, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", list(METHODS))
def test_estimators_keep_and_estimate_what_they_do_on_the_cpu(
    method: str, dtype: torch.dtype, device: str
) -> None:
    estimator, noise = estimator_of(method), key(method)
    x = (normal(64, 48) + 0.3).to(dtype)
    dy = normal(64, 40, seed=1).to(dtype)
    moved = [t.to(device) for t in (x, dy, noise)]
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    if method not in ROTATES and dtype == torch.float32:
        kept = [
            estimator.compress(rows, code, learned_from_scratch(estimator, rows, code))
            for rows, code in ((moved[0], moved[2]), (x, noise))
        ]
        for found, expected in zip(*kept, strict=True):
            assert found.device.type == device
            assert_alike(found, expected, tolerance)
    assert_alike(estimate(estimator, *moved), estimate(estimator, x, dy, noise), tolerance)


@pytest.mark.parametrize("method", list(METHODS))
def test_the_same_key_gives_the_same_bits(method: str, device: str) -> None:
    x, dy = normal(64, 48).to(device), normal(64, 40, seed=1).to(device)
    noise = key(method).to(device)
    first, second = (estimate(estimator_of(method), x, dy, noise) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", [None, "basis", "count_sketch", "quantized"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [50_257, 256])
def test_the_head_has_the_loss_and_gradients_of_whole_logits(
    method: str | None, autocast: bool, classes: int, device: str
) -> None:
    """With 50,257 classes and 300 rows the last row of a block starts at an odd address."""
    torch.manual_seed(0)
    plain = nn.Linear(32, classes, bias=False).to(device)
    layer = plain
    if method is not None:
        layer = SketchedLinear.from_linear(plain, estimator_of(method))
        layer.set_noise_key(3, torch.device(device))
    x = normal(300, 32, seed=2).to(device).requires_grad_()
    targets = torch.randint(classes, (300,), generator=torch.Generator().manual_seed(3)).to(device)
    found = []
    for fused in (True, False):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            if fused:
                loss = basis.linear_cross_entropy(layer, x, targets)
            else:
                loss = F.cross_entropy(layer(x).float(), targets)
        found.append((loss.detach(), *torch.autograd.grad(loss, (x, layer.weight))))
    for ours, whole in zip(*found, strict=True):
        assert relative(ours, whole) < (0.03 if autocast else 1e-4)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_the_other_terms_of_a_loss_are_those_of_whole_logits(autocast: bool, device: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 50_257).to(device)
    x = normal(300, 32, seed=2).to(device).requires_grad_()
    targets = torch.randint(50_257, (300,), generator=torch.Generator().manual_seed(3)).to(device)
    targets[:40] = -100
    count = torch.tensor(500, device=device)
    found = []
    for fused in (True, False):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            if fused:
                loss = basis.linear_cross_entropy(
                    layer,
                    x,
                    targets,
                    label_smoothing=0.1,
                    z_loss=1e-3,
                    softcap=5.0,
                    logit_scale=2.0,
                    num_items_in_batch=count,
                )
            else:
                logits = 5.0 * torch.tanh(layer(x).float() * 2.0 / 5.0)
                loss = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum")
                squares = logits.logsumexp(1).square().where(targets != -100, 0.0)
                loss = (loss + 1e-3 * squares.sum()) / count
        found.append((loss.detach(), *torch.autograd.grad(loss, (x, layer.weight, layer.bias))))
    for ours, whole in zip(*found, strict=True):
        assert relative(ours, whole) < (0.03 if autocast else 1e-4)


def fused_heads(device: str, size: tuple[int, ...] = (2, 64, 3, 2, 16)) -> Tensor:
    """A fused product's output (b, T, 3, h, d), of which q, k and v are views."""
    return normal(*size, seed=4).to(device).requires_grad_()


def split(heads: Tensor) -> tuple[Tensor, ...]:
    return heads.permute(2, 0, 3, 1, 4).unbind(0)


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = nn.Linear(16, 32), nn.Linear(16, 32)
        self.down_proj, self.act_fn = nn.Linear(32, 16), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def lean_layers() -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of a fused product."""
    norm, gelu = LeanLayerNorm(16), LeanGELU(bits=2, approximate="tanh")
    attention = LeanAttention(CausalAttention(0.0))
    for layer in (norm, attention):
        layer.set_noise_key(11)
    layers = {"norm": norm, "gelu": gelu, "attention": lambda heads: attention(*split(heads))}
    for name, module in (("rms norm", nn.RMSNorm(16)), ("silu", nn.SiLU()), ("gated", GatedMLP())):
        layers[name] = nn.Sequential(module)
        basis.convert(layers[name], basis.Lean())
        basis.set_noise_key(layers[name], seed=0, step=0)
    return layers


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", list(lean_layers()))
def test_lean_layers_have_the_gradients_of_the_cpu(name: str, compiled: bool, device: str) -> None:
    found = []
    for place, compiling in ((device, compiled), ("cpu", False)):
        layer = lean_layers()[name]
        heads = fused_heads(place)
        if isinstance(layer, nn.Module):
            layer.to(place)
        run = torch.compile(layer) if compiling else layer
        output = run(heads)
        output.backward(normal(*output.shape, seed=5).to(place))
        assert heads.grad is not None
        found.append((output, heads.grad))
    for ours, expected in zip(*found, strict=True):
        assert_alike(ours, expected, 5e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "padded"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lean_attention_is_near_pytorchs(
    dtype: torch.dtype, kv_heads: int, masked: bool, dropout: float, device: str
) -> None:
    """40 keys, which are not aligned as a mask's rows have to be; dropout drops the same."""
    q, k, v = (
        normal(2, heads, 40, 64, seed=seed).to(device, dtype).requires_grad_()
        for seed, heads in enumerate((4, kv_heads, kv_heads))
    )
    mask = None
    if masked:
        mask = torch.ones(2, 1, 40, 40, dtype=torch.bool, device=device).tril()
        mask[1, :, :, 30:] = False
    found = []
    for lean in (True, False):
        torch.manual_seed(1)
        if lean:
            y = lean_sdpa(q, k, v, mask, key("sdpa").to(device), causal=not masked, dropout=dropout)
            assert y is not None
        else:
            every = [x.repeat_interleave(4 // x.shape[1], 1) for x in (q, k, v)]
            y = F.scaled_dot_product_attention(*every, mask, dropout, is_causal=not masked)
        grads = torch.autograd.grad(y, (q, k, v), normal(*y.shape, seed=5).to(y))
        found.append((y.detach(), grads))
    (ours, near), (wanted, exact) = found
    assert relative(ours, wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    for one, other in zip(near, exact, strict=True):
        assert relative(one, other) < 0.05


def test_dropout_drops_what_pytorch_drops(device: str) -> None:
    lean, x = nn.Sequential(nn.Dropout(0.3)), torch.ones(64, 100, device=device).requires_grad_()
    basis.convert(lean, basis.Lean())
    found = []
    for module in (lean, nn.Dropout(0.3)):
        torch.manual_seed(1)
        y = module(x)
        found.append((y, *torch.autograd.grad(y.sum(), x)))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_sus_draws_the_masks_of_the_cpu(mode: str, kv_heads: int, device: str) -> None:
    found = []
    for place in (device, "cpu"):
        heads = fused_heads(place, (2, 96, 3, 2, 16))
        q, k, v = split(heads)
        output = sus_attention(
            q, k[:, :kv_heads], v[:, :kv_heads], key("sus").to(place), c=4.0, mode=mode
        )
        output.backward(normal(2, 2, 96, 16, seed=5).to(place))
        assert heads.grad is not None
        found.append((output, heads.grad))
    for ours, expected in zip(*found, strict=True):
        assert_alike(ours, expected, 1e-3)
