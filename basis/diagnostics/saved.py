"""For memory accounting: what is kept for backward without autograd's own saved tensors knowing of
it.

`torch.autograd.graph.saved_tensors_hooks` shows an observer every tensor that autograd saves,
except those that an inner hook turns into something else, and those that a checkpoint holds. Such
code says so here; nobody listening, it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

_observers: list[Callable[[Tensor], object]] = []


def announce(*tensors: Tensor) -> None:
    """Tell observers of tensors that live until backward."""
    for observer in _observers:
        for tensor in tensors:
            observer(tensor)


def is_observed() -> bool:
    """Whether somebody listens, for code that has to do more than a call to find out what lives."""
    return bool(_observers)


@contextmanager
def observe(observer: Callable[[Tensor], object]) -> Iterator[None]:
    """Call `observer` with each announced tensor."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
