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
graph each serves all blocks that are alike. The graph with the backward does not form what nobody
needs again, the block's last product, and recomputes as recompute.py does.

Random numbers other than sketches' (dropout) would not be those of the forward in such a graph: do
not compile a model with dropout so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from basis.diagnostics.saved import announce
from basis.estimators.quantized import Quantized
from basis.first_order import refuse_graph_of_backward
from basis.lean.recompute import COMPILER
from basis.noise_key import HasNoiseKey
from basis.ops.matrix import without_autocast
from basis.ops.rounding import Rounded, restore, round_to_int8

BITS = (8, 4)
Run = Callable[[Tensor], Tensor]
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


class _Unused(torch.autograd.Function):
    """Zero, whose derivative by y is dy: a graph of it needs no y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, grad_y: Tensor) -> Tensor:
        ctx.save_for_backward(grad_y)
        return torch.zeros((), device=y.device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (grad_y,) = ctx.saved_tensors
        return grad_y, None


def _again(run: Run, x: Tensor, grad_y: Tensor) -> Tensor:
    """A scalar whose backward is that of `run(x)` from `grad_y`. The last product of a block is not
    computed in a graph of it.
    """
    found: Tensor = _Unused.apply(run(x), grad_y)
    return found


class _Parts(NamedTuple):
    """The functions that a boundary calls."""

    run: Run
    encode: Callable[..., tuple[Tensor, ...]]
    decode: Callable[..., Tensor]
    again: Callable[..., Tensor] = _again


class _CompiledBlock(torch.autograd.Function):
    """`parts.run(x)`, of which `kept` is kept. As torch's reentrant checkpoint, backward runs one
    of its own, which adds to the gradients of parameters.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: _Parts, plain: Run, bits: int, *kept: Tensor) -> Tensor:
        ctx.parts, ctx.plain, ctx.bits = parts, plain, bits
        ctx.shape, ctx.dtype = x.shape, x.dtype
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        ctx.save_for_backward(*kept)
        return parts.run(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph_of_backward()
        kept = ctx.saved_tensors
        with without_autocast(grad_y):
            x = ctx.parts.decode(kept, ctx.bits, ctx.shape, ctx.dtype).requires_grad_()
        from torch._functorch import config

        with torch.enable_grad(), torch.autocast(**ctx.autocast), config.patch(COMPILER):
            total = ctx.parts.again(ctx.plain, x, grad_y)
        total.backward()
        return x.grad, None, None, None, *(None,) * len(kept)


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
        self._run = block.forward
        self._compiled: _Parts | None = None

    def forward(self, x: Tensor) -> Tensor:
        parts = self._compiled_parts() if _compiling_blocks else _Parts(self._run, encode, decode)
        if not torch.is_grad_enabled():
            self.pass_without_grad(x.device)
            return parts.run(x)
        for module in self._keyed:
            module.noise_key = module.noise_key  # which ends the sharing
        key = self.fixed_or_fresh_key(x.device)
        with torch.no_grad(), without_autocast(x):
            kept = parts.encode(x.detach(), self.bits, key)
        if _compiling_blocks and x.requires_grad:
            result: Tensor = _CompiledBlock.apply(x, parts, self._run, self.bits, *kept)
            return result
        announce(*kept)
        first, bits, wanted = [x], self.bits, x.requires_grad
        shape, dtype = x.shape, x.dtype
        del x  # what lives until backward is `kept`

        def run_or_again() -> Tensor:
            if first:
                return parts.run(first.pop())
            with torch.no_grad(), without_autocast(kept[0]):
                again = parts.decode(kept, bits, shape, dtype)
            return parts.run(again.requires_grad_(wanted))

        return checkpoint(run_or_again, use_reentrant=False)

    def _compiled_parts(self) -> _Parts:
        if self._compiled is None:
            made = [torch.compile(part) for part in (self._run, encode, decode, _again)]
            self._compiled = _Parts(*made)
        return self._compiled
