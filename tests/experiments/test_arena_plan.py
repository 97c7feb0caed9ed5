"""The arena's plan: who takes part at which rates, and what the one command runs, skips and
extends.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
from composed import composed, in_place_of_conf
from hydra.errors import CompactHydraException
from tiny import REPOSITORY, overrides, run_command, train_here

import conf
import train
from experiments.arena import ledger, plan, rates
from experiments.arena import run as arena
from experiments.sections import studies
from harness.folder.rundir import CONFIG_FILE
from report import write
from report.results import find_runs

BLOCKS = "method.include=[blocks.*]"
QUICK = ["micro_batch_size=4", "diagnostics.every=10"]
SHORT = ["steps=6", "optim.warmup_steps=0", "micro_batch_size=2"]


@pytest.fixture(autouse=True)
def quick_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conf, "compose", in_place_of_conf)


def test_plan_of_the_small_model() -> None:
    lines = {
        c.name: c for c in plan.contenders(["experiment=arena"], ["basis"], ["1/4", "1/8", "1/24"])
    }
    assert lines["basis 1/24"].config.method.include == ("blocks.*",)
    assert lines["exact, accumulated 1/24"].refused == lines["exact, small batch 1/24"].refused
    assert lines["exact, small batch 1/24"].refused.startswith(
        "method.budget=1/24: one window of 64 tokens is the smallest, of 12"
    )
    accumulated = lines["exact, 4 x 3 windows"]
    assert (
        accumulated.config.micro_batches,
        accumulated.config.step_tokens,
        accumulated.rates,
    ) == (4, 768, ())
    assert lines["exact, checkpoint"].rates == ()
    assert lines["exact, bfloat16"].rates == lines["exact"].rates == plan.RATES["adamw"]
    assert lines["exact, lean"].rates == plan.RATES["adamw"]  # its gradient is not quite exact's
    small, long = lines["exact, 3 windows"].config, lines["exact, 3 windows, 8000 steps"].config
    assert (small.step_tokens, small.steps) == (192, 2000)
    assert long.steps * long.step_tokens == 2000 * 768
    assert long.optim.warmup_steps == 400
    assert lines["exact, 12 x 1 windows"].config.micro_batches == 12  # 1/12: the nearest below 1/8
    # Of exact's 24.9 MiB 9.0 are inputs of dense layers: at 1/8 of these 17.0 are kept, as of 8.2
    # windows; 6 divides 12.
    halves = lines["exact, 2 x 6 windows"]
    assert (halves.config.micro_batches, halves.config.step_tokens, halves.rates) == (2, 768, ())
    assert {"exact, 6 windows", "exact, 6 windows, 4000 steps"} <= lines.keys()
    assert len(lines) == 20
    paper = plan.contenders(["experiment=arena_paper"], ["basis"], ["1/8"])
    assert [c.name for c in paper if c.refused] == [
        "exact, accumulated 1/8",
        "exact, small batch 1/8",
    ]
    assert paper[1].config.optim.name == "sgd"


def test_methods_take_options_and_a_wrong_one_is_named() -> None:
    (_, uniform) = plan.contenders(
        ["experiment=arena"], ["basis hashing=uniform"], ["1/8"], [1e-3], baselines=False
    )
    assert (uniform.name, uniform.config.method.estimator.hashing, uniform.rates) == (
        "basis hashing=uniform 1/8",
        "uniform",
        (1e-3,),
    )
    with pytest.raises(ValueError, match=r"method\.hashing='other'"):
        plan.contenders(["experiment=arena"], ["basis hashing=other"], ["1/8"])
    for word, said in {
        "activations=lean": r"activations\.name=lean: all are compared with plain",
        "tokens_per_step=1536": r"tokens_per_step=1536: all are compared with the batch",
        "stepz=10": "stepz: there is no such option",
    }.items():
        with pytest.raises(ValueError, match=said):
            plan.contenders(["experiment=arena", word], ["basis"], ["1/8"])


def test_in_bfloat16_all_are_compared_with_exact_in_bfloat16(data: Path, tmp_path: Path) -> None:
    low = plan.contenders(["experiment=arena", "precision=bfloat16"], ["basis"], ["1/4"])
    assert "exact, bfloat16" not in [c.name for c in low]
    options = ["precision=bfloat16", "micro_batch_size=4"]
    train_here(data, tmp_path / "exact", *QUICK, "method=exact", *options)
    train_here(data, tmp_path / "float32", *QUICK, "method=exact", "micro_batch_size=4")
    train_here(data, tmp_path / "basis", *QUICK, "method.budget=1/4", BLOCKS, *options)
    ranks = next(
        table for table in write.gather([tmp_path], studies()).tables if table.name == "arena"
    )
    above = {row["method"]: row["above"] for row in ranks.rows}
    assert above["exact"] is None
    assert above["basis 1/4"].count == above["exact, float32"].count == 1


@pytest.mark.parametrize(
    ("losses", "beyond"),
    [
        ({0.1: 3.0, 0.2: 2.0, 0.4: 1.0}, 0.8),
        ({0.01: 1.0, 0.03: 2.0, 0.1: math.inf}, 0.0033),
        ({0.1: 3.0, 0.2: 1.0, 0.4: 2.0}, None),
        ({0.1: math.inf, 0.2: math.inf}, None),
        ({0.1: 1.0}, None),
    ],
)
def test_a_best_rate_at_the_edge_asks_for_one_beyond(
    losses: dict[float, float], beyond: float | None
) -> None:
    cells = [
        SimpleNamespace(rate=rate, loss=lambda loss=loss: loss) for rate, loss in losses.items()
    ]
    assert rates.next_rate(cells) == beyond


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    """A small arena: BASIS at two budgets, one of them out of reach, next to exact."""
    options = ["--methods", "basis", "--budgets", "1/4", "1/64", "--seeds", "0", "--no-baselines"]
    words = ["experiment=arena", *overrides(data), *SHORT]
    return [*options, "--out", str(out), *more, "--", *words]


class TrainedHere:
    """In place of a process: a run of train.py that was taken in this one."""

    def __init__(self, words: Sequence[str], environment: object, output: IO[bytes]) -> None:
        (folder,) = (word for word in words if word.startswith("hydra.run.dir="))
        values = composed(*(word for word in words if word != folder))
        self.returncode = 0
        try:
            train.execute(values, Path(folder.partition("=")[2]))
        except CompactHydraException as error:
            output.write(str(error).encode())
            self.returncode = 1

    def poll(self) -> int:
        return self.returncode


@dataclass
class Answer:
    returncode: int
    stdout: str
    stderr: str


Launch = Callable[..., Answer]


@pytest.fixture
def launch(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Launch:
    """The command, whose runs are trained in this process; --out is `tmp_path`/out."""

    def answer(*more: str) -> Answer:
        try:
            code = arena.main(arguments(data, tmp_path / "out", *more), start=TrainedHere)
        except SystemExit as ended:  # of argparse
            code = ended.code
        return Answer(code, *capsys.readouterr())

    return answer


@pytest.mark.slow
def test_each_run_is_a_process(data: Path, tmp_path: Path) -> None:
    rate = ["--rates", "0.001"]
    command = [sys.executable, "-m", "scripts.arena", *arguments(data, tmp_path / "out", *rate)]
    done = run_command([*command], tmp_path, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stdout
    found, _ = find_runs([tmp_path / "out"])
    assert len(found) == 2
    assert len(list((tmp_path / "out" / "logs").iterdir())) == 2
    assert all("val/loss" in log.read_text() for log in (tmp_path / "out" / "logs").iterdir())


def test_one_command_lists_runs_skips_and_reports(launch: Launch, tmp_path: Path) -> None:
    rates = ["--rates", "0.001", "1e18", "--extend", "0"]
    dry = launch(*rates, "--dry-run")
    assert dry.returncode == 0, dry.stdout
    assert "basis 1/4: best rate of 0.001 (new), 1e+18 (new); seeds 0" in dry.stdout
    assert (
        "basis 1/64: out of reach, method.budget=1/64: BalancedSketch keeps at least" in dry.stdout
    )
    assert "6 runs (4 to tune), 36 steps" in dry.stdout
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    done = launch(*rates, "--jobs", "2")
    assert done.returncode == 0, done.stdout
    found, _ = find_runs([tmp_path / "out"])
    assert sorted(run.tuning for run in found) == [False] * 2 + [True] * 4
    assert {run.options["optim.lr"] for run in found if not run.tuning} == {0.001}
    assert math.isfinite(found[0].last("val/loss"))
    again = launch(*rates)
    assert again.returncode == 0, again.stdout
    assert "4 runs, 4 of them ended before" in again.stdout
    assert "2 runs, 2 of them ended before" in again.stdout
    (line,) = ledger.read_ledger(tmp_path / "out")["refused"]
    assert (line["method"], line["budget"]) == ("basis", "1/64")
    stale = launch(*rates, "--jobs", "1", "optim.beta1=0.5")
    assert stale.returncode == 1
    assert "arena: " in stale.stderr
    assert "optim.beta1" in stale.stderr
    assert "Traceback" not in stale.stderr
    clash = launch(*rates, "--tuning-seed", "0")
    assert clash.returncode == 2
    assert "is one of --seeds" in clash.stderr


@pytest.mark.slow
def test_the_grid_is_extended_while_the_best_rate_is_its_last(
    launch: Launch, tmp_path: Path
) -> None:
    done = launch("--rates", "0.0001", "0.0002", "--extend", "2")
    assert done.returncode == 0, done.stdout
    found, _ = find_runs([tmp_path / "out"])
    for name in ("exact", "basis"):
        tried = sorted(
            run.options["optim.lr"]
            for run in found
            if run.tuning and run.options["method.name"] == name
        )
        assert tried == [
            0.0001,
            0.0002,
            0.0004,
            0.0008,
        ]  # six steps of AdamW: the longer the better
        assert [
            run.options["optim.lr"]
            for run in found
            if not run.tuning and run.options["method.name"] == name
        ] == [0.0008]
    other = tmp_path / "out" / "seeds" / "exact_lr0.0008_seed0" / CONFIG_FILE
    other.write_text(other.read_text().replace("beta1: 0.9\n", "beta1: 0.5\n"))
    stale = launch("--rates", "0.0001", "0.0002", "--extend", "2")
    assert stale.returncode == 1
    assert "arena: " in stale.stderr
    assert "optim.beta1" in stale.stderr
    assert "Traceback" not in stale.stderr


def test_zeroth_order_has_no_part_in_an_arena_of_sus_attention() -> None:
    lines = {
        c.name: c
        for c in plan.contenders(["experiment=arena", "attention=sus"], ["basis"], ["1/4"])
    }
    assert lines["zeroth_order"].refused == "attention=sus: it has no backward to take part in"
    assert lines["basis 1/4"].refused is None
