"""Sweeps whose cells run in processes of their own: what they report, how they stop, which device
they take.
"""

import itertools
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from offline_wandb import clean_environment
from omegaconf import OmegaConf
from tiny import REPOSITORY, command, overrides, run_command

from harness import sweep, worker
from harness.folder import rundir
from harness.folder.metrics import read_metrics
from harness.folder.run_id import read_run_file


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not worked yet; its handlers of signals are put back."""
    before = {number: signal.getsignal(number) for number in worker.SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # no nohup
    monkeypatch.setattr(sweep, "jobs", sweep.Jobs())
    monkeypatch.setattr(worker, "_signals", None)
    monkeypatch.setattr(worker, "_taken", [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def hydra_values(folder: Path, number: int, launcher: str) -> Any:
    hydra = {
        "sweep": {"dir": str(folder)},
        "launcher": {"_target_": f"hydra_plugins.{launcher}"},
        "mode": RunMode.MULTIRUN,
        "job": {"num": number},
        "runtime": {"output_dir": str(folder / f"cell_{number}")},
    }
    return OmegaConf.create({"hydra": hydra})


@pytest.mark.usefixtures("fresh")
def test_another_process_reports_to_the_one_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_home = sweep.ReportFailedJobs()
    at_home.on_multirun_start(hydra_values(tmp_path, 0, "JoblibLauncher"))
    assert str(REPOSITORY) in os.environ["PYTHONPATH"].split(os.pathsep)
    sent = pickle.dumps(at_home)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(worker, "_PROCESS", "another")
        elsewhere.setattr(sweep, "jobs", sweep.Jobs())
        copy = pickle.loads(sent)
        endings = [None, CompactHydraException("method.rank=0: no"), worker.Interrupted(143)]
        for number, error in enumerate(endings):
            values = hydra_values(tmp_path, number, "JoblibLauncher")
            (tmp_path / f"cell_{number}").mkdir()
            copy.on_job_start(values)
            done = JobReturn(overrides=[f"seed={number}", "steps=1"])
            done.status = JobStatus.COMPLETED if error is None else JobStatus.FAILED
            done.return_value = error
            copy.on_job_end(values, done)
            assert done.return_value is None  # or Hydra would raise it, the first one alone
        assert sweep.jobs.count == 0
    assert sweep.jobs.records is not None
    records = sweep.jobs.records.folder
    assert len(list(records.iterdir())) == 3
    sweep.jobs.collect()
    assert (sweep.jobs.count, sweep.jobs.code) == (3, 143)
    assert sweep.jobs.failed == [("seed=1 steps=1", "method.rank=0: no")]
    assert not records.exists()
    # a cell that did not begin leaves no folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cell_0", "cell_1"]


@pytest.mark.usefixtures("fresh")
def test_after_a_signal_a_worker_begins_no_job() -> None:
    with pytest.raises(SystemExit), worker.job():
        raise SystemExit(143)  # in the process of the user: Hydra's sweep ends
    worker.begin()
    with pytest.raises(SystemExit), worker.job():
        raise SystemExit(-1)  # submitit's own
    with pytest.raises(worker.Interrupted) as stopped, worker.job():
        raise SystemExit(138)  # of a run that saved
    assert stopped.value.code == 138
    with pytest.raises(worker.Interrupted) as kept, worker.job():
        raise AssertionError("begun")
    assert kept.value.code == 138


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("number", worker.SIGNALS)
def test_a_signal_between_jobs_is_kept_and_one_within_ends_it(number: signal.Signals) -> None:
    worker.begin()
    os.kill(os.getpid(), number)
    with pytest.raises(worker.Interrupted) as kept, worker.job():
        raise AssertionError("begun")
    assert kept.value.code == 128 + number
    worker._signals = None
    worker.begin()
    sender = threading.Timer(0.1, os.kill, (os.getpid(), number))
    sender.start()
    with pytest.raises(worker.Interrupted) as ended, worker.job():
        time.sleep(10)
    assert ended.value.code == 128 + number


@pytest.mark.usefixtures("fresh")
def test_a_signal_that_can_only_be_left_in_a_file_stops_jobs_and_begins_none(
    tmp_path: Path,
) -> None:
    """As for cells of Ray."""
    records = worker.Records(tmp_path / "records", watched=True)
    worker.begin(records)
    worker.begin(records)  # at its second job
    leave = threading.Timer(0.1, records.ask_to_stop, (signal.SIGTERM,))
    leave.start()
    with pytest.raises(worker.Interrupted) as ended, worker.job():
        time.sleep(10)
    assert ended.value.code == 143
    worker._signals = None  # as in another process
    worker.begin(records)
    with pytest.raises(worker.Interrupted) as kept, worker.job():
        raise AssertionError("begun")
    assert kept.value.code == 143
    assert records.take() == []
    assert not records.folder.exists()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("given", "visible", "expected"),
    [
        (None, 2, ["0", "1", "0", "1", "0"]),
        ("5,GPU-8a", 0, ["5", "GPU-8a", "5", "GPU-8a", "5"]),
        (None, 1, [None] * 5),
        ("3", 8, ["3"] * 5),
        (None, 0, [None] * 5),
    ],
)
def test_workers_share_devices_evenly(
    given: str | None,
    visible: int,
    expected: list[str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    found, kept = [], []
    for _ in expected:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if given is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        monkeypatch.setattr(worker, "_taken", [])  # as in another process
        worker.take_device(tmp_path)
        worker.take_device(tmp_path)  # at its second job
        kept.append(worker._taken)
        found.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert found == expected


def program(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(("code", "queued"), [(0, False), (138, True), (1, False), (143, False)])
def test_a_job_of_slurm_queues_itself_again_after_its_signal(
    code: int, queued: bool, tmp_path: Path
) -> None:
    program(tmp_path, "srun", f'echo "$@" > {tmp_path}/srun.txt; exit {code}')
    program(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/scontrol.txt')
    script = REPOSITORY / "scripts" / "slurm_train.sbatch"
    done = subprocess.run(
        ["bash", str(script), "method=exact", "data.path='a b.txt'"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"},
        check=False,
    )
    assert done.returncode == code
    ran = (tmp_path / "srun.txt").read_text()
    assert ran == "python train.py method=exact data.path='a b.txt'\n"
    assert (tmp_path / "scontrol.txt").exists() == queued
    if queued:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 42\n"
    options = re.findall(r"^#SBATCH --(.*)$", script.read_text(), re.MULTILINE)
    assert {"signal=USR1@120", "requeue", "open-mode=append"} <= set(options)


RAY = [
    "ray",
    "+hydra.launcher.ray.init.num_cpus=2",
    "+hydra.launcher.ray.init.include_dashboard=no",
]
CELLS = ["method=basis", "method.rank=2,0,4", "seed=0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["joblib", "hydra.launcher.n_jobs=2"], ["submitit_local"], RAY], ids=lambda x: x[0]
)
def test_launchers_report_what_became_of_each_cell(
    launcher: list[str], data: Path, tmp_path: Path
) -> None:
    """From another working directory, and without the project on the path of Python."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher[0].partition('_')[0]}_launcher")
    name, *more = launcher
    arguments = command(data, "-m", f"hydra/launcher={name}", *more, *CELLS)
    done = run_command([*arguments, "hydra.sweep.dir=sweep"], tmp_path, PYTHONPATH="")
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout
    lines = done.stdout.splitlines()
    assert "2 finished, 1 refused" in lines
    (refused,) = [line for line in lines if line.endswith(" method.rank=0: must be at least 1")]
    assert " refused " in refused
    assert re.fullmatch(r"train.py: 1 of 3 jobs failed:", lines[-2]), lines[-2:]
    assert "method.rank=0" in lines[-1]
    folders = sorted(path.parent for path in (tmp_path / "sweep").glob("*/config.yaml"))
    assert [rundir.read_summary(folder)["status"] for folder in folders] == ["finished"] * 2
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {
        "multirun.yaml", *(folder.name for folder in folders), *[".submitit"] * (name[0] == "s")
    }  # fmt: skip
    # The basic launcher finds the same folders, and what is finished there.
    again = run_command(
        [
            *command(data, "-m", "method=basis", "method.rank=2,4", "seed=0"),
            "hydra.sweep.dir=sweep",
        ],
        tmp_path,
    )
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("is finished (step 20") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "launcher"),
    [
        (signal.SIGINT, "joblib"),
        (signal.SIGTERM, "joblib"),
        (signal.SIGKILL, "joblib"),
        (signal.SIGINT, "ray"),
        (signal.SIGTERM, "ray"),  # Ray starts a killed cell again
    ],
)
def test_a_sweep_in_several_processes_is_stopped(
    number: signal.Signals, launcher: str, data: Path, tmp_path: Path
) -> None:
    """Ctrl-C, a batch system's signal to the first process, and a worker that is killed."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher")
    folder = tmp_path / "sweep"
    two = RAY[1:] if launcher == "ray" else ["hydra.launcher.n_jobs=2"]
    arguments = command(data, "-m", f"hydra/launcher={launcher}", *two)
    arguments += ["seed=0,1,2", "steps=1000000", "eval.every=0", f"hydra.sweep.dir={folder}"]
    output = tmp_path / "output.txt"
    with (
        output.open("w") as file,
        subprocess.Popen(
            arguments, cwd=tmp_path, stdout=file, stderr=file, start_new_session=True
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 120
            while len(begun := [p for p in folder.glob("*/metrics.jsonl") if rows(p) > 1]) < 2:
                assert process.poll() is None, output.read_text()
                assert time.monotonic() < deadline, output.read_text()
                time.sleep(0.1)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does
            elif number == signal.SIGTERM:
                process.send_signal(number)
            else:
                os.kill(holder(begun[0].parent / ".lock"), number)
            code = process.wait(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = output.read_text()
    assert "Traceback" not in said
    assert "2 interrupted, 1 waiting" in said.splitlines(), said
    assert {path.parent for path in begun} == {path for path in folder.iterdir() if path.is_dir()}
    if number == signal.SIGKILL:
        assert code == 1
        assert said.count("a process of the sweep has gone, killed or out of memory") == 1
        return
    assert code == 128 + number
    if launcher == "joblib":  # what cells of Ray say is in Ray's logs
        assert said.count("checkpoint saved; the same command continues") == 2
    for metrics in begun:
        summary = rundir.read_summary(metrics.parent)
        assert (summary["status"], summary["saved_step"]) == ("interrupted", summary["step"])


def rows(metrics: Path) -> int:
    return len(read_metrics(metrics))


def holder(lock: Path) -> int:
    """The process that has `lock` open."""
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if fd.resolve() == lock.resolve():
                return int(fd.parts[2])
        except OSError:
            continue  # it has ended
    raise AssertionError(f"nobody holds {lock}")


@pytest.mark.slow
def test_a_cell_is_trained_as_wandbs_agent_calls_it(data: Path, tmp_path: Path) -> None:
    """The command of scripts/sweep_paper.yaml, put together by wandb, in an agent's environment."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    plan = yaml.safe_load((REPOSITORY / "scripts" / "sweep_paper.yaml").read_text())
    cell = {
        name: {"value": values.get("value", values.get("values", [None])[-1])}
        for name, values in plan["parameters"].items()
    }
    small = [word for word in overrides(data) if not word.startswith(("data=", "tracker"))]
    cell |= {
        name: {"value": value}
        for name, _, value in (word.partition("=") for word in ["data=text", *small])
    }
    cell["tracker.mode"] = {"value": "offline"}
    cell["data.order"] = {"value": "random"}
    arguments = create_sweep_command_args({"args": cell})
    words = list(
        itertools.chain.from_iterable(
            {
                "${env}": ["/usr/bin/env"],
                "${program}": [str(REPOSITORY / plan["program"])],
                "${args_no_hyphens}": arguments["args_no_hyphens"],
            }.get(word, [word])
            for word in create_sweep_command(list(plan["command"]))
        )
    )
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = clean_environment(WANDB_SWEEP_ID="s1", WANDB_RUN_ID="agent123", PATH=here)
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("summary.json"))
    assert rundir.read_summary(folder)["status"] == "finished"
    assert read_run_file(folder)["id"] == "agent123"
    assert rundir.read_config(folder)["method"]["rank"] == 1
