"""The GPU session: its processes end in time, what it carries is found, tables are those of the
runs; and all of it is rehearsed on the CPU."""

import csv
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from tiny import REPOSITORY, overrides, run_command

from bench import carried, gpu_session
from bench.processes import Process, run_all
from bench.session_runs import gpt2_runs, label, paper_runs, write_runs
from harness.compose import configuration


def python(code: str, log: Path) -> Process:
    return Process([sys.executable, "-S", "-c", code], log, log.parent, {})


def test_processes_end_in_time_and_say_how(tmp_path: Path) -> None:
    waits = "import time; print('begun', flush=True); time.sleep(60)"
    stubborn = f"import os, signal; signal.signal(signal.SIGTERM, lambda *_: os._exit(7)); {waits}"
    codes = ["print('done')", "raise SystemExit(3)", waits, stubborn, "print('too late')"]
    processes = [python(code, tmp_path / str(i)) for i, code in enumerate(codes)]
    ended: list[Process] = []
    start = time.monotonic()
    run_all(processes, 3.0, jobs=2, after=ended.append)
    assert time.monotonic() - start < 20
    assert [process.code for process in processes] == [0, 3, 143, 7, 124]
    assert [process.stopped for process in processes] == [False, False, True, True, True]
    assert set(map(id, ended)) == set(map(id, processes[:4]))
    assert (tmp_path / "0").read_text() == "done\n"
    assert not (tmp_path / "4").exists()


def test_what_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.processes.GRACE", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    process = python(deaf, tmp_path / "log")
    start = time.monotonic()
    run_all([process], 1.0)
    assert time.monotonic() - start < 20
    assert (process.code, process.stopped) == (137, True)


def test_wheels_that_python_lacks_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    assert carried.unpack(tmp_path / "wheels", tmp_path / "site") is None
    for name in ("nobody_has_this", "pytest"):
        with zipfile.ZipFile(tmp_path / f"wheels/{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "x = 5\n")
            wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\n")
    site = carried.unpack(tmp_path / "wheels", tmp_path / "site")
    assert site is not None
    assert sorted(path.name for path in site.glob("*.py")) == ["nobody_has_this.py"]
    code = "import nobody_has_this as n; print(n.x)"
    assert run_command([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(site)).stdout == "5\n"


def test_the_packages_that_are_carried_are_pinned() -> None:
    assert len(carried.pinned(carried.PACKAGES + carried.SOURCES)) == 13


@pytest.mark.parametrize("tiny", [False, True])
def test_the_runs_are_configurations(tiny: bool, tmp_path: Path) -> None:
    place = {"device": "cpu", "data": ["data=shakespeare"], "tiny": tiny}
    paper = paper_runs(tmp_path, steps=None, seeds=2, **place)
    assert len(paper) == (4 if tiny else 12)
    assert len({tuple(words) for words in paper.values()}) == len(paper)
    gpt2 = gpt2_runs(tmp_path, ["method=exact", *gpu_session.AGAINST], **place)
    assert list(gpt2) == ["exact", "basis-64-lean", "exact-checkpoint"]
    words = [paper["r1-1"], *gpt2.values()]
    if tiny:
        words = words[:3]
    for run in words:
        given = [word for word in run if not word.startswith("hydra.")]
        config = configuration(given)
        assert config.tracker.mode == "disabled"
    config = configuration([word for word in paper["r1-1"] if not word.startswith("hydra.")])
    assert (config.method.estimator.rank, config.seed) == (1, 1)  # type: ignore[attr-defined]
    assert tiny or (config.steps, config.model.vocab_size) == (50_000, 50_257)


def test_tables_have_the_last_of_each_run(tmp_path: Path) -> None:
    for name, count in (("exact", 3), ("basis", 2)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        rows = [
            {"step": 10 * i, "val/loss": 5.0 - i, "step_seconds": 0.1 * (i + 1)}
            for i in range(count)
        ]
        text = "\n".join(map(json.dumps, [*rows, {"step": 99, "train/loss": 1.5}]))
        (folder / "metrics.jsonl").write_text(text + "\n")
        status = "finished" if name == "exact" else "interrupted"
        (folder / "summary.json").write_text(json.dumps({"status": status}))
    names = ["exact", "basis", "never"]
    said = write_runs(tmp_path / "runs", names, tmp_path / "out")
    assert said == "2 of 3 runs, 1 finished, steps 99 to 99"
    with (tmp_path / "out/runs.csv").open() as file:
        last = list(csv.DictReader(file))
    assert [row["val/loss"] for row in last] == ["3.0", "4.0"]
    assert [float(row["milliseconds"]) for row in last] == [200.0, 200.0]
    with (tmp_path / "out/curves.csv").open() as file:
        assert list(csv.reader(file))[1:] == [
            ["0", "5.0", "5.0", ""],
            ["10", "4.0", "4.0", ""],
            ["20", "3.0", "", ""],
        ]
    assert (tmp_path / "out/exact/metrics.jsonl").exists()


def test_names_of_methods_are_those_of_files() -> None:
    assert label("method=basis method.rank=64 method.include=['*']") == "basis-64"
    assert label("method=quantized method.budget=1/8") == "quantized-1-8"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_nothing_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_session.main(["--out", str(tmp_path / "out"), "--work", str(tmp_path)]) == 2
    assert "--device cuda: no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path) -> None:
    """All parts, one method of GPT-2 impossible: it is said, and the others are there."""
    data = [word for word in overrides(tmp_path) if word.startswith("data")]
    prepare = [sys.executable, "-m", "data.prepare", *data]
    subprocess.run(
        [*prepare, f"data.cache_dir={tmp_path}/carried/cache"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    text = " ".join(word for word in data if not word.startswith("data.cache_dir"))
    options = ["--device", "cpu", "--size", "tiny", "--minutes", "5", "--jobs", "2"]
    options += ["--carried", f"{tmp_path}/carried", "--work", f"{tmp_path}/work"]
    options += ["--out", f"{tmp_path}/out", "--data", text, "--against", "method=nonsense"]
    command = ["bash", str(REPOSITORY / "scripts/gpu_session.sh"), *options]
    done = run_command(command, tmp_path, PYTHON=sys.executable)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert done.returncode == 1, done.stdout
    parts = {part["part"]: part for part in summary["parts"]}
    assert [part["code"] for part in parts.values()] == [0, 0, 0, 1], summary
    assert list(parts) == ["tests", "bench", "paper", "gpt2"]
    assert "failed: nonsense" in parts["gpt2"]["said"]
    assert "8 passed" in parts["tests"]["said"]
    assert parts["paper"]["said"] == "2 of 2 runs, 2 finished, steps 20 to 20"
    assert (tmp_path / "out/gpt2/exact/metrics.jsonl").exists()
    assert not list((tmp_path / "out").rglob("checkpoints"))
    assert (tmp_path / "out/bench/step.csv").exists()
    assert "| paper |" in (tmp_path / "out/summary.md").read_text()
