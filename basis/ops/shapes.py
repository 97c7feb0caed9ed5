"""What kernels return of fake tensors: empty ones of the right shapes, found once for each set of
shapes.

    with shapes.alone():                   # in a program that counts bytes (bench/memory_plan.py)
        kernels.attempt(kernel, plain, x)  # of a fake x

A kernel holds nothing beside its arguments and results, and the plain functions for a CPU go
through rows that lie in the cache. On fake tensors, where each operation costs the same whatever
its size, the plain function takes all rows at once, and would hold several copies of them. Within
`alone` none of that is seen: the function is gone through on fake tensors of its own, and its
results are made anew. It is gone through once for the same shapes and options, since it looks at no
values; so a model of many equal layers is gone through in a fraction of the time.

Not outside of `alone`: a tracer that works with fake tensors wants the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

T = TypeVar("T")

_PLAIN = (Tensor, int, float, str, torch.dtype, NoneType)
_alone = False
_known: dict[Any, tuple[list[Any], TreeSpec] | None] = {}


class _Shape(NamedTuple):
    """All that a fake tensor is."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> _Shape:
        return cls(tuple(x.shape), x.stride(), x.dtype, x.device)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


@contextmanager
def alone() -> Iterator[None]:
    """Within, kernels are asked for the shapes of what they return of fake tensors."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def counts(x: Tensor) -> bool:
    """Whether it is only the shape of `x` that counts."""
    return _alone and isinstance(x, FakeTensor) and not torch.compiler.is_compiling()


def results(function: Callable[..., T], x: Tensor, *args: Any) -> T:
    """What `function(x, ...)` returns of fake tensors, as far as its shapes go. It looks at no
    values, and no gradient is taken through it.
    """
    leaves, spec = tree_flatten((x, *args))
    if not all(isinstance(leaf, _PLAIN) for leaf in leaves):
        return function(x, *args)
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    assert not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
    shapes = [_Shape.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    key = (function, str(spec), *shapes)
    if key not in _known:
        _known[key] = _found(function, shapes, spec)
    known = _known[key]
    if known is None:
        return function(x, *args)
    made = [leaf.empty() if isinstance(leaf, _Shape) else leaf for leaf in known[0]]
    result: T = tree_unflatten(made, known[1])
    return result


def _found(
    function: Callable[..., Any], shapes: list[Any], spec: TreeSpec
) -> tuple[list[Any], TreeSpec] | None:
    """Shapes and the form of what `function` returns; None where it returns what it was given."""
    with _disable_current_modes(), FakeTensorMode(), torch.no_grad():
        given = [leaf.empty() if isinstance(leaf, _Shape) else leaf for leaf in shapes]
        leaves, form = tree_flatten(function(*tree_unflatten(given, spec)))
    mine, theirs = (
        {t.untyped_storage()._cdata for t in tree_leaves(found) if isinstance(t, Tensor)}
        for found in (given, leaves)
    )
    if mine & theirs:
        return None
    return [_Shape.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form
