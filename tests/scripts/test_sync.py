"""scripts/sync.py: a mirror rebuilt from the run directory says what the run directory says."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from offline_wandb import clean_environment, history, records, segments, summary

from harness.folder.metrics import MetricsLog
from harness.folder.run_id import read_run_file, run_labels
from harness.tracker import TrackerOptions, make_tracker
from scripts.sync import main

pytest.importorskip("wandb")
ROOT = Path(__file__).resolve().parents[2]
CONFIG = "method:\n  name: basis\n  rank: 8\nseed: 1\nlr: 0.0003\nwarmup: null\n"
ROWS = [
    {"step": step, "tokens": 64 * step, "train/loss": 4 - step / 8, "val/loss": 4.5}
    for step in range(5)
]


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A finished run of which no mirror was kept."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    folder = tmp_path / "R=8,seed=1"
    labels = run_labels(method="basis", settings={"R": 8}, seed=1, experiment="rank_sweep")
    tracker = make_tracker(
        TrackerOptions(mode="disabled", project="sketches"),
        run_dir=folder,
        run_id="abc0000001",
        config={},
        group=labels.group,
        job_type=labels.job_type,
        tags=labels.tags,
        name=labels.name,
    )
    with MetricsLog(folder / "metrics.jsonl") as log, tracker:
        for row in ROWS:
            log.log(row)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "summary.json").write_text(
        json.dumps({"status": "finished", "step": 4, "val/loss": 4.5, "memory": {"a": 1}})
    )
    return folder


def test_a_run_is_rebuilt_with_its_id_labels_and_numbers(run_dir, capsys):
    assert main([str(run_dir)]) == 0
    (segment,) = segments(run_dir)
    assert capsys.readouterr().out == f"{run_dir}: 5 rows -> {segment} (id abc0000001)\n"
    assert history(segment) == ROWS
    (run,) = records(segment, "run")
    assert (run["run_id"], run["display_name"]) == ("abc0000001", "basis R=8 seed=1")
    assert (run["run_group"], run["job_type"], run["project"]) == (
        "rank_sweep",
        "basis R=8",
        "sketches",
    )
    seen = summary(segment)
    assert (seen["state"], seen["exit_code"], seen["tags"]) == ("finished", 0, ["basis", "R=8"])
    assert seen["config"] == {
        "method": {"name": "basis", "rank": 8},
        "seed": 1,
        "lr": 0.0003,
        "warmup": None,
    }
    assert seen["summary"]["final/val/loss"] == 4.5
    assert "final/memory" not in seen["summary"]


def test_another_id_and_project_and_a_run_that_was_killed(run_dir, capsys):
    (run_dir / "summary.json").unlink()
    (run_dir / "run.json").unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tok')
    assert main([str(run_dir)]) == 1
    assert segments(run_dir) == []
    assert main([str(run_dir), "--unfinished", "--new-id", "--project", "other"]) == 0
    (segment,) = segments(run_dir)
    seen = summary(segment)
    assert seen["state"] == "failed"
    assert seen["project"] == "other"
    assert seen["name"] == "R=8,seed=1"
    assert len(seen["run_id"]) == 10
    assert seen["summary"]["step"] == 4
    assert read_run_file(run_dir) == {}  # the new id is the mirror's, not the run's
    assert main([str(run_dir), "--unfinished"]) == 0
    identity = read_run_file(run_dir)["id"]
    assert identity != seen["run_id"]
    capsys.readouterr()
    assert main([str(run_dir), "--unfinished"]) == 0
    assert f"wandb/ has 1 part(s) of id {identity} already" in capsys.readouterr().out


def test_a_bad_folder_is_reported_and_the_others_are_done(run_dir, tmp_path, capsys):
    def broken(name: str, **files: str | None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        contents = {"config.yaml": CONFIG, "metrics.jsonl": '{"step": 1}\n', "summary.json": "{}"}
        for file, content in (
            contents | {k.replace("_", "."): v for k, v in files.items()}
        ).items():
            if content is not None:
                (folder / file).write_text(content)
        return folder

    cases = {
        broken("empty", config_yaml=None, metrics_jsonl=None, summary_json=None): (
            "no config.yaml, no metrics.jsonl, no summary.json in this folder"
        ),
        broken(
            "running", summary_json=None
        ): "no summary.json in this folder (an interrupted run? continue it",
        broken(
            "torn", metrics_jsonl='{"step": 1}\n{"ste\n{"step": 3}\n'
        ): "metrics.jsonl, line 2: not readable",
        broken("yaml", config_yaml="a: [1"): "expected ',' or ']'",
        broken("list", summary_json="[]"): "summary.json: not a JSON object",
        broken("name", run_json='{"tags": [""]}'): "tracker.tags[0]=''",
    }
    assert main([*map(str, cases), str(tmp_path / "absent"), str(run_dir)]) == 1
    output = capsys.readouterr()
    for folder, message in cases.items():
        assert f"{folder}: " in output.err
        assert message in output.err
        assert segments(folder) == []
    assert f"{tmp_path / 'absent'}: no config.yaml" in output.err
    assert "7 of 8 folders not done" in output.err
    assert f"{run_dir}: 5 rows -> " in output.out
    assert len(segments(run_dir)) == 1


def test_a_folder_of_another_user_is_reported_and_the_others_are_done(
    run_dir, tmp_path, monkeypatch, capsys
):
    private, looked_at = tmp_path / "private", Path.is_file

    def is_file(path: Path) -> bool:
        if path.parent == private:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return looked_at(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert main([str(private), str(run_dir)]) == 1
    output = capsys.readouterr()
    assert f"{private}: [Errno 13] Permission denied: '{private / 'config.yaml'}'" in output.err
    assert f"{run_dir}: 5 rows -> " in output.out


def test_nothing_of_a_folder_is_carried_out(run_dir, monkeypatch, capsys):
    """What a config.yaml says of the environment, or of classes, stays the letters that it is."""
    monkeypatch.setenv("SECRET_TOKEN", "s3cr3t-of-the-environment")
    with (run_dir / "config.yaml").open("a") as file:
        file.write("note: ${oc.env:SECRET_TOKEN}\nmade: {_target_: os.getcwd}\n")
    assert main([str(run_dir)]) == 0
    (segment,) = segments(run_dir)
    config = summary(segment)["config"]
    assert config["note"] == "${oc.env:SECRET_TOKEN}"
    assert config["made"] == {"_target_": "os.getcwd"}
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert not [path for path in files if b"s3cr3t-of" in path.read_bytes()]
    assert "s3cr3t-of" not in str(capsys.readouterr())


@pytest.mark.slow
def test_the_command_line(run_dir):
    done = subprocess.run(
        [sys.executable, "scripts/sync.py", str(run_dir), "--mode", "offline"],
        cwd=ROOT,
        env=clean_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert f"{run_dir}: 5 rows -> " in done.stdout
    refused = subprocess.run(
        [sys.executable, "scripts/sync.py", str(run_dir), "--mode", "disabled"],
        cwd=ROOT,
        env=clean_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2
    assert "--mode" in refused.stderr
