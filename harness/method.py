"""The method of a run: the estimator of dW with its options, the layers it is put into, and the
share of the bytes it may keep.

conf/method/<name>.yaml and the command line say the options. `method_schema` gives their types: the
fields of the estimator's own dataclass (basis/estimators/), and the scope and budget that all
methods share. So a new estimator needs no line here. `make_method` turns the options into a
`Method`, once, when the configuration is loaded; everything after that uses the estimator it holds.

Zeroth order is not an estimator of a layer's dW: it replaces backward (zeroth_order.py).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast, get_type_hints

from basis import Exact
from basis.diagnostics.budget import parse_share
from basis.estimator import Estimator
from basis.estimators import ESTIMATORS
from harness.zeroth_order import ZerothOrder

ZEROTH_ORDER = "zeroth_order"
WHOLE_MODEL = ("exact", ZEROTH_ORDER)
"""Methods that have no choice of layers and no budget."""


@dataclass(frozen=True)
class Budget:
    """The share of the bytes of its inputs that a method may keep, and how layers divide it.

    text: the share as the user gave it, such as "1/24", so that messages repeat it. allocation:
    uniform, the same share for every layer; variance, as many bytes in all, divided by the error of
    dW in the first batches. Raises ValueError naming the option.
    """

    ALLOCATIONS: ClassVar[tuple[str, ...]] = ("uniform", "variance")

    text: str
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        try:
            parse_share(self.text)
        except ValueError as error:
            raise ValueError(f"method.{error}") from None

    @property
    def share(self) -> float:
        """The share as a number in (0, 1]."""
        return parse_share(self.text)


@dataclass(frozen=True)
class Method:
    """How dW is formed, and in which dense layers.

    estimator: of each sketched layer; with a budget its knob (rank, rows, bits) is set layer by
    layer, and the value here is not used. zeroth_order: replaces backward, if the method is that;
    `estimator` is then Exact, as the layers stay plain. include, exclude: shell patterns of the
    names of layers.
    """

    name: str = "exact"
    estimator: Estimator = field(default_factory=Exact)
    zeroth_order: ZerothOrder | None = None
    budget: Budget | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def varies_by_layer(self) -> bool:
        """Whether the budget is divided by measured errors, so that each layer has its own knob."""
        return self.budget is not None and self.budget.allocation == "variance"

    def own_options(self) -> dict[str, Any]:
        """The options that only this method has: the fields of its estimator."""
        made = cast(Any, self.estimator if self.zeroth_order is None else self.zeroth_order)
        return {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}

    def to_dict(self) -> dict[str, Any]:
        """The options that make this method, as conf/method/<name>.yaml has them."""
        shared = {
            "name": self.name,
            "budget": None if self.budget is None else self.budget.text,
            "allocation": "uniform" if self.budget is None else self.budget.allocation,
            "include": list(self.include),
            "exclude": list(self.exclude),
        }
        return shared | self.own_options()


@dataclass(frozen=True)
class MethodOptions:
    """The options that all methods share; `method_schema` adds a method's own."""

    name: str = "exact"
    budget: str | None = None
    allocation: str = "uniform"
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise ValueError for options that contradict each other."""
        if self.name in WHOLE_MODEL and (self.include or self.exclude):
            kind = "exact backpropagation" if self.name == "exact" else self.name
            raise ValueError(
                f"method.include, method.exclude: {kind} concerns all layers; leave them empty"
            )
        if self.name in WHOLE_MODEL and self.budget is not None:
            keeps = (
                "exact backpropagation keeps everything"
                if self.name == "exact"
                else "it keeps nothing"
            )
            raise ValueError(f"method.budget={self.budget}: {keeps}; leave it null")
        if self.allocation not in Budget.ALLOCATIONS:
            raise ValueError(
                f"method.allocation={self.allocation!r}: must be one of "
                f"{', '.join(Budget.ALLOCATIONS)}"
            )
        if self.allocation != "uniform" and self.budget is None:
            raise ValueError(
                f"method.allocation={self.allocation}: divides a budget; give method.budget, such "
                "as 1/8"
            )


@functools.cache
def method_schema(name: str) -> type[MethodOptions]:
    """The dataclass of all options of the method `name`: the types of conf/method/<name>.yaml.

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
        f"{name}_options", options, bases=(MethodOptions,), kw_only=True, frozen=True
    )


def _kind(name: str) -> Any:
    """The dataclass whose fields are the options of the method `name`."""
    return ZerothOrder if name == ZEROTH_ORDER else ESTIMATORS[name]


def make_method(options: MethodOptions, rows: int) -> Method:
    """The method of `options`, an instance of its `method_schema`, for layers whose inputs have
    `rows` rows.

    Raises ValueError naming the dotted option (`method.rank=0: ...`).
    """
    kind = _kind(options.name)
    try:
        made = kind(**{f.name: getattr(options, f.name) for f in dataclasses.fields(kind)})
        if isinstance(made, Estimator):
            made = made.for_inputs(rows)
    except ValueError as error:
        raise ValueError(f"method.{error}") from None
    budget = None if options.budget is None else Budget(options.budget, options.allocation)
    return Method(
        name=options.name,
        estimator=made if isinstance(made, Estimator) else Exact(),
        zeroth_order=made if isinstance(made, ZerothOrder) else None,
        budget=budget,
        include=tuple(options.include),
        exclude=tuple(options.exclude),
    )
