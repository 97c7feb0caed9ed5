"""Lean modules for classes that this library does not import, such as those of transformers.

A stand-in is then an instance of a subclass, made for the class of the module: `isinstance` still
holds, and what the class can do besides, its stand-in can too. One subclass is made for each class.

Which classes: a name that looks like it, and then what it computes, in float32 and in bfloat16
(trial.py).
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

from torch import nn

from basis.exchange import StandInOfClass, standing_in, take_over

Lean = TypeVar("Lean", bound="LeanSubclass")


class LeanSubclass(StandInOfClass):
    """Mixin: of it and the class of a module the class of a stand-in is made."""

    prefix: ClassVar[str] = "Lean"

    @classmethod
    def of(cls: type[Lean], module: nn.Module) -> Lean:
        """A stand-in with all that `module` has; what it needs itself is to be put in."""
        return take_over(standing_in(cls, module), module)
