"""The method of a run: which estimator of dW with which options, in which layers, at which share of
the bytes.

The options of a method are the fields of its estimator's dataclass (basis/estimators/), plus the
scope: which layers. So a new estimator needs no line here. Zeroth order is no estimator of a
layer's dW, it replaces backward (zeroth_order.py).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from basis.diagnostics.budget import parse_share
from basis.estimator import Estimator
from basis.estimators import ESTIMATORS
from harness.zeroth_order import ZerothOrder

ZEROTH_ORDER = "zeroth_order"
WHOLE_MODEL = ("exact", ZEROTH_ORDER)
"""Methods that have no choice of layers and no budget."""
ALLOCATIONS = ("uniform", "variance")


@dataclass
class MethodOptions:
    """How dW is formed (`name`, one of ESTIMATORS or zeroth_order) and in which dense layers
    (shell patterns of names).

    budget: a share such as 1/24: each layer's knob (rank, rows, bits) is set so that it keeps this
    share of the bytes of its input; the option of that name is then not looked at. null: as the
    options say. allocation: how a budget is divided: uniform, the same share for every layer, or
    variance, as many bytes in all, by the error of dW in the first batches.
    """

    name: str = "exact"
    budget: str | None = None
    allocation: str = "uniform"
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise ValueError for options that contradict each other; the estimator's own are checked
        by making it.
        """
        if self.name in WHOLE_MODEL and (self.include or self.exclude):
            kind = "exact backpropagation" if self.name == "exact" else self.name
            raise ValueError(
                f"method.include, method.exclude: {kind} concerns all layers; leave them empty"
            )
        if self.budget is not None:
            if self.name in WHOLE_MODEL:
                keeps = (
                    "exact backpropagation keeps everything"
                    if self.name == "exact"
                    else "it keeps nothing"
                )
                raise ValueError(f"method.budget={self.budget}: {keeps}; leave it null")
            share_of(self)
        if self.allocation not in ALLOCATIONS:
            raise ValueError(
                f"method.allocation={self.allocation!r}: must be one of {', '.join(ALLOCATIONS)}"
            )
        if self.allocation != "uniform" and self.budget is None:
            raise ValueError(
                f"method.allocation={self.allocation}: divides a budget; give method.budget, such "
                "as 1/8"
            )


@functools.cache
def method_schema(name: str) -> type[MethodOptions]:
    """MethodOptions with the fields of the estimator `name`: the typed form of
    conf/method/<name>.yaml.

    Raises ValueError for a name that is not registered.
    """
    if name not in ESTIMATORS and name != ZEROTH_ORDER:
        raise ValueError(
            f"method.name={name!r}: must be one of {', '.join([*ESTIMATORS, ZEROTH_ORDER])}"
        )
    kind = _kind(name)
    hints = get_type_hints(kind)
    options = [
        (
            f.name,
            hints[f.name],
            field(default=f.default) if f.default is not dataclasses.MISSING else field(),
        )
        for f in dataclasses.fields(kind)
    ]
    return dataclasses.make_dataclass(
        f"{name}_options", options, bases=(MethodOptions,), kw_only=True
    )


def _kind(name: str) -> Any:
    """The dataclass whose fields are the options of the method `name`."""
    return ZerothOrder if name == ZEROTH_ORDER else ESTIMATORS[name]


def make_method(method: MethodOptions) -> Estimator | ZerothOrder:
    """What `method` describes. Raises ValueError naming the dotted option (`method.rank=0: ...`)."""
    kind = _kind(method.name)
    try:
        made: Estimator | ZerothOrder = kind(
            **{f.name: getattr(method, f.name) for f in dataclasses.fields(kind)}
        )
    except ValueError as error:
        raise ValueError(f"method.{error}") from None
    return made


def make_estimator(method: MethodOptions) -> Estimator:
    """`make_method` of a method that estimates dW layer by layer."""
    estimator = make_method(method)
    assert isinstance(estimator, Estimator), method.name
    return estimator


def share_of(method: MethodOptions) -> float:
    """`method.budget` as a number. Raises ValueError naming the option."""
    assert method.budget is not None
    try:
        return parse_share(method.budget)
    except ValueError as error:
        raise ValueError(f"method.{error}") from None
