"""Attention with sinks: the gradients against autograd's through functions such as families write,
in float64; which functions are taken, and what is kept.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from basis.lean import scores, sinks
from basis.lean.sinks import has_sinks, lean_sinks

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 20, 8
KEY = torch.tensor(0x3ABCDEF987654321)
Function = Callable[..., Any]


def column(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """The sinks as one more column of the scores."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    z = q @ k.mT * scaling + (0.0 if mask is None else mask)
    more = module.sinks.reshape(1, -1, 1, 1).expand(*z.shape[:-1], 1)
    p = torch.cat((z, more), -1).softmax(-1)[..., :-1]
    return (p @ v).transpose(1, 2).contiguous(), None


def scaled(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """The output without sinks, times what they leave."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    z = q @ k.mT * scaling + (0.0 if mask is None else mask)
    left = torch.sigmoid(z.logsumexp(-1) - module.sinks.view(-1, 1))
    return (z.softmax(-1) @ v * left.unsqueeze(-1)).transpose(1, 2).contiguous(), None


def without(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **more: Any) -> Any:
    """Looks at the sinks and leaves them out."""
    return column(SimpleNamespace(**{**vars(module), "sinks": module.sinks - 1e9}), q, k, v, *args,
                  **more)  # fmt: skip


def from_elsewhere(module: Any, *args: Any, **more: Any) -> Any:
    """Reads something of the module that is not known."""
    assert module.layer_idx >= 0
    return column(module, *args, **more)


def inputs(groups: int, keys: int = LENGTH, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the sinks."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, HEADS, LENGTH, WIDTH), *[(BATCH, groups, keys, WIDTH)] * 2, (HEADS,)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def window() -> Tensor:
    """A sliding window for two texts, the second of which is padded at its beginning."""
    seen = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril().triu(-4)
    seen[1, ..., :3] = False
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min).double()


CASES: dict[str, tuple[Function, int, int, Callable[[], Tensor | None]]] = {
    # function, heads of keys, number of keys, mask
    "column": (column, HEADS, LENGTH, lambda: None),
    "column, window, groups": (column, 2, LENGTH, window),
    "column, other keys": (column, 1, 11, lambda: None),
    "scaled, window, groups": (scaled, 1, LENGTH, window),
}


def plainly(plain: Function, q: Tensor, k: Tensor, v: Tensor, c: Tensor, mask: Any) -> Tensor:
    module = SimpleNamespace(num_key_value_groups=HEADS // k.shape[1], sinks=c, training=True)
    y: Tensor = plain(module, q, k, v, mask, scaling=0.4)[0]
    return y.transpose(1, 2)


def lean(plain: Function, q: Tensor, k: Tensor, v: Tensor, c: Tensor, mask: Any) -> Tensor:
    return lean_sinks(plain, q, k, v, c, mask, KEY, 0.4)


def step(run: Function, case: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    plain, groups, keys, mask = CASES[case]
    given = inputs(groups, keys)
    y = run(plain, *given, mask())
    return y, torch.autograd.grad(y, given, torch.ones_like(y).cumsum(-1).sin())


@pytest.mark.parametrize("piece", [8 * BATCH * HEADS * LENGTH, 1 << 18], ids=["rows", "all"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_autograd(
    case: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scores.PIECE, "cpu", piece)
    monkeypatch.setattr(sinks, "round_all", lambda tensors, key: tensors)
    monkeypatch.setattr(sinks, "restore_all", lambda kept, dtypes: kept)
    (y, exact), (z, found) = step(plainly, case), step(lean, case)
    assert torch.equal(z, y)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_of_eight_bits_gradients_are_near(case: str) -> None:
    (y, exact), (z, found) = step(plainly, case), step(lean, case)
    assert torch.equal(z, y)
    for one, wanted in zip(found, exact, strict=True):
        assert 0 < (one - wanted).norm() < 0.04 * wanted.norm()


def test_functions_are_taken_by_what_they_compute() -> None:
    assert has_sinks(column)
    assert has_sinks(scaled)
    assert not has_sinks(without)
    assert not has_sinks(from_elsewhere)


def test_low_precision_keeps_the_functions_output_and_the_inputs_dtypes() -> None:
    given = inputs(2, dtype=torch.bfloat16)
    y, z = (run(column, *given, None) for run in (plainly, lean))
    assert torch.equal(y, z)
    exact = torch.autograd.grad(y.float().square().sum(), given)
    found = torch.autograd.grad(z.float().square().sum(), given)
    for one, wanted in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - wanted).norm() < 0.06 * wanted.norm()


def test_what_is_kept_is_counted_by_hand() -> None:
    """Codes of a head and a scale for each of q, k, v; the sinks and the mask for all layers."""
    q, k, v, c = inputs(2, dtype=torch.float32)
    mask = window().float()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layers = [lean_sinks(column, q, k, v, c, mask, KEY + i, 0.5) for i in range(2)]
    assert all(y.requires_grad for y in layers)
    number = BATCH * LENGTH * (WIDTH + 4)
    assert sum(kept.values()) == c.nbytes + mask.nbytes + 2 * number * (HEADS + 2 * 2)


@pytest.mark.slow
def test_one_graph_has_the_gradients_of_eager_mode() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lean, backend="aot_eager", fullgraph=True)
    case = "column, window, groups"
    torch.testing.assert_close(step(compiled, case), step(lean, case), rtol=1e-6, atol=1e-7)


def test_second_derivatives_are_refused() -> None:
    q, *others = inputs(2)
    y = lean(column, q, *others, None)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(y.sum(), q, create_graph=True)
