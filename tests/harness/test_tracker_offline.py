"""The tracker offline: the mirror says what metrics.jsonl says, nothing reaches for the network,
each run has its own end.
"""

import contextlib
import math
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from offline_wandb import clean_environment, history, records, segments, summary

from harness.folder.run_id import read_run_file, run_id, run_labels
from harness.tracker import TrackerOptions, make_tracker

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def wandb_offline(monkeypatch):
    """wandb, installed, and none of a user's WANDB_ settings (the handle of this process's helper
    must stay).
    """
    wandb = pytest.importorskip("wandb")
    for name in os.environ:
        if name.startswith("WANDB_") and name != "WANDB_SERVICE":
            monkeypatch.delenv(name)
    return wandb


def test_what_is_logged_offline_is_what_wandb_wrote(tmp_path, wandb_offline, capfd):
    config = {"method": {"name": "basis", "rank": 32}, "seed": 0, "model": {"n_layer": 2}}
    labels = run_labels(method="basis", settings={"R": 32}, seed=0, experiment="rank_sweep")
    rows = [
        {"step": 0, "tokens": 0, "val/loss": 5.0, "mem/peak_bytes": 900},
        {"step": 1, "tokens": 64, "train/loss": 4.0, "mem/peak_bytes": 2000},
        {"step": 2, "tokens": 128, "train/loss": math.nan, "val/loss": 3.0, "mem/peak_bytes": 1000},
        {"step": 1, "tokens": 64, "train/loss": 4.25, "val/loss": 4.5},  # resumed: a step again
    ]
    tracker = make_tracker(
        TrackerOptions(tags=["try", "basis"], group=None),
        run_dir=tmp_path,
        run_id="abc0000001",
        config=config,
        group=labels.group,
        job_type=labels.job_type,
        tags=labels.tags,
        name=labels.name,
    )
    with tracker:
        for row in rows:
            tracker.log(row)
        tracker.summary(
            {
                "val/loss": math.inf,
                "seconds": 12.5,
                "status": "finished",
                "versions": {"torch": "2"},
            }
        )
    tracker.finish(1)  # too late to change anything
    assert capfd.readouterr() == ("", "")  # never in the way

    (segment,) = segments(tmp_path)
    assert segment == tracker.folder
    assert segment.name.startswith("offline-run-")
    assert segment.name.endswith("-abc0000001")
    assert history(segment) == [row | {k: "NaN" for k, v in row.items() if v != v} for row in rows]
    (run,) = records(segment, "run")
    assert run["run_id"] == "abc0000001"
    assert run["display_name"] == "basis R=32 seed=0"
    assert run["run_group"] == "rank_sweep"
    assert run["job_type"] == "basis R=32"
    assert run["project"] == "basis"
    assert run["resume"] is True
    axes = {
        metric.get("glob_name", metric.get("name")): metric["step_metric"]
        for metric in records(segment, "metric")
    }
    assert axes["*"] == axes["val/loss"] == "step"
    assert set(axes.values()) == {"step"}
    hidden = {
        metric.get("glob_name", metric.get("name")): metric.get("options", {})
        for metric in records(segment, "metric")
    }
    assert {name for name, options in hidden.items() if options.get("hidden")} == {
        *("mem/*", "lr", "tokens"),
        *("mem/peak_bytes", "mem/saved_bytes"),
    }
    seen = summary(segment)
    assert (seen["state"], seen["exit_code"]) == ("finished", 0)
    assert seen["tags"] == ["basis", "R=32", "try"]
    assert seen["config"] == config
    values = {name: value for name, value in seen["summary"].items() if not name.startswith("_")}
    assert values == {
        "step": 1,
        "tokens": 64,
        "train/loss": 4.25,
        "val/loss": {"min": 3, "last": 4.5},
        "mem/peak_bytes": {"max": 2000},
        "final/val/loss": "Infinity",
        "final/seconds": 12.5,
        "final/status": "finished",
    }
    assert read_run_file(tmp_path) == {
        "id": "abc0000001",
        "project": "basis",
        "entity": None,
        "name": "basis R=32 seed=0",
        "group": "rank_sweep",
        "job_type": "basis R=32",
        "tags": ["basis", "R=32", "try"],
    }


def test_options_win_over_what_the_run_would_choose(tmp_path):
    options = TrackerOptions(
        mode="disabled", group="mine", name="this one", project="p", entity="e"
    )
    make_tracker(
        options,
        run_dir=tmp_path,
        run_id="a1",
        config={},
        group="experiment",
        name="basis",
        tags=["x"],
    )
    assert read_run_file(tmp_path) == {
        "id": "a1",
        "project": "p",
        "entity": "e",
        "name": "this one",
        "group": "mine",
        "job_type": "train",
        "tags": ["x"],
    }


@pytest.mark.slow
def test_two_runs_in_one_process_and_one_of_them_continued(tmp_path, wandb_offline):
    """As in a multirun whose first job fails and is started again by the same command."""
    ends = []
    for name, error in (("a", RuntimeError), ("b", None), ("a", KeyboardInterrupt)):
        folder = tmp_path / name
        tracker = make_tracker(
            TrackerOptions(), run_dir=folder, run_id=run_id(folder), config={"job": name}
        )
        with contextlib.ExitStack() as stack:
            if error:
                stack.enter_context(pytest.raises(error))
            stack.enter_context(tracker)
            tracker.log({"step": len(ends)})
            if error:
                raise error
        ends.append((name, tracker.folder))
    assert run_id(tmp_path / "a") != run_id(tmp_path / "b")
    assert [path for name, path in ends if name == "a"] == segments(tmp_path / "a")
    assert [path for name, path in ends if name == "b"] == segments(tmp_path / "b")
    seen = [summary(path) for _, path in ends]
    assert [s["run_id"] for s in seen] == [run_id(tmp_path / name) for name, _ in ends]
    assert [s["exit_code"] for s in seen] == [1, 0, 130]
    assert [s["config"] for s in seen] == [{"job": name} for name, _ in ends]
    assert [s["summary"]["step"] for s in seen] == [0, 1, 2]


def test_a_run_left_unfinished_does_not_swallow_the_next(tmp_path, wandb_offline):
    first = make_tracker(TrackerOptions(), run_dir=tmp_path / "a", run_id="first00001", config={})
    first.log({"step": 1})
    second = make_tracker(TrackerOptions(), run_dir=tmp_path / "b", run_id="second0001", config={})
    with second:
        second.log({"step": 2})
    assert [path.name[-10:] for path in segments(tmp_path / "a")] == ["first00001"]
    (segment,) = segments(tmp_path / "b")
    assert summary(segment)["run_id"] == "second0001"
    first.finish()


NETWORK = """
import sys
from pathlib import Path
from harness.tracker import TrackerOptions, make_tracker

options = TrackerOptions(mode=sys.argv[1])
with make_tracker(options, run_dir=Path(sys.argv[2]), run_id="net0000001", config={}) as tracker:
    tracker.log({"step": 1, "train/loss": 2.0})
print("done")
"""


@pytest.mark.parametrize("telemetry", [False, True])
@pytest.mark.slow
def test_offline_makes_no_attempt_to_reach_the_network(tmp_path, wandb_offline, telemetry):
    """All of wandb's traffic is sent to a proxy that only counts. With the telemetry left on, the
    count is not 0.
    """
    attempts = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def count() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # shut down
                    return
                with connection, contextlib.suppress(OSError):
                    attempts.append("somebody")
                    attempts[-1] = connection.recv(4096).split(b"\r\n")[0].decode()

        counter = threading.Thread(target=count)
        counter.start()
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        proxies = dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], proxy)
        extra = {"WANDB_ERROR_REPORTING": "true"} if telemetry else {}
        done = subprocess.run(
            [sys.executable, "-c", NETWORK, "offline", str(tmp_path)],
            cwd=ROOT,
            env=clean_environment(**proxies, **extra, no_proxy="", NO_PROXY="", HOME=str(tmp_path)),
            capture_output=True,
            text=True,
            timeout=60,
        )
        server.shutdown(socket.SHUT_RDWR)
    counter.join()
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert bool(attempts) == telemetry, attempts
    assert len(segments(tmp_path)) == 1


@pytest.mark.slow
def test_online_without_a_key_says_what_to_do(tmp_path, wandb_offline):
    done = subprocess.run(
        [sys.executable, "-c", NETWORK, "online", str(tmp_path)],
        cwd=ROOT,
        env=clean_environment(HOME=str(tmp_path), WANDB_ERROR_REPORTING="false"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "ValueError: tracker.mode='online': " in done.stderr
    assert "set tracker.mode=offline and upload later" in done.stderr
