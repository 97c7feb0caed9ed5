"""train.py under torchrun, two processes on this machine: the real command, to its end, stopped,
killed and continued.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import command, losses, overrides

from bench.memory_plan import plan
from harness.compose import configuration
from harness.folder.checkpoint import Checkpoints

pytestmark = pytest.mark.slow

KINDS = ("ddp", "fsdp")
STEP = ("micro_batch_size=4", "tokens_per_step=256")
BASIS = ("method=basis", "method.rank=8")
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
LONGEST = 180.0  # seconds
KILLS = int(os.environ.get("BASIS_KILLS", "4"))


def _start(folder: Path, run: str, *words: str, processes: int = 2) -> subprocess.Popen[str]:
    """train.py in `folder`/`run`, by so many processes."""
    python, *rest = command(folder, *STEP, f"hydra.run.dir={folder / run}", *words)
    return subprocess.Popen(
        [python, *(LAUNCHER if processes == 2 else ()), *rest],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _end(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=LONGEST)
    return process.returncode, said


def _finish(folder: Path, run: str, *words: str, processes: int = 2) -> None:
    code, said = _end(_start(folder, run, *words, processes=processes))
    assert code == 0, said


def _wait(process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    end = time.monotonic() + LONGEST
    while not until():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def _saved(folder: Path, run: str) -> int:
    """The step of the newest checkpoint."""
    return max(Checkpoints(folder / run / "checkpoints").steps(), default=0)


def _workers(launcher: int) -> list[int]:
    """The processes that torchrun has started, in order of their rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return sorted(map(int, children))


def _history(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics without the peak: with fsdp it moves by a few tensors, as the threads that
    talk let go of theirs.
    """
    rows = losses(run)
    return [{k: v for k, v in row.items() if k != "mem/peak_bytes"} for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_does_and_hold_what_is_planned(
    kind: str, tmp_path: Path
) -> None:
    words = (*BASIS, "model.n_layer=2")
    _finish(tmp_path, "two", *words, f"parallel={kind}")
    _finish(tmp_path, "one", *words, processes=1)
    rows, alone = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert [row["step"] for row in rows] == [row["step"] for row in alone]
    for row, other in zip(rows, alone, strict=True):
        for name in ("train/loss", "val/loss", "grad_norm", "momentum_norm"):
            if name in other:
                assert row[name] == pytest.approx(other[name], rel=1e-5), (row["step"], name)

    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    size = f"model.vocab_size={_vocabulary(tmp_path)}"
    words = (*overrides(tmp_path), *STEP, *words, size)
    planned = plan(configuration([*words, f"parallel={kind}", "world_size=2"]))
    assert summary["mem/parameter_bytes"] == pytest.approx(planned.parameters, rel=0.05)
    assert summary["mem/saved_bytes"] == pytest.approx(sum(planned.kept.values()), rel=0.05)
    assert summary["mem/peak_bytes"] == pytest.approx(planned.peak, rel=0.05)
    if kind == "fsdp":
        whole = plan(configuration([*words]))
        assert planned.parameters == pytest.approx(whole.parameters / 2, rel=0.02)
        assert planned.optimizer == pytest.approx(whole.optimizer / 2, rel=0.02)


def _vocabulary(folder: Path) -> int:
    return len(set((folder / "text.txt").read_text()))


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_processes_goes_on_where_it_is_asked_to(
    kind: str, tmp_path: Path
) -> None:
    words = (*BASIS, "steps=10")
    _finish(tmp_path, "run", *words, processes=1)
    code, said = _end(_start(tmp_path, "run", *BASIS, "steps=20", f"parallel={kind}"))
    assert code == 1
    assert said.count("train.py: ") == 1
    assert "world_size: 1 -> 2" in said
    more = (*BASIS, "resume.world_size=any")
    _finish(tmp_path, "run", *more, "steps=20", f"parallel={kind}")
    _finish(tmp_path, "run", *more, "steps=30", processes=1)
    _finish(tmp_path, "straight", *BASIS, "steps=30", processes=1)
    found, straight = losses(tmp_path / "run")[-1], losses(tmp_path / "straight")[-1]
    assert found["val/loss"] == pytest.approx(straight["val/loss"], rel=1e-4)


@pytest.mark.parametrize("method", [("method=exact",), BASIS, ("method=transform",)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_process_takes_the_other_along_and_the_command_goes_on(
    kind: str, method: tuple[str, ...], tmp_path: Path
) -> None:
    words = (*method, f"parallel={kind}", "steps=60", "eval.every=20", "checkpoint.every=5")
    _finish(tmp_path, "straight", *words)
    for victim, after in ((1, 10), (0, 30)):
        running = _start(tmp_path, "killed", *words)
        _wait(running, lambda least=after: _saved(tmp_path, "killed") >= least)  # type: ignore[misc]
        os.kill(_workers(running.pid)[victim], signal.SIGKILL)
        killed = time.monotonic()
        code, said = _end(running)
        assert code != 0
        assert time.monotonic() - killed < 60
        assert said.count("another process of this run has ended") == 1, said
        assert 'train.py", line' not in said
    _finish(tmp_path, "killed", *words)
    assert _history(tmp_path / "killed") == _history(tmp_path / "straight")


@pytest.mark.parametrize(
    ("kind", "method"),
    [("ddp", ("method=exact",)), ("ddp", BASIS), ("fsdp", BASIS), ("fsdp", ("method=transform",))],
    ids=lambda value: value if isinstance(value, str) else value[0].partition("=")[2],
)
def test_kills_within_saves_leave_a_checkpoint_to_go_on_from(
    kind: str,
    method: tuple[str, ...],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Of the process that writes and of the other one in turn, as soon as a save has begun."""
    words = (*method, f"parallel={kind}", f"steps={20 * KILLS}", "eval.every=20")
    words = (*words, "checkpoint.every=1")
    _finish(tmp_path, "straight", *words)
    saves, within = tmp_path / "killed" / "checkpoints", 0

    def saving() -> bool:
        return saves.exists() and any(path.name.startswith(".") for path in saves.iterdir())

    for kill in range(KILLS):
        begun = _saved(tmp_path, "killed")
        running = _start(tmp_path, "killed", *words)
        _wait(running, lambda least=begun: _saved(tmp_path, "killed") > least + 2)  # type: ignore[misc]
        victim = _workers(running.pid)[kill % 2]
        while not saving():
            assert running.poll() is None
        os.kill(victim, signal.SIGKILL)
        within += saving()
        code, said = _end(running)
        assert code != 0, said
    _finish(tmp_path, "killed", *words)
    record_property(f"kills of one of two, {kind}, {method[0]}", f"{KILLS}, {within} within a save")
    assert within > 0
    assert _history(tmp_path / "killed") == _history(tmp_path / "straight")


def test_a_signal_to_one_process_saves_in_all_and_the_command_goes_on(tmp_path: Path) -> None:
    words = (*BASIS, "parallel=ddp", "steps=300", "eval.every=0", "checkpoint.every=0")
    running = _start(tmp_path, "run", *words, "log.every=1")
    metrics = tmp_path / "run" / "metrics.jsonl"
    _wait(running, lambda: metrics.exists() and metrics.read_text().count("\n") > 5)
    os.kill(_workers(running.pid)[1], signal.SIGUSR1)
    code, said = _end(running)
    assert code != 0
    saved = _saved(tmp_path, "run")
    assert f"stopped by a signal at step {saved}, checkpoint saved" in said
    code, said = _end(_start(tmp_path, "run", *words))
    assert code == 0, said
    assert f"continuing from step {saved} " in said


@pytest.mark.parametrize("method", ["transform", "quantized"])
def test_methods_that_round_or_learn_train_as_well_on_two_processes(
    method: str, tmp_path: Path
) -> None:
    """Losses after 200 steps: those of two processes lie among those of one with other seeds."""
    words = (f"method={method}", "steps=200", "eval.every=0")
    _finish(tmp_path, "two", *words, "parallel=ddp")
    for seed in range(4):
        _finish(tmp_path, f"one{seed}", *words, f"seed={seed}", processes=1)
    found = losses(tmp_path / "two")[-1]["val/loss"]
    alone = [losses(tmp_path / f"one{seed}")[-1]["val/loss"] for seed in range(4)]
    spread = max(alone) - min(alone)
    assert min(alone) - spread < found < max(alone) + spread


def test_a_refusal_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    for words, message in (
        (("parallel=none",), "parallel=none: world_size=2 processes would each train"),
        (("world_size=4",), "world_size=4: 2 processes were started"),
        (("-m", "seed=0,1"), "--multirun: 2 processes work on one run"),
    ):
        code, said = _end(_start(tmp_path, "refused", *words))
        assert code == 1
        assert said.count("train.py: ") == 1, said
        assert message in said
        assert not (tmp_path / "refused").exists()
