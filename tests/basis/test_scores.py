"""Attention with a learned bias or a cap of its scores: the gradient against autograd's through the
formula, in float64; what is kept, and how much of it is there at once.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from basis.lean import scores
from basis.lean.scores import Scores, lean_scores

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 20, 8
KEY = torch.tensor(0x3ABCDEF987654321)


def inputs(groups: int = HEADS, keys: int = LENGTH, dtype: torch.dtype = torch.float64) -> Any:
    """q, k, v and a bias of one head for all of the batch."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, HEADS, LENGTH, WIDTH), *[(BATCH, groups, keys, WIDTH)] * 2]
    shapes.append((1, HEADS, LENGTH, keys))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def padding() -> Tensor:
    """Causal; the second text is shorter, and one of its rows sees nothing."""
    mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[1, :, :, 15:] = False
    mask[1, :, 3] = False
    return mask


def window() -> Tensor:
    """A sliding window, in numbers."""
    seen = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril().triu(-4)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min).double()


def formula(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, how: Scores
) -> Tensor:
    """By autograd, one operation after the other. Dropout from PyTorch's generator."""
    k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
    z = q @ k.mT * how.scale
    if how.softcap:
        z = how.softcap * torch.tanh(z / how.softcap)
    least = torch.finfo(q.dtype).min
    if how.causal:
        mask = torch.ones(z.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        z = z + torch.where(mask, bias, least)
    else:
        z = z + (0.0 if bias is None else bias) + (0.0 if mask is None else mask)
    return F.dropout(z.softmax(-1), how.dropout) @ v


CASES: dict[str, tuple[Scores, Any, bool, int, int]] = {
    # how, mask, whether there is a bias, heads of keys, number of keys
    "bias": (Scores(1.0, learned=True), lambda: None, True, HEADS, LENGTH),
    "bias, other keys": (Scores(0.5, learned=True), lambda: None, True, HEADS, 11),
    "bias, causal": (Scores(1.0, causal=True, learned=True), lambda: None, True, HEADS, LENGTH),
    "bias, padded": (Scores(1.0, learned=True), padding, True, HEADS, LENGTH),
    "bias, dropout": (
        Scores(1.0, dropout=0.3, learned=True),
        padding,
        True,
        HEADS,
        LENGTH,
    ),
    "bias, groups": (Scores(0.4, dropout=0.3, learned=True), window, True, 2, LENGTH),
    "cap": (Scores(0.4, 1.5, written_out=True), lambda: None, False, HEADS, LENGTH),
    "cap, window, groups": (Scores(0.4, 1.5, written_out=True), window, False, 1, LENGTH),
    "cap, dropout": (Scores(0.4, 1.5, False, 0.2, True), window, False, 2, LENGTH),
    "written out": (Scores(0.4, written_out=True), window, False, 2, LENGTH),
}


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v are kept as they are."""
    monkeypatch.setattr(scores, "round_all", lambda tensors, key: tensors)
    monkeypatch.setattr(scores, "restore_all", lambda kept, dtypes: kept)


def step(run: Any, case: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    how, mask, with_bias, groups, keys = CASES[case]
    given = inputs(groups, keys)
    args = given if with_bias else [*given[:3], None]
    torch.manual_seed(1)
    y = run(*args, mask(), how)
    wanted = given if with_bias else given[:3]
    return y, torch.autograd.grad(y, wanted, torch.ones_like(y).cumsum(-1).sin())


def lean(*args: Any) -> Tensor:
    *tensors, how = args
    return lean_scores(*tensors, KEY, how)


@pytest.mark.parametrize("piece", [8 * BATCH * HEADS * LENGTH, 1 << 24], ids=["rows", "all"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("whole")
def test_gradients_are_those_of_autograd(
    case: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scores.PIECE, "cpu", piece)
    (y, exact), (z, found) = step(formula, case), step(lean, case)
    torch.testing.assert_close(z, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_of_eight_bits_gradients_are_near(case: str) -> None:
    (y, exact), (z, found) = step(formula, case), step(lean, case)
    torch.testing.assert_close(z, y, rtol=1e-12, atol=1e-12)
    for one, wanted in zip(found, exact, strict=True):
        assert 0 < (one - wanted).norm() < 0.04 * wanted.norm()


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_output_is_that_of_pytorchs_attention_to_the_last_bit(
    learned: bool, dropout: float
) -> None:
    """In both precisions, from the same draws of the generator."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, bias = (x.detach().to(dtype) for x in inputs())
        bias.requires_grad_(learned)
        q.requires_grad_()
        mask = torch.where(padding(), bias, torch.finfo(dtype).min)
        torch.manual_seed(1)
        wanted = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=1.0)
        torch.manual_seed(1)
        how = Scores(1.0, dropout=dropout, learned=learned)
        assert torch.equal(lean(q, k, v, bias, padding(), how), wanted)


def test_what_is_kept_is_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias and the mask once for two layers; a bit a score for dropout, in bytes of 8 rows."""
    q, k, v, bias = inputs(2, dtype=torch.float32)
    how = Scores(0.5, 2.0, False, 0.1, True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = padding()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layers = [lean_scores(q, k, v, bias, mask, KEY + i, how) for i in range(2)]
    number = BATCH * LENGTH * (WIDTH + 4)  # codes of a head and a scale
    bits = -(-LENGTH // 8) * BATCH * HEADS * LENGTH
    shared = bias.nbytes + mask.nbytes
    assert sum(kept.values()) == shared + 2 * (number * (HEADS + 2 * 2) + bits)
    largest = [0]
    softmax = torch.ops.aten._safe_softmax

    def watched(x: Tensor, dim: int) -> Tensor:
        largest[0] = max(largest[0], x.numel())
        return softmax(x, dim)

    monkeypatch.setattr(torch.ops.aten, "_safe_softmax", watched)
    monkeypatch.setitem(scores.PIECE, "cpu", 1)
    torch.autograd.grad(sum(layers).sum(), (q, bias))
    assert largest[0] == BATCH * HEADS * 8 * LENGTH  # eight rows at a time


@pytest.mark.parametrize("case", ["bias, causal", "cap, window, groups"])
@pytest.mark.slow
def test_one_graph_has_the_gradients_of_eager_mode(case: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lean, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(compiled, case), step(lean, case), rtol=1e-6, atol=1e-7)


def test_second_derivatives_are_refused() -> None:
    q, k, v, bias = inputs()
    y = lean(q, k, v, bias, None, Scores(1.0, learned=True))
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(y.sum(), q, create_graph=True)
