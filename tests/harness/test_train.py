"""train.py as its users meet it: what it writes, what methods share, what diagnostics see, how it
fails.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hydra.errors import CompactHydraException
from tiny import REPOSITORY, command, losses, run_command, train_here

from harness.folder import rundir
from harness.folder.checkpoint import Checkpoints
from harness.run import Run

METHODS = {"exact": ["method=exact"], "basis": ["method=basis", "method.rank=3"]}


def test_a_run_leaves_its_evidence(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_here(data, run, "seed=3")
    rows = losses(run)
    assert [row["step"] for row in rows] == [0, 4, 8, 10, 12, 16, 20]
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 10, 20]
    assert rows[-1]["tokens"] == 20 * 16
    assert rows[-1]["train/loss"] < rows[1]["train/loss"]
    assert rows[0]["mem/saved_bytes"] == sum(
        v for k, v in rows[0].items() if k.startswith("mem/saved_bytes/")
    )
    assert rows[0]["mem/saved_bytes/sketches"] > 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["step"] == 20
    assert summary["val/loss"] == rows[-1]["val/loss"]
    assert summary["sketched_layers"] == ["blocks.0.mlp.fc", "blocks.0.mlp.proj", "head"]
    assert {"command", "commit", "machine", "versions", "run_id", "data"} <= summary.keys()
    assert json.loads((run / "run.json").read_text())["id"] == summary["run_id"]
    config = rundir.read_config(run)
    assert (config["seed"], config["method"]["rank"], config["method"]["shrinkage"]) == (
        3,
        32,
        0.01,
    )
    assert Checkpoints(run / "checkpoints").steps() == [10, 20]


def test_a_checkpoint_is_a_plain_model(data: Path, tmp_path: Path) -> None:
    from models import GPT, GPTConfig

    train_here(data, tmp_path)
    loaded = Checkpoints(tmp_path / "checkpoints").load_latest()
    model = GPT(GPTConfig(**loaded.state["config"]["model"]))
    model.load_state_dict(loaded.state["model"])
    assert model.config.vocab_size > 10  # filled in from the data


def test_methods_share_weights_data_and_validation_set(data: Path, tmp_path: Path) -> None:
    for name, options in METHODS.items():
        train_here(data, tmp_path / name, *options)
    exact, basis = (losses(tmp_path / name) for name in METHODS)
    assert exact[0]["val/loss"] == basis[0]["val/loss"]
    assert exact[-1]["val/loss"] != basis[-1]["val/loss"]
    summaries = [rundir.read_summary(tmp_path / name) for name in METHODS]
    assert summaries[0]["data"] == summaries[1]["data"]


@pytest.mark.parametrize(
    "method", sorted(path.stem for path in (REPOSITORY / "conf" / "method").glob("*.yaml"))
)
def test_every_method_trains_by_its_name_alone(method: str, data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path / "run", f"method={method}", "steps=8", "micro_batch_size=4")
    summary = rundir.read_summary(tmp_path / "run")
    assert (summary["status"], summary["method"]) == ("finished", method)
    first, *_, last = losses(tmp_path / "run")
    if (
        method != "zeroth_order"
    ):  # which wants far smaller steps, and many: tests/test_zeroth_order.py
        assert last["val/loss"] < first["val/loss"]


def test_rank_of_all_rows_without_shrinkage_is_exact(data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path / "exact", "method=exact")
    train_here(data, tmp_path / "full", "method=basis", "method.rank=16", "method.shrinkage=0")
    for a, b in zip(losses(tmp_path / "exact"), losses(tmp_path / "full"), strict=True):
        assert a.get("train/loss", 0) == pytest.approx(b.get("train/loss", 0), rel=1e-4)


def test_accumulation_equals_one_large_batch(data: Path, tmp_path: Path) -> None:
    base = ["method=exact", "tokens_per_step=64"]
    train_here(data, tmp_path / "one", *base, "micro_batch_size=4")
    train_here(data, tmp_path / "four", *base, "micro_batch_size=1")
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "four"), strict=True):
        for metric in ("train/loss", "val/loss", "grad_norm"):
            assert a.get(metric, 0) == pytest.approx(b.get(metric, 0), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(data, tmp_path, "steps=10")
    good = Checkpoints(tmp_path / "checkpoints").load_latest()
    original = Run.micro_batch_loss  # from step 13 on the loss is made infinite
    monkeypatch.setattr(
        Run,
        "micro_batch_loss",
        lambda self, step, i: original(self, step, i) * (1.0 if step < 12 else math.inf),
    )
    with pytest.raises(CompactHydraException) as failure:
        train_here(data, tmp_path, "steps=20")
    assert "step 13: the training loss is inf (method basis" in str(failure.value)
    assert "the last checkpoint is of step 10" in str(failure.value)
    summary = rundir.read_summary(tmp_path)
    assert summary["status"] == "diverged"
    assert summary["diverged_at"] == 13
    with pytest.raises(
        CompactHydraException, match="holds a run that diverged: step 13"
    ):  # at once, without a step
        train_here(data, tmp_path, "steps=20")
    kept = Checkpoints(tmp_path / "checkpoints").load_latest()
    assert kept.step == 10
    assert all(torch.equal(kept.state["model"][k], v) for k, v in good.state["model"].items())


@pytest.mark.slow
def test_a_divergent_learning_rate_fails_with_exit_code_1(data: Path, tmp_path: Path) -> None:
    done = run_command(
        command(data, "optim.lr=1e20", "method=exact", f"hydra.run.dir={tmp_path / 'run'}"),
        tmp_path,
    )
    assert done.returncode == 1, done.stdout
    assert "method exact, optim.lr=1e+20" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_offline_mirror_holds_the_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_command(command(data, "tracker.mode=offline", f"hydra.run.dir={run}"), tmp_path)
    assert done.returncode == 0, done.stdout
    identity = json.loads((run / "run.json").read_text())
    assert (identity["group"], identity["name"]) == ("default", "basis R=32 seed=0")
    assert {"basis", "R=32"} <= set(identity["tags"])
    (segment,) = (run / "wandb").glob(f"offline-run-*-{identity['id']}")
    assert (segment / f"run-{identity['id']}.wandb").stat().st_size > 1000


@pytest.mark.parametrize(
    "more",
    [[], ["tokens_per_step=32", "model.dropout=0.1"]],
    ids=["plain", "accumulation and dropout"],
)
def test_diagnostics_change_nothing_and_see_the_gradients(
    data: Path, tmp_path: Path, more: list[str]
) -> None:
    options = ["method.rank=3", "checkpoint.every=10", *more]
    train_here(data, tmp_path / "without", *options)
    train_here(data, tmp_path / "with", *options, "diagnostics.every=5", "diagnostics.masks=3")
    rows = losses(tmp_path / "with")
    looks = [{k: row.pop(k) for k in list(row) if k.startswith("sketch/")} for row in rows]
    assert [row["step"] for row, look in zip(rows, looks, strict=True) if look] == [5, 10, 15, 20]
    assert [row for row in rows if len(row) > 2] == losses(tmp_path / "without")
    weights = [
        Checkpoints(tmp_path / name / "checkpoints").load_latest().state["model"]
        for name in ("with", "without")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    last = looks[-1]
    layers = ("blocks.0.mlp.fc", "blocks.0.mlp.proj", "head", "all")
    metrics = ("relative_error", "cosine", "norm_ratio", "bias", "variance")
    assert list(last) == [f"sketch/{layer}/{metric}" for layer in layers for metric in metrics]
    assert 0 < last["sketch/all/cosine"] < 1


MONITORED = {
    "exact": ["method=exact"],
    "basis, accumulation, dropout": ["method.rank=3", "tokens_per_step=32", "model.dropout=0.1"],
    "checkpointed, tied": [
        "method.rank=3",
        "activations=checkpoint",
        "model.tie_head=true",
        "optim.grad_clip=0.5",
    ],
    "bfloat16": ["method.rank=3", "precision=bfloat16"],
    "lean, learning": [
        "method=subspace",
        "method.rank=4",
        "method.include=['*']",
        "activations=lean",
    ],
}


@pytest.mark.parametrize("more", MONITORED.values(), ids=MONITORED)
def test_the_monitor_changes_nothing_and_sees_every_dense_layer(
    data: Path, tmp_path: Path, more: list[str]
) -> None:
    train_here(data, tmp_path / "without", *more)
    train_here(data, tmp_path / "with", *more, "diagnostics.monitor=true")
    rows = losses(tmp_path / "with")
    seen = [{k: row.pop(k) for k in list(row) if k.startswith("monitor/")} for row in rows]
    assert rows == losses(tmp_path / "without")
    assert [row["step"] for row, looked in zip(rows, seen, strict=True) if looked] == [
        4,
        8,
        12,
        16,
        20,
    ]
    weights = [
        Checkpoints(tmp_path / name / "checkpoints").load_latest().state["model"]
        for name in ("with", "without")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    layers = [
        *(f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")),
        "head",
    ]
    metrics = ["activation_energy", "gradient_norm", "stable_rank", "drift"]
    assert set(seen[-1]) == {f"monitor/{layer}/{metric}" for layer in layers for metric in metrics}
    assert all(math.isfinite(value) and value >= 0 for looked in seen for value in looked.values())
    if "method=exact" in more:  # of all gradients, embeddings' and vectors' too
        for row, looked in zip(rows, seen, strict=True):
            if looked:
                total = math.sqrt(
                    sum(looked[f"monitor/{layer}/gradient_norm"] ** 2 for layer in layers)
                )
                assert total == pytest.approx(row["grad_norm"], rel=0.5)


def test_the_monitor_goes_on_where_a_run_stopped_and_holds_no_more_after_more_steps(
    data: Path, tmp_path: Path
) -> None:
    options = ["diagnostics.monitor=true", "checkpoint.every=6", "checkpoint.keep=9", "log.every=3"]
    train_here(data, tmp_path / "straight", *options, "steps=30")
    train_here(data, tmp_path / "resumed", *options, "steps=12")
    train_here(data, tmp_path / "resumed", *options, "steps=30")
    resumed, straight = (losses(tmp_path / name) for name in ("resumed", "straight"))
    watched = [
        [{k: v for k, v in row.items() if k.startswith("monitor/")} for row in rows]
        for rows in (resumed, straight)
    ]
    assert [w for w in watched[0] if w] == [w for w in watched[1] if w]
    states = [
        torch.load(p / "state.pt")["monitor"]
        for p in sorted((tmp_path / "straight" / "checkpoints").glob("step_*"))
    ]
    assert len(states) >= 5
    assert all(
        {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in states[0].items()}
        for state in states
    )
    train_here(data, tmp_path / "late", "steps=12")  # put on in the middle of a run
    train_here(data, tmp_path / "late", "steps=20", "diagnostics.monitor=true")
    assert any("monitor/head/gradient_norm" in row for row in losses(tmp_path / "late"))


def test_bfloat16_trains_and_keeps_less(data: Path, tmp_path: Path) -> None:
    for precision in ("float32", "bfloat16"):
        train_here(data, tmp_path / precision, f"precision={precision}", "method.rank=4")
    full, low = (losses(tmp_path / precision) for precision in ("float32", "bfloat16"))
    assert low[-1]["val/loss"] == pytest.approx(full[-1]["val/loss"], rel=0.05)
    kept = "mem/saved_bytes/sketches"
    rows, rank = 16, 4
    integers = 4 * rows + 4 * rank  # the rows in order and where bins begin, whatever the precision
    assert low[0][kept] - integers == (full[0][kept] - integers) // 2


@pytest.mark.slow
def test_compiled_run_agrees_with_eager_to_rounding(data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path / "eager", "steps=6")
    train_here(data, tmp_path / "compiled", "steps=6", "compile=true")
    for a, b in zip(losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True):
        assert a.get("train/loss", 0) == pytest.approx(b.get("train/loss", 0), rel=1e-4)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", "default"),
        ("method=exact,seed=1", "method-exact_seed-1"),
        ("method.include=[head]", "method.include-_head_-" + "X" * 8),
        ("data.path=/a/b.txt", "data.path-_a_b.txt-" + "X" * 8),
        ("..", "-" + "X" * 8),
    ],
)
def test_run_names_are_stable_and_safe(text: str, name: str) -> None:
    made = rundir.run_name(text)
    assert made == rundir.run_name(text)
    assert len(made) == len(name)
    assert made.startswith(name.removesuffix("X" * 8))
    assert os.sep not in made


def test_long_run_names_are_cut_and_told_apart() -> None:
    a, b = ("x=1," * 80 + end for end in ("y=1", "y=2"))
    assert rundir.run_name(a) != rundir.run_name(b)
    assert len(rundir.run_name(a)) < 140
