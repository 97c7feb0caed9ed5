"""The EMA activation sketch on small problems, next to exact backpropagation, BASIS and a tracked
subspace.

scripts/mlp_digits.py and scripts/pinn.py share what is here: the methods that are compared and the
loop. Each brings a `Task`: a model, its loss as a function of the step, its score. Tables and
figure: tables.py.

*Why a loop of its own.* harness/ trains a GPT on tokens: its configuration names a model of
models/, its batches are windows of a token file, its checkpoints and metrics are about those. Here
there are no tokens: a batch is a set of images or of points in space, the loss may be the residual
of a differential equation, and a training takes seconds and is never resumed. What is left of the
harness would be the ten lines of `train`. The estimators, budgets, adaptive rank and the quality of
dW are those of basis/, so what is compared is the same code.

*Variants.* exact; ema_sketch with beta 0 (a batch sketch), 0.9 and 0.99; the same at 0.9 with
adaptive rank; BASIS; subspace. Except for the adaptive one, each keeps at most the same share of
every layer's input (basis/diagnostics/budget.py). For the EMA sketch that is its state, which
stands in for the input. For the others it is what they keep until backward. What they have learned
(subspace's directions) comes on top and has its own column. The adaptive variant starts at rank 2
and follows the error of reconstructed inputs that are not trained on
(basis/diagnostics/adaptive_rank.py), up to the rank at which its state would be as large as exact's
inputs.

*Fairness.* Equal seeds start from equal weights and see equal batches, and all methods have the
same rate. So a method that shrinks gradients also takes smaller steps. Every so many steps the
score, the rank and the quality of dW are measured, all sketched layers as one vector
(basis/diagnostics/quality.py): its cosine to the exact one, and

    kept of the gradient = <dW^, dW> / |dW|^2

which is 1 on average for an unbiased estimate; 0.1 says that nine tenths are gone.

Bytes are those of the sketched layers alone: pointwise functions keep their own, whatever the
method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import basis
from basis.diagnostics.adaptive_rank import AdaptiveRank, reconstruction_error, set_rank
from basis.diagnostics.budget import (
    BudgetError,
    fit_budget,
    kept_bytes,
    knob_value,
    parse_share,
    state_bytes,
    within_budget,
)
from basis.diagnostics.quality import TOTAL
from basis.estimator import Estimator

BETAS = (0.0, 0.9, 0.99)
ADAPTIVE_BETA = 0.9
OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class Adaptive:
    """When and how the rank follows the error. every: steps between checks; low, high: see
    AdaptiveRank.
    """

    every: int = 20
    low: float = 0.1
    high: float = 0.3
    start: int = 2


@dataclass(frozen=True)
class Variant:
    """A method. estimator: None for exact; its knob is set by the budget, or by `adaptive`."""

    label: str
    estimator: Estimator | None = None
    adaptive: Adaptive | None = None


def variants(rows: int, adaptive: Adaptive) -> list[Variant]:
    """All methods, for inputs of `rows` rows; ranks are placeholders until the budget sets them."""
    found = [Variant("exact")]
    found += [
        Variant(f"ema_sketch beta={beta:g}", basis.EMASketch(1, rows=rows, beta=beta))
        for beta in BETAS
    ]
    start = basis.EMASketch(adaptive.start, rows=rows, beta=ADAPTIVE_BETA)
    found.append(Variant(f"ema_sketch beta={ADAPTIVE_BETA:g}, adaptive rank", start, adaptive))
    return [
        *found,
        Variant("basis", basis.BalancedSketch(1)),
        Variant("subspace", basis.Subspace(1)),
    ]


@dataclass
class Task:
    """One model to be trained. loss: of a step, with graph, one forward of `rows` rows per layer;
    score: of the present weights; unseen: runs the model on as many rows that are not trained on;
    include: layers to sketch.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    score: Callable[[], float]
    unseen: Callable[[], object]
    rows: int
    include: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Options:
    """Of the loop. look: steps between looks; share: of each input's bytes. Raises ValueError
    naming the command's option.
    """

    steps: int
    lr: float
    optimizer: str = "adam"
    momentum: float = 0.9  # of sgd
    look: int = 50
    share: str = "1/4"

    def __post_init__(self) -> None:
        for name in ("steps", "look"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"--lr {self.lr}: must be positive")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"--optimizers {self.optimizer}: must be one of {', '.join(OPTIMIZERS)}"
            )
        try:
            parse_share(self.share)
        except ValueError:
            raise ValueError(
                f"--share {self.share}: must be in (0, 1], such as 1/4 or 0.25"
            ) from None


@dataclass
class Outcome:
    """One training. looks: by step the loss, score, rank, bytes and quality there; diverged: the
    step without a finite loss.
    """

    variant: str
    seed: int
    looks: list[dict[str, float]] = field(default_factory=list)
    diverged: int | None = None
    bytes_kept: int = 0  # the most at any step
    bytes_state: int = 0
    bytes_exact: int = 0

    @property
    def score(self) -> float:
        """At the end; NaN if it never got there."""
        return math.nan if self.diverged is not None else self.looks[-1]["score"]

    def mean(self, name: str) -> float:
        """Of a number over the looks after the first step's, where no average has a past yet; NaN
        if none has it.
        """
        values = [
            seen[name]
            for seen in self.looks
            if seen["step"] > 0 and math.isfinite(seen.get(name, math.nan))
        ]
        return sum(values) / len(values) if values else math.nan


def chosen_layers(task: Task) -> list[nn.Linear]:
    """The layers that a method would sketch, found by sketching nothing."""
    names = basis.convert(task.model, basis.Exact(), include=task.include, exact_if_kept=False)
    basis.revert(task.model)
    layers = [task.model.get_submodule(name) for name in names]
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def put_in(task: Task, variant: Variant, share: float) -> AdaptiveRank | None:
    """Put the method into the task's layers; the controller of its rank if it has one. Raises
    ValueError for the share.
    """
    if variant.estimator is None:
        return None
    if variant.adaptive is None:
        chosen = within_budget(variant.estimator, share=share, rows=task.rows)
        basis.convert(task.model, chosen, include=task.include, exact_if_kept=False)
        return None
    widths = {layer.in_features for layer in chosen_layers(task)}
    most = min(
        int(knob_value(fit_budget(variant.estimator, 1.0, task.rows, width))) for width in widths
    )
    basis.convert(task.model, variant.estimator, include=task.include, exact_if_kept=False)
    rule = variant.adaptive
    return AdaptiveRank(min(rule.start, most), low=rule.low, high=rule.high, maximum=most)


def measured_bytes(task: Task) -> tuple[int, int]:
    """Kept until backward by the sketched layers, and their state."""
    layers = [layer for _, layer in basis.sketched_layers(task.model)]
    kept = sum(kept_bytes(layer.estimator, task.rows, layer.in_features) for layer in layers)
    return kept, sum(state_bytes(layer.estimator, layer.in_features) for layer in layers)


def make_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    if options.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=options.lr, momentum=options.momentum)
    return torch.optim.Adam(model.parameters(), lr=options.lr)


def train(task: Task, variant: Variant, options: Options, seed: int) -> Outcome:
    """Train `task` by the method; the rate falls along half a cosine to 0. Raises ValueError if the
    share is out of reach.
    """
    outcome = Outcome(variant.label, seed)
    outcome.bytes_exact = sum(4 * task.rows * layer.in_features for layer in chosen_layers(task))
    try:
        controller = put_in(task, variant, parse_share(options.share))
    except BudgetError as error:
        raise ValueError(f"--share {options.share}: {error.reason}") from None
    optimizer = make_optimizer(task.model, options)

    def note_bytes() -> None:
        kept, state = (
            (outcome.bytes_exact, 0) if variant.estimator is None else measured_bytes(task)
        )
        if kept + state > outcome.bytes_kept + outcome.bytes_state:
            outcome.bytes_kept, outcome.bytes_state = kept, state

    note_bytes()
    for step in range(options.steps + 1):
        if (
            controller is not None
            and variant.adaptive is not None
            and step
            and step % variant.adaptive.every == 0
        ):
            before = controller.rank
            if controller.observe(reconstruction_error(task.model, task.unseen)) != before:
                set_rank(task.model, controller.rank)
                note_bytes()
        basis.set_noise_key(task.model, seed=seed, step=step)
        if step % options.look == 0 or step == options.steps:
            outcome.looks.append(
                {"step": step, "score": task.score()} | look(task, step, controller)
            )
        if step == options.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = options.lr * 0.5 * (1.0 + math.cos(math.pi * step / options.steps))
        loss = task.loss(step)
        if not math.isfinite(float(loss.detach())):
            outcome.diverged = step
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return outcome


def look(task: Task, step: int, controller: AdaptiveRank | None) -> dict[str, float]:
    """Largest rank of the layers, and the quality of dW in the step about to be taken; of exact
    nothing.
    """
    layers = [layer for _, layer in basis.sketched_layers(task.model)]
    if not layers:
        return {}
    rank = (
        max(knob_value(layer.estimator) for layer in layers)
        if controller is None
        else controller.rank
    )
    quality = basis.gradient_quality(task.model, lambda: task.loss(step))[TOTAL]
    return {
        "rank": rank,
        "cosine": quality.cosine,
        "share_kept": quality.product / quality.exact_square if quality.exact_square else math.nan,
    }


@dataclass
class Setting:
    """One circumstance in which all variants are trained over all seeds, and the outcomes."""

    name: str
    outcomes: list[Outcome] = field(default_factory=list)

    def of(self, label: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.variant == label]

    def labels(self) -> list[str]:
        return list(dict.fromkeys(outcome.variant for outcome in self.outcomes))
