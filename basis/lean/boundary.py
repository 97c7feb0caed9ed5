"""Checkpointed blocks whose inputs are kept in few bits.

A checkpointed block keeps its input x alone, and its forward is computed again in backward. Here
what is kept is x rounded at random, E[x^] = x, and the block is computed again from x^:

    y = f(x)                         forward: exact
    dx = f'(x^)^T dy, dW likewise    backward: at x^

| bits | how | kept, of float32 | error of a number, for normal ones: deviation |
|---|---|---|---|
| None | as it is | 1 | 0 |
| 8 | ops/rounding.py | 0.27 | 0.008 |
| 4 | estimators/quantized.py | 0.13 | 0.1 |

What of the gradient is affected. In a residual block, y = x + g(x), the path through the sum is
exact: dy arrives at x as it is, whatever x^ is. Through g all is computed at x^: the LayerNorms'
inputs are noisy, then q, k, v and attention's probabilities, then all inputs of dense layers, which
the weight gradients are made of, and the derivative of GELU. Each block draws noise of its own and
forward is exact, so errors do not pile up from block to block: dy carries those of the blocks above
in the branches alone.

What is biased: E[x^] = x, but f' is not linear. dW of the first dense layer is dY^T LN(x^), and dY
itself comes from the same x^. What averages out is of the order of the rounding's deviation, what
does not, of the order of its variance: of a GPT's whole gradient 1.2% and 0.1% in norm at 8 bits,
14% and 2% at 4 (tests/basis/test_boundary.py).

Cost: a forward, as with any checkpoint, one pass over x to round it and one to restore it.

Under torch.compile. One graph for the model can't have it: a compiler's checkpoint computes the
same nodes again, from the same x, and a backward that traces torch.func.vjp of the block loses the
derivatives that sketched and lean layers give themselves (PyTorch 2.11 to 2.13: silently). So a
block is compiled by itself, and so are the two halves of the rounding (`compiling_blocks`): one
graph each serves all blocks that are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from basis.diagnostics.saved import announce
from basis.estimators.quantized import Quantized
from basis.noise_key import HasNoiseKey
from basis.ops.matrix import without_autocast
from basis.ops.rounding import Rounded, restore, round_to_int8

BITS = (8, 4)
_FOUR = Quantized(4)


def check_bits(bits: int | None) -> None:
    """Raise ValueError, beginning with `boundary=`, unless inputs can be kept in so many bits."""
    if bits not in (None, *BITS):
        raise ValueError(f"boundary={bits}: must be one of {', '.join(map(str, BITS))}, or null")


def encode(x: Tensor, bits: int, key: Tensor) -> tuple[Tensor, ...]:
    """What is kept of x (..., N)."""
    if bits == 8:
        return tuple(round_to_int8(x, key))
    return _FOUR.compress(x.reshape(-1, x.shape[-1]), key, {})


def decode(kept: tuple[Tensor, ...], bits: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """x^, for an x of this shape and dtype."""
    if bits == 8:
        return restore(Rounded(*kept), dtype)
    return _FOUR.factors(kept, shape[:-1].numel()).left.to(dtype).view(shape)


_compiling_blocks = False


@contextmanager
def compiling_blocks() -> Iterator[None]:
    """Within, each `Boundary` calls its function through torch.compile, and compiled rounding."""
    global _compiling_blocks
    before, _compiling_blocks = _compiling_blocks, True
    try:
        yield
    finally:
        _compiling_blocks = before


class Boundary(HasNoiseKey):
    """A checkpoint around the forward that `block` has now, a function of x (..., N), that keeps x
    in `bits` bits a number.

        block.boundary = Boundary(block, 8)
        block.forward = block.boundary.forward

    A module, so that `basis.set_noise_key` finds it; it has no parameters, and `block` is not part
    of it. bits: 8 or 4. Raises ValueError, beginning with `boundary=`, for others.
    """

    def __init__(self, block: nn.Module, bits: int) -> None:
        super().__init__()
        check_bits(bits)
        self.bits = bits
        # Sketched layers draw noise of their own: where they share it, each has a place in it, a
        # number that a graph takes for a constant, and there would be a graph for each block.
        self._keyed = [module for module in block.modules() if isinstance(module, HasNoiseKey)]
        self._parts: tuple[Callable[..., Any], ...] = (block.forward, encode, decode)
        self._compiled: tuple[Callable[..., Any], ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        run, to_bits, from_bits = self._chosen()
        if not torch.is_grad_enabled():
            self.pass_without_grad(x.device)
            return run(x)
        for module in self._keyed:
            module.noise_key = module.noise_key  # which ends the sharing
        bits, key = self.bits, self.fixed_or_fresh_key(x.device)
        with torch.no_grad(), without_autocast(x):
            kept = to_bits(x.detach(), bits, key)
        announce(*kept)
        shape, dtype, wanted = x.shape, x.dtype, x.requires_grad  # x does not live until backward

        def restored(*_: object) -> Tensor:
            with torch.no_grad(), without_autocast(kept[0]):
                return from_bits(kept, bits, shape, dtype)

        if _compiling_blocks:  # another graph runs in backward, and may save other tensors
            with torch.autograd.graph.saved_tensors_hooks(lambda _: None, restored):
                return checkpoint(run, x, use_reentrant=True)
        first = [x]
        del x

        def run_or_again() -> Tensor:
            again = first.pop() if first else restored().requires_grad_(wanted)
            return run(again)

        return checkpoint(run_or_again, use_reentrant=False)

    def _chosen(self) -> tuple[Callable[..., Any], ...]:
        if not _compiling_blocks:
            return self._parts
        if self._compiled is None:
            self._compiled = tuple(map(torch.compile, self._parts))
        return self._compiled
