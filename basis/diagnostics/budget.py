"""Equal bytes: each method's own knob (a rank, a number of rows, of bits), turned until it keeps a
given share of X.

    basis.convert(model, within_budget(basis.BalancedSketch(1), share=1/24, rows=B))

A fair comparison of methods fixes what they keep between forward and backward and lets each choose
how. The exact layer keeps X, rows * in_features numbers in the precision of the run; a share of
that is the budget, layer by layer, and the setting is the largest whose bytes fit. With
`split_by_error` layers may differ: as many bytes in all, more of them where they help most. Bytes
are counted: the method compresses a tensor that has a shape and no memory. That takes tenths of a
second, so a method may have a formula, `Estimator.bytes_of`, which tests hold against the count.
What lives between steps (a learned subspace) is not part of it; it is counted as state, see
`SketchedLinear.state`. Except where the state itself stands in for X (an average of sketches): then
it is what the budget is for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from basis.estimator import Estimator, kept_of

LEAST_SPENT = 0.9
"""Of a budget, where a method's largest setting falls short of it."""


class BudgetError(ValueError):
    """No setting of a method keeps the share of bytes that it was asked for.

    budget: the share, as text. reason: what the method can keep instead.
    """

    def __init__(self, budget: str, reason: str, option: str = "budget") -> None:
        super().__init__(f"{option}={budget}: {reason}")
        self.budget = budget
        self.reason = reason


def kept_bytes(
    estimator: Estimator, rows: int, width: int, dtype: torch.dtype = torch.float32
) -> int:
    """Bytes that `estimator` keeps of X (rows, width) in `dtype` until backward, once for all
    layers that read it; no state.
    """
    size = estimator.bytes_of(rows, width, dtype)
    if size is None:
        return counted_bytes(estimator, rows, width, dtype)
    whole = rows * width * dtype.itemsize
    return min(size, whole) if estimator.at_most_input else size


@functools.cache
def counted_bytes(estimator: Estimator, rows: int, width: int, dtype: torch.dtype) -> int:
    """`kept_bytes`, found by what `compress` returns for a tensor without memory."""
    with FakeTensorMode():
        x = torch.empty(rows, width, dtype=dtype, device="cpu")
        state = estimator.initial_state(width, x.device)
        key = torch.zeros((), dtype=torch.int64, device="cpu")
        kept = kept_of(estimator, x, key, state)
        if kept is None:
            return x.nbytes
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
        return sum(size for storage, size in storages.items() if storage not in own)


def state_bytes(estimator: Estimator, width: int) -> int:
    """Bytes that `estimator` holds between steps for a layer of `width` in_features."""
    return sum(t.nbytes for t in estimator.initial_state(width, torch.device("meta")).values())


def _bytes(estimator: Estimator, rows: int, width: int, dtype: torch.dtype) -> int:
    """What counts against a budget."""
    state = state_bytes(estimator, width) if estimator.state_replaces_input else 0
    return kept_bytes(estimator, rows, width, dtype) + state


def fit_budget(
    estimator: Estimator, share: float, rows: int, width: int, dtype: torch.dtype = torch.float32
) -> Estimator:
    """`estimator` with its knob at the largest value that keeps at most `share` of X (rows, width)
    in `dtype`.

    Raises BudgetError for a method without a knob, and where even the smallest value keeps more;
    ValueError, beginning with `budget=`, for a share outside (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"budget={share:g}: must be in (0, 1]")
    name = type(estimator).__name__
    if estimator.knob is None:
        raise BudgetError(
            f"{share:g}", f"{name} has no option that decides how many bytes it keeps"
        )
    whole = rows * width * dtype.itemsize
    budget = share * whole
    values = estimator.knob_values(rows, width)

    def size(value: Any) -> int:
        return _bytes(with_knob(estimator, value), rows, width, dtype)

    least = size(values[0])
    if least > budget:
        raise BudgetError(
            f"{share:g}",
            f"{name} keeps at least 1/{whole / least:.3g} of an input of {rows} x {width} "
            f"({estimator.knob}={values[0]})",
        )
    return with_knob(estimator, _last(values, lambda value: size(value) <= budget))


def knob_value(estimator: Estimator) -> Any:
    """The value that the knob of `estimator` has."""
    assert estimator.knob is not None
    return getattr(estimator, estimator.knob)


def with_knob(estimator: Estimator, value: Any) -> Estimator:
    """`estimator` with its knob at `value`."""
    assert estimator.knob is not None
    return cast(Estimator, dataclasses.replace(cast(Any, estimator), **{estimator.knob: value}))


def _last(values: Sequence[Any], fits: Callable[[Any], bool]) -> Any:
    """The last of `values` that fits; the first one does, and bytes grow along them."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(values[middle]) else (low, middle)
    return values[low]


def within_budget(
    estimator: Estimator, *, share: float, rows: int, dtype: torch.dtype = torch.float32
) -> Callable[[str, nn.Linear], Estimator]:
    """For `convert`: each layer with the setting of `estimator` that keeps `share` of its input of
    `rows` rows in `dtype`.

    The function returned raises BudgetError as `fit_budget` does, and where the largest setting
    keeps much less than the share, since that is no comparison at equal bytes.
    """
    made: dict[int, Estimator] = {}  # by width

    def choose(_: str, layer: nn.Linear) -> Estimator:
        width = layer.in_features
        if width not in made:
            made[width] = fit_budget(estimator, share, rows, width, dtype)
            _check_spent(made[width], share, rows, width, dtype)
        return made[width]

    return choose


def _check_spent(
    fitted: Estimator, share: float, rows: int, width: int, dtype: torch.dtype
) -> None:
    """Raise BudgetError if `fitted` has the largest setting there is, and keeps much less than
    `share`.
    """
    assert fitted.knob is not None
    value, whole = getattr(fitted, fitted.knob), rows * width * dtype.itemsize
    kept = _bytes(fitted, rows, width, dtype)
    if value == fitted.knob_values(rows, width)[-1] and kept < LEAST_SPENT * share * whole:
        raise BudgetError(
            f"{share:g}",
            f"{type(fitted).__name__} with its other options keeps at most 1/{whole / kept:.3g} of "
            f"an input of {rows} x {width} ({fitted.knob}={value:g})",
        )


def split_by_error(
    estimator: Estimator,
    errors: Mapping[str, tuple[int, float]],
    *,
    share: float,
    rows: int,
    dtype: torch.dtype = torch.float32,
    times: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Settings of the knob, layer by layer, that keep `share` of all inputs together and make the
    summed error of dW least.

    errors: by layer, its in_features and E |dW^ - dW|^2 / |dW|^2 with what `within_budget` gives it
    (`gradient_quality`). The error of a sketch falls as one over its bytes, e_l b_l / b'_l; under
    sum b'_l = sum b_l the sum of errors is least for b'_l in proportion to sqrt(e_l b_l). For a
    method whose error falls otherwise that is a heuristic. Where that is less than a layer's
    smallest setting keeps, or more than its largest one, the others share what is left; what
    settings round off is spent where it lowers the sum most. times: of layers that read more rows
    than the others, how many times `rows`: experts of a mixture, k for each token. Raises
    ValueError as `fit_budget`.
    """
    many = dict.fromkeys(errors, 1.0) | (dict(times) if times else {})
    values = {name: estimator.knob_values(rows, width) for name, (width, _) in errors.items()}

    @functools.cache
    def size(name: str, index: int) -> int:
        setting = with_knob(estimator, values[name][index])
        return round(many[name] * _bytes(setting, rows, errors[name][0], dtype))

    limits = {name: (size(name, 0), size(name, len(values[name]) - 1)) for name in errors}
    weights = {  # e_l b_l
        name: max(error, 0.0)
        * many[name]
        * _bytes(fit_budget(estimator, share, rows, width, dtype), rows, width, dtype)
        for name, (width, error) in errors.items()
    }
    whole = {name: many[name] * rows * width for name, (width, _) in errors.items()}
    budget = share * dtype.itemsize * sum(whole.values())
    wished = _divide(budget, {name: math.sqrt(weight) for name, weight in weights.items()}, limits)
    chosen = {
        name: _last(range(len(values[name])), lambda i, name=name: size(name, i) <= wished[name])  # type: ignore[misc]
        for name in errors
    }
    while True:
        left = budget - sum(size(name, i) for name, i in chosen.items())
        steps = {}
        for name, i in chosen.items():
            if i + 1 < len(values[name]) and (cost := size(name, i + 1) - size(name, i)) <= left:
                steps[name] = (
                    weights[name] * (1.0 / size(name, i) - 1.0 / size(name, i + 1)) / max(cost, 1)
                )
        if not steps:
            return {name: values[name][i] for name, i in chosen.items()}
        chosen[max(steps, key=lambda name: steps[name])] += 1


def _divide(
    budget: float, wishes: Mapping[str, float], limits: Mapping[str, tuple[int, int]]
) -> dict[str, float]:
    """`budget` in proportion to `wishes`, each part within its limits; all of it, if the limits let
    it be spent.

    A part that hits a limit changes what is left for the others, so limits are fixed in rounds
    until none is hit.
    """
    left, open_ = budget, set(wishes)
    given: dict[str, float] = {}
    while open_:
        total = sum(wishes[name] for name in open_)
        part = {
            name: left * (wishes[name] / total if total else 1.0 / len(open_)) for name in open_
        }
        out = {
            name: min(max(size, limits[name][0]), limits[name][1]) for name, size in part.items()
        }
        # off > 0: lower limits add more than upper limits take away, so that the others get less
        # than `part` next time. A part below its lower limit stays below it then, and can be fixed
        # for good; one above its upper limit may come down, and has to wait. off <= 0: the reverse.
        off = sum(out[name] - part[name] for name in open_)
        fixed = {
            name
            for name in open_
            if (out[name] > part[name] if off > 0 else out[name] < part[name])
        } or set(open_)  # nobody is at a limit: all parts are final
        given |= {name: out[name] for name in fixed}
        left -= sum(out[name] for name in fixed)
        open_ -= fixed
    return given


def parse_share(text: str) -> float:
    """A share such as "1/24" or "0.04" as a number.

    Raises ValueError, beginning with `budget=`, for anything else and outside (0, 1].
    """
    try:
        share = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"budget={text}: must be a share such as 1/24 or 0.04") from None
    if not 0.0 < share <= 1.0:
        raise ValueError(f"budget={text}: must be in (0, 1]")
    return share
