"""`adaptive_rank`: the rank of a method follows the error of what it keeps, while the training goes
on.

    python train.py method=ema_sketch method.rank=2 adaptive_rank.every=20

Every `every` steps the inputs of all sketched layers are reconstructed, on text that is not trained
on, and the rank of all of them goes up, down or stays, see basis/diagnostics/adaptive_rank.py.
`method.rank` is where it starts. With a new rank what the layers had learned is forgotten; weights
and optimiser go on.

*The batch* is one micro-batch of the validation text, another one at each check, a function of
(seed, step) alone as training's batches are. No loss is looked at; still, the held-out text has a
say in the rank.

*When.* After a step whose number `every` divides, the last one too: a run that is given more steps
later is then the same run.

*What is logged.* At a check `rank/error`, and `rank/estimator`, the rank from there on, which the
first row has too. Where it changes, all of `mem/...` is measured again, as at the start: the last
value of `mem/saved_bytes` is that of the last rank.

*Which methods.* Those whose error says whether the rank is enough (`Estimator.error_tells_rank`).

*Cost.* Of a check: one forward and a reconstruction of every sketched layer's input, B x B numbers
held. Of a change: the steps that measure memory, and under torch.compile a new compilation, which
the next row's `step_seconds` has in it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import nn

from basis import sketched_layers
from basis.diagnostics.adaptive_rank import AdaptiveRank, reconstruction_error, set_rank
from basis.diagnostics.budget import BudgetError, fit_budget
from basis.estimator import Estimator
from basis.estimators import ESTIMATORS
from basis.ops.noise import fold
from data import Sampler
from harness.device import Runtime
from harness.method import Method

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdaptiveRankOptions:
    """Every `every` steps (0: never) the rank rises by `up` if the error is above `high`, and falls
    by `down` once it was below `low` at `patience` checks in a row; within minimum and maximum,
    null: the largest at which all layers keep less than exact, which they are at any beyond.
    """

    every: int = 0
    low: float = 0.1
    high: float = 0.3
    minimum: int = 1
    maximum: int | None = None
    up: int = 2
    down: int = 1
    patience: int = 3

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("minimum", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"adaptive_rank.{name}={getattr(self, name)}: must be at least {least}"
                )
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(
                f"adaptive_rank.maximum={self.maximum}: must be at least "
                f"adaptive_rank.minimum={self.minimum}, or null"
            )
        try:
            self.controller(self.minimum, self.maximum or self.minimum)
        except ValueError as error:
            raise ValueError(f"adaptive_rank.{error}") from None

    def controller(self, rank: int, maximum: int) -> AdaptiveRank:
        """The rule, started at `rank`."""
        shared = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("every", "maximum")
        }
        return AdaptiveRank(rank, maximum=maximum, **shared)

    def check_method(self, method: Method) -> None:
        """Raise ValueError, naming the option, if `method` has no rank that can follow an error."""
        if not self.every:
            return
        allowed = [name for name, kind in ESTIMATORS.items() if kind.error_tells_rank]
        if method.name not in allowed:
            why = "has no rank"
            if method.estimator.knob == "rank":
                why = "errs by its rank alone, whatever it sketches, so there is nothing to follow"
            raise ValueError(
                f"adaptive_rank.every={self.every}: method={method.name} {why}; it can be used "
                f"with {', '.join(allowed)}"
            )
        if method.budget is not None:
            raise ValueError(
                f"adaptive_rank.every={self.every}: method.budget={method.budget.text} sets the "
                "rank already; leave one of the two out (adaptive_rank.maximum limits what an "
                "adaptive rank keeps)"
            )

    def label_options(self) -> dict[str, object]:
        """What a run's labels say of it."""
        return {"adaptive": f"{self.low:g}..{self.high:g}"} if self.every else {}


def start(
    options: AdaptiveRankOptions,
    model: nn.Module,
    estimator: Estimator,
    rows: int,
    dtype: torch.dtype,
) -> AdaptiveRank:
    """The controller of `model`, whose sketched layers have `estimator`, for inputs of `rows` rows
    in `dtype`.

    Raises ValueError naming the option if the estimator's rank or the limits do not fit the layers.
    """
    widths = {layer.in_features for _, layer in sketched_layers(model)}
    maximum, what = options.maximum, ""
    if maximum is None:
        try:
            maximum = min(
                # a byte less than exact, which is what a layer keeps at any rank beyond
                _rank(fit_budget(estimator, 1 - 1 / (rows * w * dtype.itemsize), rows, w, dtype))
                for w in widths
            )
        except BudgetError:  # not even rank 1 does
            raise ValueError(
                f"adaptive_rank.maximum=null: with {rows} rows every rank keeps as much as exact "
                "does; give a number"
            ) from None
        what = (
            f"; {maximum} is the largest rank at which all layers keep less than exact "
            "(adaptive_rank.maximum=null)"
        )
    else:
        largest = max(estimator.knob_values(rows, width)[-1] for width in widths)
        if maximum > largest:
            raise ValueError(
                f"adaptive_rank.maximum={maximum}: must be at most {largest}; a larger rank "
                "changes nothing here"
            )
    if options.minimum > maximum:
        raise ValueError(
            f"adaptive_rank.minimum={options.minimum}: must be at most {maximum}{what}"
        )
    rank = _rank(estimator)
    if not options.minimum <= rank <= maximum:
        raise ValueError(
            f"method.rank={rank}: with adaptive_rank it must be in [minimum, maximum] = "
            f"[{options.minimum}, {maximum}]{what}"
        )
    return options.controller(rank, maximum)


def _rank(estimator: Estimator) -> int:
    assert estimator.knob == "rank"
    rank: int = getattr(estimator, estimator.knob)
    return rank


@dataclass
class RankControl:
    """Controller and batches of a run. since: the step of the last change, at which what the layers
    had learned began anew.
    """

    controller: AdaptiveRank
    every: int
    unseen: Sampler
    since: int = 0

    def due(self, step: int) -> bool:
        """Whether to check after `step` steps."""
        return step % self.every == 0

    def check(self, model: nn.Module, runtime: Runtime, seed: int, step: int) -> tuple[float, bool]:
        """The error after `step` steps, and whether the rank has changed, in `model` too.

        Without dropout and without learning; PyTorch's random state stays as it was.
        """
        inputs, _ = self.unseen.batch(step)

        def forward() -> None:
            runtime.forward(model, inputs)

        training, before = model.training, self.controller.rank
        model.eval()
        error = reconstruction_error(model, forward, fold("adaptive rank", seed, step))
        model.train(training)
        changed = self.controller.observe(error) != before
        if changed:
            self.since = step
            set_rank(model, self.controller.rank, step)
            log.info(
                "step %d  rank %d -> %d (error %.3g)", step, before, self.controller.rank, error
            )
        return error, changed

    def metrics(self) -> dict[str, float]:
        """The rank that the next step is taken with."""
        return {"rank/estimator": self.controller.rank}

    def state_dict(self) -> dict[str, int]:
        """What lives between checks."""
        return self.controller.state_dict() | {"since": self.since}

    def restore(self, state: Mapping[str, int], model: nn.Module) -> None:
        """Go on from `state_dict()`; the sketched layers of `model` get their rank."""
        self.controller.load_state_dict(state)
        self.since = state["since"]
        set_rank(model, self.controller.rank, self.since)
