"""eval.py on finished runs: what it writes, what it computes again, and what it says of runs that
it can't use.
"""

import csv
import dataclasses
import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import REPOSITORY, evaluate_here, run_command, train_here

from experiments.paper.published import PUBLISHED
from experiments.sections import studies
from harness.folder.checkpoint import Checkpoints
from harness.folder.metrics import MetricsLog
from report import write
from report.recompute import recompute
from report.results import find_runs, group_runs
from report.section import Evidence, Section, Study
from report.tables import Column, Table


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exact, R = 4 and R = 2 at two seeds each, and an unfinished run."""
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train_here(data, folder / f"exact{seed}", "method=exact", f"seed={seed}")
        for rank in (2, 4):
            train_here(data, folder / f"basis{rank}_{seed}", f"method.rank={rank}", f"seed={seed}")
    train_here(data, folder / "broken", "method.rank=3")
    (folder / "broken" / "summary.json").write_text(
        json.dumps({"status": "interrupted", "step": 7})
    )
    return folder


def test_groups_are_ordered_and_named_by_what_differs(runs: Path) -> None:
    found, complaints = find_runs([runs])
    assert [group.label for group in group_runs(found)] == ["exact", "basis R=4", "basis R=2"]
    assert all([run.seed for run in group.runs] == [0, 1] for group in group_runs(found))
    (complaint,) = complaints
    assert "broken is left out: interrupted" in complaint


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_everything_is_written_with_the_runs_own_numbers(runs: Path, tmp_path: Path) -> None:
    report = write.gather([runs], studies())
    written = write.write(report, tmp_path, command="the command", metrics=True)
    names = {path.relative_to(tmp_path).as_posix() for path in written}
    tables = [f"{name}.csv" for name in ("final_losses", "differences", "stability", "runs")]
    pictures = ["validation_loss.svg", "stability.svg"]
    assert names == {*tables, *pictures, "report.md", "report.json", "metrics.jsonl.gz"}
    assert all((tmp_path / name).stat().st_size > 0 for name in names)

    rows = read_csv(tmp_path / "final_losses.csv")
    assert [row["method"] for row in rows] == ["exact", "basis R=4", "basis R=2"]
    exact, sketched = (
        [json.loads((runs / f"{name}{s}" / "summary.json").read_text()) for s in (0, 1)]
        for name in ("exact", "basis4_")
    )
    mean = sum(s["val/loss"] for s in sketched) / 2
    assert float(rows[1]["val"]) == pytest.approx(mean, abs=1e-6)
    assert float(rows[1]["val_half_width"]) > 0
    assert rows[1]["runs"] == " ".join(s["run_id"] for s in sketched)
    assert [row["compression"] for row in rows] == ["1.0", "4.0", "8.0"]
    apart = [a["val/loss"] - b["val/loss"] for a, b in zip(sketched, exact, strict=True)]
    (first, _) = read_csv(tmp_path / "differences.csv")
    assert float(first["val"]) == pytest.approx(sum(apart) / 2, abs=1e-6)
    assert 0 < float(first["val_p"]) < 1
    text = (tmp_path / "report.md").read_text()
    assert "the command" in text
    assert "broken is left out: interrupted" in text
    numbers = json.loads((tmp_path / "report.json").read_text())["tables"]["final_losses"]["rows"][
        1
    ]
    assert numbers["val"]["mean"] == pytest.approx(mean, abs=1e-6)
    assert "<svg" in (tmp_path / "validation_loss.svg").read_text()[:600]
    lines = gzip.decompress((tmp_path / "metrics.jsonl.gz").read_bytes()).decode().splitlines()
    kept = [json.loads(line) for line in lines]
    assert len({row["run"] for row in kept}) == 6
    assert [row["step"] for row in kept if row["run"] == exact[0]["run_id"]] == [0, 10, 20]


def test_a_study_adds_tables_sentences_and_figures_where_it_says(runs: Path) -> None:
    def section(found: Evidence) -> Section:
        rows = [{"method": group.label, "seeds": len(group.runs)} for group in found.groups]
        table = Table(
            "seeds", "Seeds", {"method": Column("method"), "seeds": Column("seeds")}, rows
        )
        return Section(
            [table, Table("empty", "Nothing", {}, [])], ["Two seeds."], complaints=["A complaint."]
        )

    report = write.gather([runs / "exact0", runs / "exact1"], [Study(section)])
    assert [table.name for table in report.tables] == ["final_losses", "seeds", "runs"]
    assert report.tables[1].rows == [{"method": "exact", "seeds": 2}]
    assert (report.sentences, report.complaints) == (["Two seeds."], ["A complaint."])
    leading = Study(lambda found: dataclasses.replace(section(found), leads=True))
    names = [table.name for table in write.gather([runs / "exact0"], [leading]).tables]
    assert names == ["seeds", "final_losses", "runs"]
    (kept,) = (table for table in report.tables if table.name == "final_losses")
    assert "val_as_published" not in kept.csv()  # no study brought a publication


def test_losses_come_from_the_checkpoint_and_not_from_the_log(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(runs / "basis4_0", folder)
    (run,), _ = find_runs([folder])
    again = recompute(run, PUBLISHED)
    assert again.agrees
    assert recompute(run).as_published is None
    assert again.held_out == pytest.approx(run.last("val/loss"), abs=1e-6)
    assert again.as_published != again.held_out
    log = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(
        log.replace(f'"val/loss": {run.last("val/loss")!r}', '"val/loss": 0.5')
    )
    with pytest.raises(ValueError, match=r"metrics\.jsonl: has .* bytes of the"):
        write.gather([folder])  # the checkpoint knows another log
    checkpoints = Checkpoints(folder / "checkpoints")
    state = checkpoints.load_latest().state
    with MetricsLog(folder / "metrics.jsonl") as changed:
        checkpoints.save(20, state | {"metrics": changed.mark()})
    report = write.gather([folder])
    assert "the logged one 0.5" in report.complaints[0]
    assert report.tables[0].rows[0]["val"].mean == again.held_out
    state = checkpoints.load_latest().state
    for weight in state["model"].values():
        weight.zero_()
    checkpoints.save(20, state)
    assert recompute(run).held_out == pytest.approx(
        torch.log(torch.tensor(state["config"]["model"]["vocab_size"])).item()
    )


def test_published_validation_reads_the_training_text_window_by_window(runs: Path) -> None:
    from data.options import DataOptions
    from data.prepare import prepare
    from models import GPT, GPTConfig

    (run,), _ = find_runs([runs / "exact0"])
    state = Checkpoints(run.folder / "checkpoints").load_latest().state
    model = GPT(GPTConfig(**state["config"]["model"]))
    model.load_state_dict(state["model"])
    text = torch.from_numpy(
        prepare(DataOptions(**state["config"]["data"])).train.read(0, 30 * 17)
    ).view(30, 17)
    with torch.no_grad():
        expected = model(text[:, :-1], text[:, 1:]).item()
    assert recompute(run, PUBLISHED).as_published == pytest.approx(expected, abs=1e-6)


def test_commands_are_shown_without_what_changes_nothing() -> None:
    command = (
        "train.py -m experiment=paper seed=0 data.cache_dir=/somewhere log.progress=false row=r1"
    )
    assert write.essential(command) == "train.py -m experiment=paper seed=0 row=r1"


def test_what_cannot_be_used_is_named_and_the_rest_reported(runs: Path, tmp_path: Path) -> None:
    for name in ("exact0", "exact1", "basis4_0", "basis4_1", "basis2_0"):
        shutil.copytree(runs / name, tmp_path / name)
    shutil.rmtree(tmp_path / "basis4_0" / "checkpoints")
    shutil.rmtree(tmp_path / "basis4_1" / "checkpoints" / "step_00000020")
    summary = json.loads((tmp_path / "basis2_0" / "summary.json").read_text())
    diverged = summary | {
        "status": "diverged",
        "reason": "step 17: the training loss is nan",
        "diverged_at": 17,
        "step": 16,
    }
    (tmp_path / "basis2_0" / "summary.json").write_text(json.dumps(diverged))
    train_here(tmp_path, tmp_path / "other", "method.rank=2", "model.n_embd=8")
    report = write.gather([tmp_path], studies())
    complaints = "\n".join(report.complaints)
    assert "basis4_0 is left out: no checkpoint in checkpoints/" in complaints
    assert (
        "basis4_1 is left out: its newest checkpoint is of step 10, and the run ended at 20"
        in complaints
    )
    assert "runs are of 2 settings" in complaints
    final, *_ = report.tables
    assert next(row["method"] for row in final.rows).startswith("exact")
    by_status = {row["method"]: row for row in final.rows}
    (lost,) = (row for row in by_status.values() if row["diverged"])
    assert lost.get("val") is None
    stability = next(table for table in report.tables if table.name == "stability")
    assert "1 of 1, first at step 17" in [row["diverged"] for row in stability.rows]


def test_only_unusable_runs_are_an_error_that_says_why(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "exact0", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match=r"no finished run in these folders\n.*no checkpoint"):
        write.gather([tmp_path])


def test_options_that_differ_are_part_of_the_label(runs: Path, tmp_path: Path) -> None:
    train_here(tmp_path, tmp_path / "a", "method.rank=2", "method.hashing=uniform")
    train_here(tmp_path, tmp_path / "b", "method.rank=2", "method.hashing=balanced")
    found, _ = find_runs([tmp_path])
    assert {group.label for group in group_runs(found)} == {
        "basis R=2 hashing=uniform",
        "basis R=2 hashing=balanced",
    }


def test_repeats_count_once_and_pairs_share_everything_but_the_method(
    runs: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    train_here(data, tmp_path / "exact", "method=exact", "steps=12")
    train_here(data, tmp_path / "short", "method.rank=2", "steps=12")
    train_here(data, tmp_path / "longer", "method.rank=2", "steps=16")
    train_here(data, tmp_path / "again", "method.rank=2", "steps=12", "tracker.project=other")
    report = write.gather([tmp_path, tmp_path])
    assert sum(len(group.runs) for group in report.groups) == 3
    (complaint,) = (said for said in report.complaints if "left out" in said)
    assert "the same run as" in complaint
    (above,) = (table.rows for table in report.tables if table.name == "differences")
    assert [row["method"] for row in above] == [
        "basis R=2 steps=12"
    ]  # no exact run of 16 steps to compare the other with


def test_other_text_is_another_group(tmp_path: Path) -> None:
    train_here(tmp_path, tmp_path / "a", "seed=0")
    text = tmp_path / "text.txt"
    text.write_text(text.read_text()[::-1])
    train_here(tmp_path, tmp_path / "b", "seed=1")
    found, _ = find_runs([tmp_path])
    assert [len(group.runs) for group in group_runs(found)] == [1, 1]


def test_one_bad_folder_is_named_and_the_rest_reported(runs: Path, tmp_path: Path) -> None:
    for name, config, summary in (
        ("a", "{bad", "{}"),
        ("b", "a: 1", "{"),
        ("c", "a: 1", '{"status": "finished"}'),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(config)
        (folder / "summary.json").write_text(summary)
    found, complaints = find_runs([runs, tmp_path])
    assert len(found) == 6
    assert all(any(str(tmp_path / name) in complaint for complaint in complaints) for name in "abc")


@pytest.mark.slow
def test_command_line(runs: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "eval.py"), f"runs={runs}"]
    done = run_command([*command, f"out={tmp_path / 'out'}"], tmp_path)
    assert done.returncode == 0, done.stdout
    assert "| basis R=4" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("runs=nowhere", "runs=nowhere: no such folder"),
        ("runs=.", "no finished run"),
        ("complexity=true", "out=null"),
        ("out=here", "runs=null"),
    ],
)
def test_mistakes_are_named(
    wrong: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a message and exit code 1: tests/harness/test_command_line.py."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        evaluate_here(wrong)
    assert list(tmp_path.iterdir()) == []
