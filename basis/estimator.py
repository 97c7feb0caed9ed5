"""What a method is: two functions, `compress` and `weight_grad`.

A dense layer has three products, Y = X W^T, dX = dY W and dW = dY^T X. All methods here keep the
first two exact. They differ in *what is kept of X* for the third, and in *how dW is formed from
it*. So a method is an estimator with

    compress(x, key, state)   -> the tensors to keep instead of x         (runs in forward)
    weight_grad(kept, grad_y) -> an estimate of grad_y^T x                (runs in backward)

Estimators are frozen dataclasses: their fields are the method's options, checked when the object is
made, and they print, compare and hash as values. They hold no tensors. What they draw at random is
a function of the key alone (ops/noise.py).

That is all that a method must have. What else it may have:

A method may learn between steps where X lies or how its variance is spread. What it has learned is
the layer's, not the estimator's: it is the `state`, which lives in buffers of the SketchedLinear,
is saved and moved with it, and is counted in bytes of its own. Such a method says

    initial_state(width, device)      -> named tensors that live between steps; most methods: none
    learns_at(step)                   -> whether the first forward of a step learns
    learn(state, x, key)              -> the state after x, tensors of the same shapes
                                         (runs in forward, before compress)

so that a resumed run goes on from where it was.

Where dY is too large to be held whole, as at a language model's head, dW has to be formed from some
rows of it at a time. Nearly every method can be written as X ~ L Z with a left factor L (B, k) that
is known row by row, so that dW ~ (L^T dY)^T Z:

    factors(kept, rows)               -> L, Z and a scale, or None if the method has no such form
                                         (dY is then held whole)

A method may have an option that depends on how many rows its inputs have:

    for_inputs(rows)                  -> the method for such inputs

A method whose noise costs more to draw than to use may let all layers of a micro-batch share some
of it (ops/shared_noise.py):

    shared_noise(shared, place, rows, like)
                                      -> named tensors, which `compress` finds in its state

Where methods are compared at equal bytes, one option of each is turned until its bytes fit. That is
its `knob`, and

    knob_values(rows, width)          -> the values that it can have, from few bytes to many
    bytes_of(rows, width, dtype)      -> the bytes of what `compress` returns, if a formula has them
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from basis.checks import check_types
from basis.ops.shared_noise import SharedNoise

State = Mapping[str, Tensor]
"""What a layer has learned so far, by name."""

LEAST_ROWS = 8
"""Rows that a part of an input keeps at least, where a method keeps rows."""


@dataclass(frozen=True)
class Factors:
    """weight_grad(kept, grad_y) = scale(|grad_y|, |L^T grad_y|) (L^T grad_y)^T Z + (sum of grad_y's
    rows) mean^T.

    left: L (B, k). right: Z (k, N), None for the identity. scale: of two 0-dimensional tensors,
    Frobenius norms, None for 1. mean: (N,), None for 0.
    """

    left: Tensor
    right: Tensor | None = None
    scale: Callable[[Tensor, Tensor], Tensor] | None = None
    mean: Tensor | None = None


class Estimator(abc.ABC):
    """Base of all methods. Shapes: B rows (tokens), N in_features, M out_features.

    A wrong option raises ValueError at construction; its message begins with the option's name, so
    that a configuration system can put its own prefix before it. A method with checks of its own
    calls `super().__post_init__()` first.
    """

    _texts: ClassVar[Mapping[str, str]] = {}

    uses_noise: ClassVar[bool] = True
    """False if `key` is never looked at; layers then draw none."""

    shares_noise: ClassVar[bool] = False
    """True if `shared_noise` may return something; layers then share what they draw."""

    knob: ClassVar[str | None] = None
    """The option that decides how many bytes are kept, if there is one: what budget.py turns."""

    error_tells_rank: ClassVar[bool] = False
    """True if `knob` is a rank and X^ errs by what that leaves out of X: a small error then says
    that the rank is enough, and adaptive_rank.py can follow it. An unbiased sketch of rows errs by
    about sqrt(B / R) whatever X is.
    """

    state_replaces_input: ClassVar[bool] = False
    """True if the state is what stands in for X in backward: a budget is then for the state too,
    else nothing would limit it.
    """

    at_most_input: ClassVar[bool] = True
    """False if what `compress` returns is kept even where X itself takes no more bytes."""

    def __post_init__(self) -> None:
        """Called by dataclasses once the options are there: they must have the types that they are
        declared with.
        """
        check_types(self)
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, Real)}
        texts = {name: repr(float(value)) for name, value in numbers.items()}
        object.__setattr__(self, "_texts", texts)  # frozen dataclasses too

    def constant(self, option: str) -> float:
        """An option that is declared a float, for arithmetic with tensors.

        As text it is a constant to a compiler. With torch.compile(dynamic=True) PyTorch (2.11 to
        2.13) fails on a float attribute where an autograd Function works with it.
        """
        return float(self._texts[option])

    def shared_noise(self, shared: SharedNoise, place: int, rows: int, like: Tensor) -> State:
        """What the layer at `place` uses of the noise that layers share, for an input of `rows`
        rows with the dtype and on the device of `like`. Empty, the default: it draws by its key
        alone.
        """
        return {}

    @abc.abstractmethod
    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        """What to keep of `x` (B, N) for backward.

        key: an int64 tensor from which all noise is drawn, see ops/noise.py. state: what the layer
        has learned, the tensors of `initial_state`, and what it shares with others, those of
        `shared_noise`; empty for a method with neither, and where nothing is shared. To keep
        tensors of `state` costs no bytes.
        """

    @abc.abstractmethod
    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        """The estimate of dW = grad_y^T x, shape (M, N), from `kept` and `grad_y` (B, M)."""

    def factors(self, kept: tuple[Tensor, ...], rows: int) -> Factors | None:
        """`weight_grad(kept, .)` as a product, for `rows` = B rows; None, the default, if there is
        no such form.
        """
        return None

    def for_inputs(self, rows: int) -> Estimator:
        """This method for layers whose inputs have `rows` rows; the default is the method itself.

        A method with an option that depends on the number of rows fills it in here, or raises
        ValueError that begins with the option's name if it was given and does not fit.
        """
        return self

    def for_parts(self, rows: Sequence[int], whole: int) -> list[Estimator]:
        """This method, meant for `whole` rows, for parts of a layer's input of `rows` rows each:
        one whose rank counts rows keeps the same share of each, `LEAST_ROWS` at least.
        """
        if self.knob != "rank" or self.error_tells_rank:
            return [self] * len(rows)
        wished = [max(-(-count * cast(Any, self).rank // whole), LEAST_ROWS) for count in rows]
        return [
            _with_rank(self, min(rank, max(count, 1)))
            for rank, count in zip(wished, rows, strict=True)
        ]

    def knob_values(self, rows: int, width: int) -> Sequence[Any]:
        """Values of `knob` for X (rows, width), from few kept bytes to many."""
        return range(1, rows + 1)

    def bytes_of(self, rows: int, width: int, dtype: torch.dtype) -> int | None:
        """Bytes of what `compress` returns of X (rows, width) in `dtype`, those of `state` not
        counted. None, the default: `compress` is run on a tensor without memory to count them.
        """
        return None

    def initial_state(self, width: int, device: torch.device) -> dict[str, Tensor]:
        """What a layer of `width` = N in_features knows before the first step; empty, the default:
        it never learns.
        """
        return {}

    def learns_at(self, step: int) -> bool:
        """Whether `step` (0 is the first) is one to learn at. Where no step is known, every forward
        is.
        """
        return True

    def learn(self, state: State, x: Tensor, key: Tensor) -> State:
        """The state after `x` (B, N): new tensors of the same names, shapes and dtypes."""
        return state


@functools.lru_cache(maxsize=4096)
def _with_rank(estimator: Estimator, rank: int) -> Estimator:
    return cast(Estimator, dataclasses.replace(cast(Any, estimator), rank=rank))


def kept_of(
    estimator: Estimator, x: Tensor, key: Tensor, state: State
) -> tuple[Tensor, ...] | None:
    """What a layer keeps of `x` (B, N): `estimator.compress`, or None where that takes as many
    bytes as `x` or more. Then `x` itself is kept, and dW is exact.

    Tensors of `state` are not counted: they are there anyway.
    """
    kept = estimator.compress(x, key, state)
    if not estimator.at_most_input:
        return kept
    size = sum(
        t.numel() * t.element_size()
        for t in kept
        if not any(t is known for known in state.values())
    )
    return None if size >= x.numel() * x.element_size() else kept
