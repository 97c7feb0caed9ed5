"""Options of the wrong type are refused where they are given, by name.

A rank of 2.5 or "3" would else be met deep in a forward, as an error about tensors, or never. As
with options out of range the message of the ValueError begins with the option's name, `rank='3':
must be a whole number`, so that a configuration system can put its own prefix before it.
"""

from __future__ import annotations

import operator
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from torch import nn


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int: numpy's integers are taken too, bools and whole floats are not.

    Raises ValueError that begins with `name`, also below `least`.
    """
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise ValueError(f"{name}={value!r}: must be a whole number")
    if least is not None and value < least:
        raise ValueError(f"{name}={value}: must be at least {least}")
    return operator.index(value)


def module_classes(name: str, value: Any) -> tuple[type[nn.Module], ...]:
    """`value`, a class of modules or a tuple of them, as a tuple.

    Raises ValueError that begins with `name` for anything else.
    """
    classes = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in classes):
        raise ValueError(
            f"{name}={value!r}: must be a class of modules, or a tuple of such classes"
        )
    return classes


def check_types(options: Any) -> None:
    """Hold a dataclass to the int, float and bool that its fields declare, each also with "| None".

    An int will do for a float. Integers that are not int, as numpy's, become int. Other
    declarations are not looked at. Raises ValueError that begins with the name of the wrong option.
    """
    for field in fields(options):
        declared = (
            field.type
            if isinstance(field.type, str)
            else getattr(field.type, "__name__", str(field.type))
        )
        kind, _, otherwise = declared.partition(" | ")
        value = getattr(options, field.name)
        if value is None and otherwise == "None":
            continue
        if kind == "int" and type(value) is not int:
            object.__setattr__(
                options, field.name, whole_number(field.name, value)
            )  # frozen ones too
        elif kind == "float" and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ValueError(f"{field.name}={value!r}: must be a number")
        elif kind == "bool" and not isinstance(value, bool):
            raise ValueError(f"{field.name}={value!r}: must be true or false")
