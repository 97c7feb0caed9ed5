"""One command: the same GPT by every method at the same kept bytes, beside fair baselines, with
tuned rates and seeds.

    # lists the runs, those out of reach too, and stops
    python scripts/arena.py experiment=arena --dry-run
    python scripts/arena.py experiment=arena --jobs 2
    python scripts/arena.py experiment=arena --methods basis "basis center=true" \\
        --budgets 1/8 --no-baselines
    python eval.py runs=runs/arena/2000  # then: ranks, figures, sentences

Overrides are those of train.py and go to every run. First each contender runs at each rate on the
tuning seed, and at rates beyond while the best is at the edge; then the best rate of each on the
seeds. What stands on the list is explained in experiments/arena/plan.py. Every run is a fresh
process, so that its seconds and bytes are its own; with --jobs N as many at a time (each with its
share of the cores, and on CUDA a device), which is quicker, and noisier to time. Given again, the
command skips what is finished and continues what was killed. A run that diverged is a result.
Ctrl-C and SIGTERM let every run save first.

Exit codes: 0 all runs ended, 1 some failed (named at the end, output in logs/), 128 + signal when
stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.prepare import prepare
from experiments.arena.ledger import write_ledger
from experiments.arena.plan import (
    BUDGETS,
    Cell,
    Contender,
    cell,
    contenders,
    default_methods,
)
from experiments.arena.pool import Pool, Start, start_process
from experiments.arena.rates import best_rate, next_rate
from harness.command_line import StopRequest

TUNING_SEED = 1000


def listing(tuning: Sequence[Cell], everyone: Sequence[Contender], seeds: Sequence[int]) -> str:
    """What is about to be run, a line per contender."""
    lines = []
    for contender in everyone:
        if contender.refused:
            lines.append(f"  {contender.name}: out of reach, {contender.refused}")
            continue
        own = [c for c in tuning if c.contender is contender]
        if not contender.rates:
            rates = "rate of exact, whose gradient it has"
        elif not own:
            rates = f"rate {contender.rates[0]:g}, not tuned"
        else:
            rates = f"best rate of {', '.join(f'{c.rate:g} ({c.state()})' for c in own)}"
        lines.append(f"  {contender.name}: {rates}; seeds {' '.join(map(str, seeds))}")
    running = [c for c in everyone if not c.refused]
    steps = sum(c.config.steps for c in tuning)
    steps += sum(c.config.steps for c in running if c.config is not None) * len(seeds)
    count = len(tuning) + len(running) * len(seeds)
    return "\n".join([*lines, f"{count} runs ({len(tuning)} to tune), {steps:,} steps"])


@dataclass(frozen=True)
class Plan:
    """Who runs, where and with which seeds; exact is the first contender."""

    everyone: tuple[Contender, ...]
    seeds: tuple[int, ...]
    tuning_seed: int
    out: Path
    overrides: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raise ValueError if a folder holds a run of other options: found before anything runs."""
        for contender in self.able:
            for rate in contender.rates or self.everyone[0].rates:
                self.finals(contender, rate)

    @property
    def able(self) -> list[Contender]:
        return [c for c in self.everyone if c.refused is None]

    def finals(self, contender: Contender, rate: float) -> list[Cell]:
        """A run per seed."""
        cells = [
            cell(contender, rate, seed, tuning=False, out=self.out, overrides=self.overrides)
            for seed in self.seeds
        ]
        return [self._checked(one) for one in cells]

    def tuning(self, contender: Contender, rate: float) -> Cell:
        return self._checked(
            cell(
                contender,
                rate,
                self.tuning_seed,
                tuning=True,
                out=self.out,
                overrides=self.overrides,
            )
        )

    def first(self) -> list[Cell]:
        """The grid of every contender that is tuned."""
        return [self.tuning(c, rate) for c in self.able if len(c.rates) > 1 for rate in c.rates]

    def beyond(self, tuned: Sequence[Cell]) -> list[Cell]:
        """A rate more for every contender whose best of `tuned` is at the edge."""
        own = [(c, [t for t in tuned if t.contender is c]) for c in self.able]
        found = [(c, rate) for c, cells in own if cells and (rate := next_rate(cells)) is not None]
        for contender, rate in found:
            self.finals(contender, rate)
        return [self.tuning(contender, rate) for contender, rate in found]

    @staticmethod
    def _checked(one: Cell) -> Cell:
        one.state()  # raises if the folder isn't its own
        return one


def race(plan: Plan, pool: Pool, tuning: Sequence[Cell], extend: int) -> int:
    """Tune, then run the best rates on the seeds; the exit code."""
    tuned = list(tuning)
    pool.run(tuned)
    for _ in range(extend):
        try:
            more = plan.beyond(tuned)
        except (
            ValueError
        ) as error:  # a folder that isn't its own, at a rate that nobody could know before
            print(f"arena: {error}", file=sys.stderr)
            return 1
        if pool.stop.code is not None or not more:
            break
        pool.run(more)
        tuned += more
    final: list[Cell] = []
    untuned: list[Contender] = []
    for contender in plan.able:
        judge = contender if contender.rates else plan.everyone[0]
        own = [c for c in tuned if c.contender is judge]
        if any(c.state() in ("new", "started") for c in own):
            untuned.append(contender)  # a tuning run failed: the best rate isn't known
            continue
        rate = best_rate(own) if own else judge.rates[0]
        if rate is None:
            print(f"{contender.name}: diverged at every rate")
            continue
        final += plan.finals(contender, rate)
    if pool.stop.code is None:
        pool.run(final)
    if pool.stop.code is not None:
        print("stopped by a signal; the same command continues", file=sys.stderr)
        return pool.stop.code
    diverged = [c.name for c in [*tuned, *final] if c.state() == "diverged"]
    print(f"{len(diverged)} runs diverged" + "".join(f"\n  {name}" for name in diverged))
    for line in (
        *(f"FAILED {c.name}" for c in pool.failed),
        *(f"not tuned, hence not compared: {c.name}" for c in untuned),
    ):
        print(line)
    print(f"next: python eval.py runs={plan.out}")
    return 1 if pool.failed else 0


def main(argv: list[str] | None = None, start: Start = start_process) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="as for train.py, for every run; experiment=arena if none names one",
    )
    parser.add_argument(
        "--methods",
        nargs="*",
        help='"name option=value ..." each; default: every method with a knob',
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=list(BUDGETS),
        help=f"shares of X; default: {' '.join(BUDGETS)}",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        help="learning rates; default: the grid of experiments/arena/plan.py",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the comparison; default: 0 1 2"
    )
    parser.add_argument(
        "--tuning-seed", type=int, default=TUNING_SEED, help=f"default: {TUNING_SEED}"
    )
    parser.add_argument(
        "--extend",
        type=int,
        default=2,
        help="rates to try beyond the grid while the best is at its edge; default: 2",
    )
    parser.add_argument("--no-baselines", action="store_true", help="methods and exact only")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; default: 1, the best to time"
    )
    parser.add_argument("--out", type=Path, help="default: runs/<experiment>/<steps>")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and stop")
    options = parser.parse_intermixed_args(argv)
    if options.jobs < 1 or options.extend < 0:
        parser.error("--jobs must be at least 1, --extend at least 0")
    if min([options.tuning_seed, *options.seeds]) < 0 or not all(
        0 < rate < math.inf for rate in options.rates or []
    ):
        parser.error("--seeds and --tuning-seed must be at least 0, --rates positive")
    options.seeds = list(dict.fromkeys(options.seeds))
    options.budgets = list(dict.fromkeys(options.budgets))
    options.rates = options.rates and list(dict.fromkeys(options.rates))
    if options.tuning_seed in options.seeds:
        parser.error(
            f"--tuning-seed {options.tuning_seed} is one of --seeds: a rate tuned on it would "
            "favour that run"
        )
    overrides = [str(word) for word in options.overrides]
    if not any(word.startswith("experiment=") for word in overrides):
        overrides.insert(0, "experiment=arena")
    methods = default_methods() if options.methods is None else list(dict.fromkeys(options.methods))
    try:
        everyone = contenders(
            overrides, methods, options.budgets, options.rates, baselines=not options.no_baselines
        )
        base = everyone[0].config
        assert base is not None
        out = options.out or Path("runs") / base.experiment_name / str(base.steps)
        plan = Plan(
            tuple(everyone), tuple(options.seeds), options.tuning_seed, out, tuple(overrides)
        )
        tuning = plan.first()
        print(listing(tuning, everyone, options.seeds), flush=True)
        if options.dry_run:
            return 0
        prepare(base.data, progress=True)  # once, before many ask for it
    except ValueError as error:
        print(f"arena: {error}", file=sys.stderr)
        return 1

    threads = (
        max(len(os.sched_getaffinity(0)) // options.jobs, 1)
        if hasattr(os, "sched_getaffinity")
        else 1
    )
    with StopRequest() as stop:
        pool = Pool(options.jobs, threads, out / "logs", stop, start)
        facts = {"jobs": options.jobs, "threads": threads, "devices": len(pool.devices)}
        write_ledger(out, everyone, **facts, tuning_seed=options.tuning_seed, seeds=options.seeds)
        return race(plan, pool, tuning, options.extend)
