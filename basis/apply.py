"""One line for any model: what to keep, and a report of what was changed.

    report = basis.apply(model, "8x", sample=batch, lean=True, head=True)
    print(report)           # layers changed, layers left and why, bytes a token before and after
    basis.revert(model)     # a plain model again

`apply` is `basis.convert` with a budget in place of a setting, and with a look at what came of it.
"8x", or a share such as "1/8", is of the bytes of each dense layer's input in the precision of its
weight: "8x" of bfloat16 is 2 bits a number. The method is `Quantized` unless another is given; of
all that we compared it is the one that ends where exact backpropagation does with the fewest bytes
and without a state (results/arena). `lean` is for what a block keeps besides, `head` for logits.

What is exact, estimated and kept: see convert.py, lean/__init__.py and causal_lm.py. What the
report costs: with a sample two forwards of it, without gradients computed; without one, nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from basis.causal_lm import fuse_head, unfuse_head
from basis.convert import Method, convert, left_alone, put_back
from basis.diagnostics.budget import (
    BudgetError,
    fit_budget,
    kept_bytes,
    parse_share,
    with_knob,
)
from basis.diagnostics.kept import kept_by_category, tokens_of
from basis.diagnostics.report import Change, Report
from basis.estimator import Estimator
from basis.estimators.quantized import Quantized
from basis.exchange import StandIn, plainly_named
from basis.layers.sketch import exchange_of, width_of
from basis.lean import Lean
from basis.sketched import Sketched

_ROWS = 1024  # for methods whose bytes a number do not depend on the rows


def parse_budget(what: str) -> float:
    """The share of "8x" (an eighth), "1/8" or "0.125".

    Raises ValueError, beginning with `what=`, for anything else and outside (0, 1].
    """
    try:
        text = what.strip()
        return parse_share(f"1/{text[:-1]}" if text.endswith("x") else text)
    except ValueError:
        raise ValueError(
            f"what={what!r}: must be how many times fewer bytes, such as '8x', a share, such as "
            "'1/8', or an estimator"
        ) from None


def apply(
    model: nn.Module,
    what: str | float | Method = "8x",
    *,
    method: Estimator | None = None,
    sample: Any = None,
    rows: int | None = None,
    lean: bool | Lean = False,
    head: bool = False,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
) -> Report:
    """Make `model` keep less for backward, in place, and return a report of what was changed.

    model: any nn.Module; a PreTrainedModel or PeftModel of transformers and peft too. what: "8x",
    "1/8" or 0.125 of the bytes of dense layers' inputs, or what `convert` takes: an estimator, or a
    function of a layer's name and the layer. method: the estimator whose knob is turned to fit the
    budget; None is `Quantized`. sample: what the model is called with, a dict of its arguments, a
    tuple or a tensor: bytes are measured on it, with labels those of the loss too. rows: of the
    input of a dense layer, for methods that keep rows, where no sample tells. lean: True, or a
    `basis.Lean` of one's own, for norms, activations, dropout and attention. head: fuse the last
    layer with the loss (`fuse_head`); `Quantized` then leaves it exact, since nothing of its input
    is kept. include, exclude: shell patterns over the names of dense layers.

    Raises ValueError, with the model as it was, where nothing matches: no dense layer, or no module
    that `lean` or `head` is for; and for a budget that can't be kept. TypeError for a wrong kind of
    argument. Warns, as `convert` does, where little of the model is changed, and where no fewer
    bytes are kept than before.
    """
    exchange = Lean(attention="sdpa") if lean is True else lean
    if not isinstance(exchange, bool | Lean):
        raise TypeError(f"apply: lean must be True, False or a basis.Lean, got {lean!r}")
    if exchange and not any(exchange.accepts(module) for module in model.modules()):
        raise ValueError(f"lean={lean!r}: the model has no {exchange.kind}")
    share = None
    if isinstance(what, str | float | int) and not isinstance(what, bool):
        share = parse_budget(what if isinstance(what, str) else repr(float(what)))
    elif method is not None:
        raise ValueError(f"method={method}: is for a budget such as what='8x'; what is {what!r}")
    tokens = None if sample is None else tokens_of(sample)
    before, seen = ({}, {}) if sample is None else kept_by_category(model, sample)
    modules = dict(plainly_named(model))
    chosen: Method
    if share is None:
        chosen = what  # type: ignore[assignment]
    else:
        by_name = {name: seen[module] for name, module in modules.items() if module in seen}
        chosen = _Fitted(Quantized() if method is None else method, share, by_name, rows)
    plain = not any(isinstance(module, StandIn) for module in modules.values())
    if head:
        name = fuse_head(model)  # refuses before anything is changed
        unfuse_head(model)
        fitted = chosen.method if isinstance(chosen, _Fitted) else chosen
        trained = exchange_of(chosen).accepts(modules[name])  # under adapters it is frozen
        if isinstance(fitted, Quantized) and trained and not isinstance(exclude, str):
            # A fused head forms dW at once, as large as it is: fewer bits of X would add noise to
            # it, and spare nothing. A sketch of few rows spares dW itself.
            exclude = [*exclude, name]
    names = convert(model, chosen, include, exclude)
    try:
        if exchange:
            names += convert(model, exchange)
        fused = fuse_head(model) if head else None
    except (ValueError, TypeError):
        if plain:
            put_back(model, (StandIn,))
        raise
    now = dict(plainly_named(model))
    changed = [
        Change(name, type(modules[name]).__name__, _described(now[name]))
        for name in dict.fromkeys(names)
        if name in modules and name in now  # a module of several names has one
    ]
    left = [one for one in left_alone(model, chosen) if one.name not in set(names)]
    after, _ = ({}, {}) if sample is None else kept_by_category(model, sample)
    kept = {kind: (before.get(kind, 0), after.get(kind, 0)) for kind in {**before, **after}}
    report = Report(changed, left, kept, tokens, _by_shapes(now.values(), rows), fused)
    measured = report.by_shapes if sample is None else (report.before, report.after)
    if measured[1] >= measured[0] and (sample is not None or not (exchange or head)):
        warnings.warn(
            f"apply: with what={what} the model keeps no less than before: {measured[0]:,.0f} -> "
            f"{measured[1]:,.0f} bytes{' a token' if sample is None else ''}",
            stacklevel=2,
        )
    return report


def _described(module: nn.Module) -> str:
    return str(module.estimator) if isinstance(module, Sketched) else type(module).__name__


def _by_shapes(modules: Iterable[nn.Module], rows: int | None) -> tuple[float, float]:
    """Bytes a row of the inputs of sketched layers, each for itself, as they are and sketched."""
    before = after = 0.0
    for layer in modules:
        if isinstance(layer, Sketched):
            many, width, dtype = rows or _ROWS, layer.in_features, layer.weight.dtype
            before += width * dtype.itemsize
            after += kept_bytes(layer.estimator, many, width, dtype) / many
    return before, after


class _Fitted:
    """For `convert`: each layer's setting of `method` that keeps `share` of its input. by_name:
    rows of the inputs of layers, where they are known.
    """

    def __init__(
        self, method: Estimator, share: float, by_name: Mapping[str, int], rows: int | None
    ) -> None:
        self.method, self.share, self.by_name, self.rows = method, share, by_name, rows
        self._made: dict[tuple[int, int, torch.dtype], Estimator] = {}

    def __call__(self, name: str, layer: nn.Linear) -> Estimator:
        rows = self.by_name.get(name, self.rows)
        if rows is None:
            if self.method.knob != "bits":
                raise ValueError(
                    f"rows=None: what {type(self.method).__name__} keeps depends on the rows of "
                    "an input; give rows=, the tokens of a batch, or a sample"
                )
            rows = _ROWS
        elif self.method.knob == "bits":
            rows = max(rows, _ROWS)  # else the few bytes beside the bits would count
        wanted = rows, width_of(layer), layer.weight.dtype
        if wanted not in self._made:
            self._made[wanted] = self._fit(*wanted)
        return self._made[wanted]

    def _fit(self, rows: int, width: int, dtype: torch.dtype) -> Estimator:
        try:
            return fit_budget(self.method, self.share, rows, width, dtype)
        except BudgetError:
            if rows == max(self.by_name.values(), default=rows):
                raise
            # A layer that reads a few rows only, such as a classifier: what it keeps is little.
            return with_knob(self.method, self.method.knob_values(rows, width)[0])
