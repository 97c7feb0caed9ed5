"""Whether a class of another library computes a formula, told by trying it.

The forward of the class is tried on a few numbers, with small weights on the CPU in the place of
the module's own, and has to give what the formula gives, to the last bit (`agree`). A class that
does anything else besides fails, and is left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from basis.exchange import StandInOfClass, blank

_FOREIGN = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What the forward of a class that is something else may raise on a trial."""


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, or of what it stands for."""
    return module.stands_for if isinstance(module, StandInOfClass) else type(module)


def on_trial(module: nn.Module, **parts: nn.Module | nn.Parameter | None) -> nn.Module:
    """A module of the class of `module` and with its attributes, but these parts for its own."""
    trial = blank(plain_class(module))
    tables = vars(trial).keys() - {"training"}
    vars(trial).update({name: it for name, it in vars(module).items() if name not in tables})
    for name, part in parts.items():
        setattr(trial, name, part)
    return trial


def takes_one(module: nn.Module) -> bool:
    """Whether the forward of the class of `module` takes one tensor and nothing else."""
    return len(inspect.signature(plain_class(module).forward).parameters) == 2  # with self


@contextmanager
def real_numbers() -> Iterator[None]:
    """Within, tensors have values on the CPU, whatever modes are on where a model is converted."""
    with _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        yield


def agree(
    trial: Any, formula: Callable[[Tensor], Tensor], *inputs: Tensor, near: float = 0.0
) -> bool:
    """Whether the class of the module `trial`, or a function, computes `formula` of each input.
    near: how far apart numbers may be, relative or not; by default the last bit counts. Within
    `real_numbers`.
    """
    run = plain_class(trial).forward if isinstance(trial, nn.Module) else None
    for x in inputs:
        try:
            found = trial(x) if run is None else run(trial, x)
            wanted = formula(x)
        except _FOREIGN:
            return False
        if not isinstance(found, Tensor) or found.dtype != wanted.dtype:
            return False
        if found.shape != wanted.shape:
            return False
        if not (torch.allclose(found, wanted, near, near) if near else torch.equal(found, wanted)):
            return False
    return True
