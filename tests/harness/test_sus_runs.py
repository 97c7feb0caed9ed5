"""Runs with SUS attention: they resume, combine with lean activations and checkpoints, and older
ones are understood.
"""

from pathlib import Path

import pytest
from hydra.errors import CompactHydraException
from tiny import losses, rewrite_config, train_here

from harness.folder import rundir
from report.results import find_runs, group_runs


def test_runs_resume_and_combine_with_lean_and_checkpoints(data: Path, tmp_path: Path) -> None:
    sus = ["method=exact", "attention=sus", "attention.c=2"]
    for name, options in {
        "exact": ["method=exact"],
        "sus": sus,
        "checkpoint": [*sus, "activations=checkpoint"],
        "selective": [*sus, "activations=checkpoint", "activations.selective=true"],
        "lean": [*sus, "activations=lean"],
        "again": [*sus, "steps=10"],
    }.items():
        train_here(data, tmp_path / name, *options)
    train_here(data, tmp_path / "again", *sus)
    rows = {
        path.name: losses(path) for path in tmp_path.iterdir() if (path / "metrics.jsonl").exists()
    }
    last = {name: row[-1]["val/loss"] for name, row in rows.items()}
    assert rows["sus"][0]["val/loss"] == rows["exact"][0]["val/loss"]
    assert last["sus"] != last["exact"]
    assert last["sus"] == pytest.approx(last["exact"], rel=0.05)
    assert last["sus"] == last["checkpoint"] == last["selective"] == last["again"]
    assert last["lean"] == pytest.approx(last["sus"], rel=0.05)
    kept = {name: row[0]["mem/saved_bytes/attention"] for name, row in rows.items()}
    assert kept["sus"] < kept["exact"]
    assert kept["lean"] < 0.45 * kept["sus"]


@pytest.mark.parametrize(
    "attention",
    [
        None,
        {"name": "exact", "c": 25.0, "mode": "sparse"},
        {"name": "exact", "c": 10.0, "mode": "dense"},
    ],
)
def test_older_runs_attended_exactly(attention: dict | None, data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path / "run", "method=exact", "steps=10")
    config = rundir.read_config(tmp_path / "run")
    assert config["attention"] == {"name": "exact", "c": None, "mode": None}
    del config["attention"], config["method"]["allocation"]  # options that came later
    if (
        attention is not None
    ):  # sus's own were written, and not looked at, where attention was exact
        config["attention"] = attention
    rewrite_config(tmp_path / "run", config)
    train_here(data, tmp_path / "run", "method=exact")  # continued: nothing changed
    assert losses(tmp_path / "run")[-1]["step"] == 20
    config["steps"] = 20
    rewrite_config(tmp_path / "run", config)  # as it reads if it was finished then
    train_here(data, tmp_path / "now", "method=exact", "seed=1")
    found, complaints = find_runs([tmp_path])
    assert complaints == []
    assert [(group.label, len(group.runs)) for group in group_runs(found)] == [
        ("exact", 2)
    ]  # seeds of one experiment
    with pytest.raises(CompactHydraException, match=r"attention\.name: exact -> sus"):
        train_here(data, tmp_path / "run", "method=exact", "attention=sus")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["attention=sus", "attention.c=0"], "attention.c=0"),
        (["attention=sus", "attention.mode=thin"], "attention.mode='thin'"),
        (["attention.name=linear"], "attention.name='linear'"),
        (["attention=sus", "model.dropout=0.1"], "model.dropout=0.1: must be 0"),
    ],
)
def test_mistakes_in_a_configuration_are_named(
    wrong: list[str], said: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(CompactHydraException, match=said):
        train_here(data, tmp_path / "run", *wrong)
    assert not (tmp_path / "run").exists()
