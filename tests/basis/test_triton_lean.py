"""The kernels of lean layers, in Triton's interpreter, against the plain operators and formulas."""

import pytest
import torch
import torch.nn.functional as F

import basis
from basis.ops import kernels, rounding, step_code

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("forced")


@pytest.fixture
def key() -> torch.Tensor:
    return torch.tensor(0x3ABCDEF987654321)


@pytest.fixture
def no_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    without_plain(monkeypatch)


def without_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("plain")

    for name in ("_round_plainly", "_restore"):
        monkeypatch.setattr(rounding, name, broken)
    for name in ("_encode", "_times_levels"):
        monkeypatch.setattr(step_code, name, broken)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3


INPUTS = {
    "rows": numbers(13, 128),
    "one column": numbers(70, 1),
    "one row": numbers(1, 24),
    "one dimension": numbers(100),
    "heads of a fused product": numbers(2, 5, 3, 4, 64).permute(2, 0, 3, 1, 4)[1],
    "five dimensions": numbers(2, 3, 2, 3, 16).transpose(0, 3),
    "columns with a stride": numbers(6, 40)[:, ::2],
    "repeated": numbers(1, 5, 8).expand(3, 5, 8),
    "zeros": torch.zeros(3, 64),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("place", [0, 2])
def test_rounding_is_that_of_the_operators(name: str, place: int, key: torch.Tensor) -> None:
    x = INPUTS[name]
    rounded = rounding.round_to_int8(x, key, place)
    restored = rounding.restore(rounded, x.dtype)
    with kernels.forced(False):
        expected = rounding.round_to_int8(x, key, place)
        again = rounding.restore(expected, x.dtype)
    for got, wanted in zip((*rounded, restored), (*expected, again), strict=True):
        assert got.shape == wanted.shape
        assert torch.equal(got, wanted)
    scales = rounded.scales.double().repeat_interleave(
        x.shape[-1] // rounded.scales.shape[-1], dim=-1
    )
    assert ((restored.double() - x.double()).abs() <= 1.00001 * scales).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("shape", [(7, 11), (1,), (3, 700), (2, 3, 8)])
@pytest.mark.usefixtures("no_plain")
def test_steps_are_counted_and_looked_up(bits: int, shape: tuple[int, ...]) -> None:
    x = 3.0 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    boundaries = tuple(torch.linspace(-2.0, 2.0, (1 << bits) - 1).tolist())
    levels = tuple(torch.linspace(-0.1, 1.1, 1 << bits).tolist())
    packed = step_code.encode(x, bits, boundaries)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-x.numel() * bits // 8)
    y = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    code = torch.bucketize(x, torch.tensor(boundaries))
    expected = y * torch.tensor(levels)[code]
    assert torch.equal(step_code.times_levels(y, packed, bits, levels), expected)


def test_lean_layers_have_the_gradients_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attend(torch.nn.Module):
        is_causal = True

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    model = torch.nn.ModuleDict(
        {"norm": torch.nn.LayerNorm(32), "gelu": torch.nn.GELU(), "attend": Attend()}
    )
    basis.convert(model, basis.Lean(attention=Attend))
    basis.set_noise_key(model, seed=0, step=0)

    def gradient() -> torch.Tensor | None:
        x = torch.randn(2, 3, 8, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model["attend"](*(model["gelu"](model["norm"](x + i)) for i in range(3))).sum().backward()
        return x.grad

    with kernels.forced(False):
        expected = gradient()
    without_plain(monkeypatch)
    torch.testing.assert_close(gradient(), expected, rtol=1e-5, atol=1e-6)
