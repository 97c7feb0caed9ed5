"""The tracker: its options and labels, a run's identity, exit codes, and life without wandb."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import tracker
from harness.folder.run_id import Labels, new_run_id, read_run_file, run_id, run_labels
from harness.tracker import (
    Tracker,
    TrackerOptions,
    WandbTracker,
    exit_code_of,
    make_tracker,
    require_wandb,
)

ROOT = Path(__file__).resolve().parents[2]


# --- options, labels, identity
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "foo"}, r"tracker\.mode='foo': must be one of online, offline, disabled"),
        ({"mode": ""}, r"tracker\.mode=''"),
        ({"project": "a/b"}, r"tracker\.project='a/b': must be 1 to 128 characters, none of"),
        ({"project": ""}, r"tracker\.project=''"),
        ({"tags": ["ok", ""]}, r"tracker\.tags\[1\]='': must be 1 to 64 characters"),
        ({"tags": ["x" * 65]}, r"tracker\.tags\[0\]='x+'"),
    ],
)
def test_options_that_wandb_would_refuse_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        TrackerOptions(**options)


def test_options_are_a_structured_config():
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.structured(TrackerOptions)
    assert config.mode == "offline"
    merged = omegaconf.OmegaConf.merge(config, {"group": "sweep", "tags": ["a"]})
    options = omegaconf.OmegaConf.to_object(merged)
    assert options == TrackerOptions(group="sweep", tags=["a"])
    assert type(options.tags) is list
    with pytest.raises(ValueError, match=r"tracker\.mode='on'"):
        omegaconf.OmegaConf.to_object(omegaconf.OmegaConf.merge(config, {"mode": "on"}))


def test_labels_of_a_sweep():
    assert run_labels(
        method="basis", settings={"R": 32}, seed=0, experiment="rank_sweep"
    ) == Labels(
        name="basis R=32 seed=0", group="rank_sweep", job_type="basis R=32", tags=["basis", "R=32"]
    )
    assert run_labels(method="exact", settings={"R": None}, seed=3) == Labels(
        "exact seed=3", None, "exact", ["exact"]
    )
    mixed = run_labels(
        method="vjp",
        settings={"keep": 0.1 + 0.2, "scope": "x" * 63},
        seed=1,
        job_type="bench",
        tags=["basis", "vjp"],
    )
    assert mixed.name == f"vjp keep=0.3 scope={'x' * 63} seed=1"
    assert mixed.tags == ["vjp", "keep=0.3", "basis"]  # too long for a tag; no tag twice
    assert mixed.job_type == "bench"


def test_the_run_id_is_drawn_once_and_kept(tmp_path):
    first = run_id(tmp_path / "runs" / "a")
    assert first.isascii()
    assert first.isalnum()
    assert first[0].isalpha()
    assert len(first) == 10
    assert run_id(tmp_path / "runs" / "a") == first
    assert json.loads((tmp_path / "runs" / "a" / "run.json").read_text()) == {"id": first}
    assert len({new_run_id() for _ in range(100)}) == 100


def test_a_run_file_of_somebody_else(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "x"}')
    drawn = run_id(tmp_path)
    assert read_run_file(tmp_path) == {"status": "x", "id": drawn}
    for content, message in (
        ('{"id": "a/b"}', "'a/b' must be"),
        ("[]", "not a JSON object"),
        ("{", "not readable"),
    ):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            run_id(tmp_path)
        assert str(tmp_path / "run.json") in str(caught.value)


def test_a_sweep_agent_brings_the_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert run_id(tmp_path / "a") != "abc123"  # a leftover, no sweep
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    assert run_id(tmp_path / "b") == "abc123"
    monkeypatch.setenv("WANDB_RUN_ID", "other")
    assert run_id(tmp_path / "b") == "abc123"


def test_exit_codes():
    cases = [
        (None, 0),
        (ValueError("x"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(), 0),
        (SystemExit(0), 0),
        (SystemExit(143), 143),
        (SystemExit("message"), 1),
    ]
    for error, code in cases:
        assert exit_code_of(error) == code


# --- disabled
# ------------------------------------------------------------------------------------------

WITHOUT_WANDB = """
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] != "wandb", "wandb was looked for"

sys.meta_path.insert(0, Blocker())
from harness.tracker import TrackerOptions, make_tracker

options = TrackerOptions(mode=sys.argv[1])
with make_tracker(options, run_dir=Path(sys.argv[2]), run_id="a1", config={}) as tracker:
    tracker.log({"step": 1, "train/loss": 2.0})
    tracker.summary({"val/loss": 2.0})
    assert tracker.url is None and tracker.folder is None
assert not [name for name in sys.modules if name.split(".")[0] == "wandb"]
print("done")
"""


@pytest.mark.parametrize("mode", ["disabled", pytest.param("offline", marks=pytest.mark.slow)])
def test_only_disabled_never_looks_for_wandb(tmp_path, mode):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_WANDB, mode, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if mode == "disabled":
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    else:
        assert "AssertionError: wandb was looked for" in done.stderr


class Nowhere:
    """A finder of modules that finds none."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        return None


def test_a_missing_wandb_is_an_error_that_names_the_option(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "modules", {k: v for k, v in sys.modules.items() if k.split(".")[0] != "wandb"}
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys, "meta_path", [Nowhere])
        for mode in ("offline", "online"):
            with pytest.raises(
                ValueError, match=rf"tracker\.mode='{mode}': wandb is not installed"
            ):
                make_tracker(TrackerOptions(mode=mode), run_dir=tmp_path, run_id="a1", config={})
        require_wandb("disabled")
    # A folder with the runs of a wandb that is gone looks like a package to Python.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="wandb is not installed"):
        require_wandb("offline")


def test_the_disabled_tracker_accepts_everything(tmp_path):
    tracker = Tracker()
    with tracker as entered:
        assert entered is tracker
        tracker.log({"step": 1})
        tracker.finish(3)
        tracker.finish()


def test_a_mirror_that_fails_says_so_once_and_is_left_alone(tmp_path, caplog, monkeypatch):
    asked = []

    def fail(*_, **__):
        asked.append("asked")
        raise ConnectionResetError("gone")

    run = SimpleNamespace(
        dir=tmp_path / "wandb" / "run-1" / "files",
        define_metric=lambda *_, **__: None,
        log=fail,
        summary=SimpleNamespace(update=fail),
        finish=fail,
    )
    monkeypatch.setattr(tracker, "_leave_helper", lambda: None)
    with WandbTracker(run, online=False) as mirror:
        mirror.log({"step": 1})
        mirror.log({"step": 2})
        mirror.summary({"val/loss": 1.0})
    assert asked == ["asked"]
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("the tracker has failed (ConnectionResetError: gone), the run goes on")
    assert f"scripts/sync.py {tmp_path} " in said
