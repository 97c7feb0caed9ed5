"""A run that is interrupted, or given again: it goes on to the last bit, or says why it can't."""

import errno
import json
import logging
import signal
import subprocess
import time
from pathlib import Path

import pytest
from filelock import FileLock
from hydra.errors import CompactHydraException
from tiny import command, losses, rewrite_config, run_command, train_here

from harness.folder import rundir
from harness.folder.checkpoint import Checkpoints
from harness.run import Run

METHODS = {
    "exact": ["method=exact"],
    "basis": ["method=basis", "method.rank=3"],
    "adaptive rank": [
        *("method=subspace", "method.rank=2", "adaptive_rank.every=50"),
        *(
            "adaptive_rank.low=0.4",
            "adaptive_rank.high=0.401",
            "adaptive_rank.patience=1",
        ),  # no rank is left alone for long
    ],
}


LEARNING = {
    "transform": ["method=transform", "method.every=3"],
    "transform, a budget by error": [
        "method=transform",
        "method.every=3",
        "method.budget=1/8",
        "method.allocation=variance",
    ],
    "subspace": ["method=subspace", "method.rank=3", "method.every=3"],
    "ema_sketch": ["method=ema_sketch", "method.rank=3"],
}
"""Methods whose layers hold what they have learned, with looks before and after the interruption.
"""


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < end, "the run never got there"
        time.sleep(0.01)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.slow
def test_killed_and_resumed_equals_straight_to_the_last_bit(
    method: str, data: Path, tmp_path: Path
) -> None:
    options = [
        *METHODS[method],
        "steps=600",
        "eval.every=40",
        # not a multiple of log.every: losses not yet logged are part of the checkpoint
        "checkpoint.every=30",
        "log.every=7",
        "model.dropout=0.1",  # so that the generator's state matters
        "tokens_per_step=32",
        "optim=adamw",
    ]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train_here(data, straight, *options)
    arguments = command(data, *options, f"hydra.run.dir={killed}")
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(list(killed.glob("checkpoints/step_*"))) >= 2, process)
    process.kill()
    process.wait()
    steps = Checkpoints(killed / "checkpoints").steps()
    assert steps[-1] < 600
    done = run_command(arguments, tmp_path)
    assert done.returncode == 0, done.stdout
    assert "continuing from step" in done.stdout
    assert losses(killed) == losses(straight)


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=pytest.mark.slow) if "budget" in name else name for name in LEARNING],
)
def test_what_layers_have_learned_is_resumed_to_the_last_bit(
    method: str, data: Path, tmp_path: Path
) -> None:
    """Directions, their variances, the bits of each, averages of sketches: without them the next
    gradients are others.
    """
    options = [*LEARNING[method], "micro_batch_size=8", "tokens_per_step=128"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train_here(data, straight, *options, "steps=28")
    for steps in (20, 28):
        train_here(data, resumed, *options, f"steps={steps}")
    assert losses(resumed) == losses(straight)


def test_a_budget_divided_by_the_error_of_dw_is_kept_told_and_resumed(
    data: Path, tmp_path: Path
) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    options = [
        "method=subspace",
        "method.budget=1/4",
        "method.include=[blocks.*]",
        "micro_batch_size=8",
    ]
    train_here(data, tmp_path / "uniform", *options)
    options.append("method.allocation=variance")
    for folder, steps in ((straight, 20), (run, 10), (run, 20)):
        train_here(data, folder, *options, f"steps={steps}")
    assert losses(run)[-1] == losses(straight)[-1]
    knobs = rundir.read_summary(straight)["knobs"]
    assert sorted(knobs) == [
        "blocks.0.attn.proj",
        "blocks.0.attn.qkv",
        "blocks.0.mlp.fc",
        "blocks.0.mlp.proj",
    ]
    assert (
        len({knobs[name] for name in knobs if name != "blocks.0.mlp.proj"}) > 1
    )  # of equal width, yet not of equal rank
    kept, uniform = (
        losses(folder)[0]["mem/saved_bytes/sketches"] for folder in (straight, tmp_path / "uniform")
    )
    assert 0.85 * uniform < kept <= 1.15 * uniform  # each layer rounds its rank down
    assert (
        losses(straight)[0]["val/loss"] == losses(tmp_path / "uniform")[0]["val/loss"]
    )  # weights are those of the seed


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["steps=700", "checkpoint.every=0", "eval.every=0", "log.every=10"]
    arguments = command(data, *options, f"hydra.run.dir={run}")
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "the same command continues" in output
    (step,) = Checkpoints(run / "checkpoints").steps()
    assert 0 < step < 700
    summary = rundir.read_summary(run)
    assert (summary["status"], summary["step"]) == ("interrupted", step)
    train_here(data, run, *options)
    assert rundir.read_summary(run)["status"] == "finished"
    train_here(data, tmp_path / "straight", *options)
    assert losses(run) == losses(tmp_path / "straight")


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight, damaged = tmp_path / "straight", tmp_path / "damaged"
    train_here(data, straight, "steps=30")
    train_here(data, damaged, "steps=20")
    file = damaged / "checkpoints" / "step_00000020" / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.INFO):
        train_here(
            data, damaged, "steps=30"
        )  # more steps at a constant rate: the same run, further
    assert "step_00000020" in caplog.text
    assert "SHA-256" in caplog.text
    assert "continuing from step 10" in caplog.text
    assert losses(damaged) == losses(straight)


def test_a_changed_configuration_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CompactHydraException) as refusal:
        train_here(data, tmp_path, "optim.lr=0.5", "method.rank=7")
    assert "optim.lr: 0.01 -> 0.5" in str(refusal.value)
    assert "method.rank: 32 -> 7" in str(refusal.value)
    with pytest.raises(CompactHydraException, match=r"steps: 20 -> 10"):
        train_here(data, tmp_path, "steps=10", "checkpoint.keep=3")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # Options that do not change what is computed may differ.
    train_here(data, tmp_path, "steps=24", "checkpoint.keep=3", "log.every=2")
    assert rundir.read_summary(tmp_path)["step"] == 24


def test_more_steps_are_another_run_where_the_rate_depends_on_their_number(
    data: Path, tmp_path: Path
) -> None:
    train_here(data, tmp_path, "optim.schedule=cosine")
    with pytest.raises(CompactHydraException, match=r"steps: 20 -> 30"):
        train_here(data, tmp_path, "optim.schedule=cosine", "steps=30")


def test_changed_data_is_refused_on_resume(data: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("one two three four five six seven\n" * 400)
    train_here(data, tmp_path / "run", f"data.path={text}")
    text.write_text("seven six five four three two one\n" * 400)
    with pytest.raises(CompactHydraException, match="not those that the run"):
        train_here(data, tmp_path / "run", f"data.path={text}", "steps=30")


def test_a_finished_run_is_skipped(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_here(data, tmp_path)
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        train_here(data, tmp_path)
    assert "is finished (step 20" in caplog.text
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_of_a_version_with_fewer_options_is_continued(data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path, "steps=10")
    config = rundir.read_config(tmp_path)
    del config["activations"], config["diagnostics"]
    rewrite_config(tmp_path, config)
    train_here(data, tmp_path, "steps=20")
    with pytest.raises(CompactHydraException, match=r"activations\.name: plain -> lean"):
        train_here(data, tmp_path, "steps=20", "activations=lean")


def test_two_processes_do_not_share_a_run(data: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(CompactHydraException, match="another process"),
    ):
        train_here(data, tmp_path / "run")
    train_here(data, tmp_path / "run")


def test_nothing_of_a_run_is_read_before_it_is_held(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same command twice: while the second waits before its lock, the first finishes. What the
    second had read before would begin the finished run again.
    """
    run = tmp_path / "run"
    seen: list[dict[Path, bytes]] = []

    def waits(path: Path) -> FileLock:
        with monkeypatch.context() as first:
            first.setattr("harness.set_up.FileLock", FileLock)
            train_here(data, run)
        seen.append({p: p.read_bytes() for p in run.rglob("*") if p.is_file()})
        return FileLock(path)

    monkeypatch.setattr("harness.set_up.FileLock", waits)
    with caplog.at_level(logging.INFO):
        train_here(data, run)
    assert "is finished (step 20" in caplog.text
    assert [{p: p.read_bytes() for p in run.rglob("*") if p.is_file()}] == seen


def test_a_run_that_did_not_begin_leaves_no_lock_among_the_users_files(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CompactHydraException, match="no such file"):
        train_here(data, tmp_path, f"data.path={tmp_path / 'absent.txt'}")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_finished_run_on_a_disk_for_reading_is_told_and_goes_no_further(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train_here(data, tmp_path)

    def read_only(self: FileLock, **_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / ".lock"))

    monkeypatch.setattr(FileLock, "acquire", read_only)
    with caplog.at_level(logging.INFO):
        train_here(data, tmp_path)
    assert "is finished (step 20" in caplog.text
    with pytest.raises(CompactHydraException, match="may not be written"):
        train_here(data, tmp_path, "steps=30")


def test_a_continued_run_that_is_killed_is_not_taken_for_finished(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(data, tmp_path)
    seen: list[str] = []
    original = Run.micro_batch_loss
    monkeypatch.setattr(
        Run,
        "micro_batch_loss",
        lambda self, step, i: (
            seen.append(rundir.read_summary(tmp_path)["status"]),
            original(self, step, i),
        )[1],
    )
    train_here(data, tmp_path, "steps=24")
    assert set(seen) == {"running"}
    assert rundir.read_summary(tmp_path)["status"] == "finished"


def test_a_checkpoint_carries_the_loss_of_its_own_weights_only(data: Path, tmp_path: Path) -> None:
    train_here(
        data,
        tmp_path,
        "checkpoint.every=7",
        "checkpoint.keep=9",
        "eval.every=10",
        "checkpoint.best=true",
    )
    evaluated = {row["step"]: row["val/loss"] for row in losses(tmp_path) if "val/loss" in row}
    found = Checkpoints(tmp_path / "checkpoints", keep=9)
    manifests = {
        step: json.loads(
            (tmp_path / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text()
        )["val_loss"]
        for step in found.steps()
    }
    assert {7, 14, 20} <= manifests.keys()
    assert all(loss == evaluated.get(step) for step, loss in manifests.items())


def test_a_resumed_run_must_compute_the_same_way(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(data, tmp_path, "compile=null")
    from harness.device import Runtime

    monkeypatch.setattr(
        Runtime,
        "describe",
        lambda self: {"device": "cuda", "precision": "float32", "compile": True},
    )
    with pytest.raises(CompactHydraException, match="device: cpu -> cuda; compile: False -> True"):
        train_here(data, tmp_path, "compile=null", "steps=30")


def test_a_run_with_the_noise_of_another_version_is_not_continued(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("basis", "exact"):
        folder = tmp_path / method
        with monkeypatch.context() as older:
            older.setattr("harness.saving.NOISE_VERSION", 2)
            train_here(data, folder, f"method={method}", "steps=10")
        if method == "exact":  # which has none
            train_here(data, folder, f"method={method}", "steps=20")
            continue
        with pytest.raises(CompactHydraException, match="noise was drawn by another version"):
            train_here(data, folder, f"method={method}", "steps=20")
