"""The plan of an arena: which methods train the same GPT at which bytes, rates and seeds, beside
which baselines.

A *contender* is a method at a budget (method.budget: the share of each sketched layer's input that
it may keep), or a baseline:

    exact                  everything kept; what all others are compared with
    exact, k x m windows   the same batch in k micro-batches of m windows: the same gradient, fewer
                           bytes, more time
    exact, m windows       a smaller batch at the same bytes: as many steps (fewer tokens), and as
                           many tokens (more steps);
                           m so that all that is kept for backward is as much as with a method at
                           the budget (its sketches and everything else), and m so that it is that
                           share of everything
    exact, checkpoint      blocks computed again in backward, wholly or all but their products: the
                           same gradient
    exact, lean            attention, LayerNorm and GELU in few bits; the dense layers keep all
    exact, bfloat16        half the bytes of everything
    zeroth_order           two losses instead of backward: nothing kept, the floor

Every contender gets the same grid of learning rates (zeroth order its own, since its gradient is
far longer), tuned on one seed; where the best lies at the edge of the grid, rates beyond it are
tried too. The best rate then runs on other seeds, so that no seed of the comparison was looked at
when choosing. What has exact's very gradient (accumulation, checkpoints) takes exact's rate. A run
that only tunes has purpose=tuning, and results.py keeps it out of every average.

All methods sketch the dense layers of the blocks. The head is in nobody's scope: it forms its
gradient together with the loss and keeps no input. What a contender can't reach
(`method.budget=...`) is known before anything starts, and noted for the report in arena.json,
beside how many runs shared the machine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import conf
from basis.diagnostics.budget import BudgetError, parse_share
from basis.estimators import ESTIMATORS
from bench.memory_plan import plan
from harness.build import check_method
from harness.compose import configuration
from harness.config import Config
from harness.folder import rundir
from harness.folder.metrics import read_metrics

BUDGETS = ("1/4", "1/8", "1/24")
RATES = {"adamw": (1e-3, 2e-3, 4e-3, 8e-3), "sgd": (0.01, 0.03, 0.1)}
ZEROTH_ORDER_RATES = {"adamw": (1e-5, 1e-4, 1e-3), "sgd": (1e-7, 1e-6, 1e-5)}
SCOPE = "method.include=[blocks.*]"


@dataclass(frozen=True)
class Contender:
    """One line of the comparison. overrides: on top of the experiment's. rates: to tune over; none:
    exact's best rate. refused: why it can't run, if it can't.
    """

    method: str
    budget: str | None
    overrides: tuple[str, ...]
    rates: tuple[float, ...]
    config: Config | None = None
    refused: str | None = None

    @property
    def name(self) -> str:
        """ "basis 1/8"."""
        return f"{self.method} {self.budget}" if self.budget else self.method


@dataclass(frozen=True)
class Cell:
    """One run: a contender at a rate and a seed, for tuning or for the comparison."""

    contender: Contender
    rate: float
    seed: int
    tuning: bool
    folder: Path
    overrides: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        tuning = " (tuning)" if self.tuning else ""
        return f"{self.contender.name}, lr {self.rate:g}, seed {self.seed}{tuning}"

    def state(self) -> str:
        """finished, diverged, started or new. Raises ValueError if the folder holds a run of
        another configuration.
        """
        summary = rundir.read_summary(self.folder)
        rundir.check_same_run(self.folder, self.config)
        if summary.get("status") == "diverged" or (
            summary.get("status") == "finished" and summary["step"] >= self.config.steps
        ):
            return str(summary["status"])
        return "started" if summary else "new"

    def loss(self) -> float:
        """Final validation loss; infinite for a run that diverged."""
        if self.state() != "finished":
            return math.inf
        rows = read_metrics(self.folder / rundir.METRICS_FILE)
        return float([row["val/loss"] for row in rows if "val/loss" in row][-1])


def default_methods() -> list[str]:
    """Every method of conf/method/ that has a knob for its bytes; BASIS also with its option
    center, where it has one.
    """
    names = [
        name
        for name, kind in ESTIMATORS.items()
        if kind.knob and (conf.FOLDER / "method" / f"{name}.yaml").exists()
    ]
    fields = {field.name for field in dataclasses.fields(ESTIMATORS["basis"])}  # type: ignore[arg-type]
    return names + (["basis center=true"] if "center" in fields else [])


def contenders(
    overrides: Sequence[str],
    methods: Iterable[str],
    budgets: Sequence[str],
    rates: Sequence[float] | None = None,
    baselines: bool = True,
) -> list[Contender]:
    """All lines of the comparison; exact, which everything is compared with, is always the first.

    overrides: as for train.py, `experiment=arena` among them. methods: a method's name and, behind
    blanks, options of it, as in "basis center=true". Raises ValueError for options that can't be;
    what merely can't keep to a budget is `refused`.
    """
    exact = _contender(overrides, "exact", None, ("method=exact",), rates)
    assert exact.config is not None
    _check(exact.config)
    found = [exact]
    for method in methods:
        name, *options = method.split()
        for budget in budgets:
            words = (
                f"method={name}",
                *(f"method.{o}" for o in options),
                f"method.budget={budget}",
                SCOPE,
            )
            found.append(_contender(overrides, method, budget, words, rates))
    if baselines:
        for name, share, what in _baselines(exact.config, budgets):
            if isinstance(what, str):
                found.append(Contender(name, share, (), (), refused=what))
            else:
                contender = _contender(overrides, name, None, what, rates)
                same = contender.config is not None and _same_gradient(
                    contender.config, exact.config
                )
                found.append(dataclasses.replace(contender, rates=()) if same else contender)
    return found


def _check(exact: Config) -> None:
    """Raise ValueError for overrides that leave nothing to compare with: exact is the plain one,
    its batch in one piece.
    """
    if exact.activations.name != "plain":
        raise ValueError(
            f"activations.name={exact.activations.name}: all are compared with plain activations; "
            "leave it out"
        )
    if exact.tokens_per_step not in (None, exact.micro_batch_size * exact.model.block_size):
        raise ValueError(
            f"tokens_per_step={exact.tokens_per_step}: all are compared with the batch in one "
            "piece; set micro_batch_size"
        )


def _contender(
    overrides: Sequence[str],
    method: str,
    budget: str | None,
    words: tuple[str, ...],
    rates: Sequence[float] | None,
) -> Contender:
    config = configuration([*overrides, *words])
    own = (ZEROTH_ORDER_RATES if config.method.name == "zeroth_order" else RATES)[config.optim.name]
    grid = tuple(rates) if rates and config.method.name != "zeroth_order" else own
    try:
        check_method(config)
    except BudgetError as error:
        return Contender(method, budget, words, grid, refused=str(error))
    return Contender(method, budget, words, grid, config)


def _same_gradient(config: Config, exact: Config) -> bool:
    """Whether both, exact methods, take the same steps up to rounding."""
    kinds = [(c.method.name, c.steps, c.step_tokens, c.precision) for c in (config, exact)]
    noisy = config.activations.name == "lean" or config.activations.boundary is not None
    return kinds[0] == kinds[1] and not noisy


def _baselines(
    exact: Config, budgets: Sequence[str]
) -> list[tuple[str, str | None, tuple[str, ...] | str]]:
    """Method, budget and either overrides or the reason why there are none. Baselines of equal size
    are listed once.
    """
    windows = exact.micro_batch_size
    found: dict[str, tuple[str | None, tuple[str, ...] | str]] = {}
    dense = _dense_share(exact) if windows > 1 else 1.0
    parts = {budget: parse_share(budget) for budget in budgets}
    limits = [
        (budget, limit)
        for budget, part in parts.items()
        for limit in (1.0 - (1.0 - part) * dense, part)
    ]
    for budget, limit in limits:
        fitting = [m for m in range(1, windows) if windows % m == 0 and m <= windows * limit]
        if not fitting:
            least = f"one window of {exact.model.block_size} tokens is the smallest, of {windows}"
            for method in ("exact, accumulated", "exact, small batch"):
                found[f"{method} {budget}"] = (budget, f"method.budget={budget}: {least}")
            continue
        size = fitting[-1]
        times = windows // size
        small = ("method=exact", f"micro_batch_size={size}")
        longer = {
            "steps": exact.steps,
            "optim.warmup_steps": exact.optim.warmup_steps,
            "eval.every": exact.eval.every,
        }
        found |= {
            f"exact, {times} x {size} windows": (
                None,
                (*small, f"tokens_per_step={exact.step_tokens}"),
            ),
            f"exact, {size} windows": (None, (*small, "tokens_per_step=null")),
            f"exact, {size} windows, {exact.steps * times} steps": (
                None,
                (
                    *small,
                    "tokens_per_step=null",
                    *(f"{name}={value * times}" for name, value in longer.items()),
                ),
            ),
        }
    found |= {
        "exact, checkpoint": (None, ("method=exact", "activations=checkpoint")),
        "exact, checkpoint selective": (
            None,
            ("method=exact", "activations=checkpoint", "activations.selective=true"),
        ),
        "exact, lean": (None, ("method=exact", "activations=lean")),
        **(
            {}
            if exact.precision == "bfloat16"
            else {"exact, bfloat16": (None, ("method=exact", "precision=bfloat16"))}
        ),
        "zeroth_order": (None, _zeroth_order(exact)),
    }
    return [
        (method.removesuffix(f" {budget}"), budget, words)
        for method, (budget, words) in found.items()
    ]


def _zeroth_order(exact: Config) -> tuple[str, ...] | str:
    if exact.attention.name != "exact":
        return f"attention={exact.attention.name}: it has no backward to take part in"
    return ("method=zeroth_order",)


def _dense_share(exact: Config) -> float:
    """The inputs of dense layers, as a share of all that a step of `exact` keeps for backward."""
    # The vocabulary matters to the head alone, which keeps next to nothing: any will do.
    kept = plan(exact.resolved(256)).kept
    return kept["linear inputs"] / sum(kept.values())


def cell(
    contender: Contender,
    rate: float,
    seed: int,
    *,
    tuning: bool,
    out: Path,
    overrides: Sequence[str],
) -> Cell:
    """The run of `contender` at `rate` and `seed` in a folder of its own below `out`. `overrides`:
    the experiment's.
    """
    assert contender.config is not None
    config = contender.config
    slug = "".join(
        c if c.isalnum() or c in ".-" else "_"
        for c in contender.name.replace(", ", "_").replace("/", "-")
    )
    folder = out / ("tuning" if tuning else "seeds") / f"{slug}_lr{rate:g}_seed{seed}"
    experiment = config.experiment_name + ("_tuning" if tuning else "")  # groups runs in a tracker
    words = [
        f"optim.lr={rate!r}",
        f"seed={seed}",
        f"experiment_name={experiment}",
        "log.progress=false",
    ]
    config = dataclasses.replace(
        config,
        seed=seed,
        experiment_name=experiment,
        optim=dataclasses.replace(config.optim, lr=rate),
    )
    if tuning:
        words += ["purpose=tuning", "eval.every=0", "diagnostics.every=0"]
        evaluation = dataclasses.replace(config.eval, every=0)
        config = dataclasses.replace(config, purpose="tuning", eval=evaluation)
    words.append(f"hydra.run.dir={folder}")
    return Cell(
        contender, rate, seed, tuning, folder, (*overrides, *contender.overrides, *words), config
    )
