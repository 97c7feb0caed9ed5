"""First derivatives only: what all autograd Functions of this library have in common.

A second derivative would go through the input of a layer, and the input is not kept. Autograd would
not notice: to it, whatever a backward returns is a constant as far as the input is concerned, and a
Hessian is zero. So a second derivative is refused, in one of three places.

- `create_graph=True` is seen in backward, where it turns the grad mode on.
- Nested transforms of torch.func are seen in forward, at the second level.
- One transform of torch.func always asks for a graph, also where nobody will use it. There the
  gradients get a node that raises an error if somebody does (`_Once`). An empty piece of the input
  (`link`) connects that node with the input for 0 bytes.

torch.compile refuses second derivatives by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as _C

from basis.ops.matrix import without_autocast

REFUSAL = (
    "second derivatives (create_graph=True, nested transforms of torch.func) are not supported by "
    "the layers of basis, which do not keep their inputs; put the plain layers back with "
    "basis.revert, or exclude these layers from the conversion"
)
Gradients = tuple[Tensor | None, ...]


class _Once(torch.autograd.Function):
    """A gradient and, for autograd alone, everything that it depends on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        raise RuntimeError(REFUSAL)


def in_transform() -> bool:
    """Whether a transform of torch.func looks on."""
    return not torch.compiler.is_compiling() and _C.maybe_current_level() is not None


def is_batched(x: Tensor) -> bool:
    """Whether `x` stands for the inputs of many calls, in torch.func.vmap."""
    while not torch.compiler.is_compiling() and _C.is_functorch_wrapped_tensor(x):
        if _C.is_batchedtensor(x):
            return True
        x = _C.get_unwrapped(x)
    return False


def without_transform(x: Tensor) -> Tensor:
    """The values of `x` as a tensor that outlives the transform of torch.func that looks on."""
    while _C.is_functorch_wrapped_tensor(x):
        x = _C.get_unwrapped(x)
    return x


def refuse_nested_transforms() -> None:
    """Raise RuntimeError inside nested transforms of torch.func. For `setup_context`."""
    if in_transform() and (_C.maybe_current_level() or 0) > 1:
        raise RuntimeError(REFUSAL)


def refuse_graph_of_backward() -> None:
    """Raise RuntimeError in a backward of which a graph is asked for."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(REFUSAL)


def link(x: Tensor) -> Tensor | None:
    """An empty tensor that depends on `x`, to be saved for backward in its stead; None where it is
    not needed.
    """
    if not in_transform():
        return None
    with torch.enable_grad():
        return x.reshape(-1)[:0].clone()


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorator of a Function's `backward(ctx, *grads)`: raises RuntimeError where a graph of it is
    asked for, and runs it without grad mode and without autocast.

    The Function's `setup_context` says in `ctx.transformed` whether `in_transform()`. As
    `torch.autograd.function.once_differentiable`, which sees a second derivative only if the
    gradient that comes in requires one itself.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Gradients:
        if not ctx.transformed:
            refuse_graph_of_backward()
        wants_graph = ctx.transformed and torch.is_grad_enabled()
        given = next((grad for grad in grads if grad is not None), None)
        with torch.no_grad(), nullcontext() if given is None else without_autocast(given):
            results = backward(ctx, *grads)
        if not wants_graph:
            return results
        sources = [t for t in (*grads, *ctx.saved_tensors) if t is not None]
        return tuple(None if t is None else _Once.apply(t, *sources) for t in results)

    return checked
