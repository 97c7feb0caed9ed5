"""Lean modules for classes that this library does not import, such as those of transformers.

A stand-in is then an instance of a subclass, made for the class of the module: `isinstance` still
holds, and what the class can do besides, its stand-in can too. One subclass is made for each class.

Which classes: a name that looks like it, and then what it computes. The forward of the class is
tried on a few numbers, with small weights on the CPU in the place of the module's own, and has to
give what a formula gives, to the last bit, in float32 and in bfloat16 (`agree`). A class that does
anything else besides is left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from basis.exchange import StandInOfClass, blank, standing_in, take_over

Lean = TypeVar("Lean", bound="LeanSubclass")
Module = TypeVar("Module", bound=nn.Module)

_FOREIGN = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What the forward of a class that is something else may raise on a trial."""


class LeanSubclass(StandInOfClass):
    """Mixin: of it and the class of a module the class of a stand-in is made."""

    prefix: ClassVar[str] = "Lean"

    @classmethod
    def of(cls: type[Lean], module: nn.Module) -> Lean:
        """A stand-in with all that `module` has; what it needs itself is to be put in."""
        return take_over(standing_in(cls, module), module)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, or of what it stands for."""
    return module.stands_for if isinstance(module, LeanSubclass) else type(module)


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


def agree(trial: Any, formula: Callable[[Tensor], Tensor], *inputs: Tensor) -> bool:
    """Whether the class of the module `trial`, or a function, computes `formula` of each input.
    Within `real_numbers`.
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
        if not torch.equal(found, wanted):
            return False
    return True
