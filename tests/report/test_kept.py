"""What results/ keeps is what its numbers say, and a change of either is found."""

import json
import shutil
from pathlib import Path

import pytest

from report import kept
from report.write import METRICS, read_metrics, write_metrics

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of one report and one table of results/."""
    shutil.copytree(RESULTS / "paper" / "10000", tmp_path / "results" / "paper")
    shutil.copytree(RESULTS / "speed", tmp_path / "results" / "speed")
    return tmp_path / "results"


def test_nothing_in_results_is_there_twice() -> None:
    assert kept.superfluous(RESULTS) == []


def test_tables_and_figures_are_rebuilt_and_equal(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert kept.main(["--folder", str(folder), "--out", str(out)]) == 0
    text = (out / "paper" / "report.md").read_text()
    assert "| basis R=32 | 3     |" in text
    assert "5.938 ± 0.099" in text  # exact's loss: of three runs, as the README says
    assert (out / "paper" / "final_losses.csv").read_text().startswith("method,seeds,")
    assert "| exact" in (out / "speed" / "layer_cpu.md").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "validation_loss.svg").unlink(), "validation_loss.svg is missing"),
        (lambda f: (f / "other.svg").write_text("<svg/>"), "other.svg is no figure of report.json"),
        (lambda f: (f / "table.md").write_text("| a |"), "table.md can be rebuilt"),
        (lambda f: (f / "plot.png").write_bytes(b""), "plot.png can be rebuilt"),
    ],
)
def test_a_file_too_many_or_too_few_is_named(folder: Path, tmp_path: Path, change, said) -> None:
    change(folder / "paper")
    (complaint,) = kept.rebuild(folder, tmp_path / "out")
    assert said in complaint


def test_a_changed_number_is_found_in_figure_and_table(folder: Path, tmp_path: Path) -> None:
    path = folder / "paper" / "report.json"
    values = json.loads(path.read_text())
    values["figures"][0]["panels"][0]["lines"][0]["y"][-1] += 0.1
    values["tables"]["final_losses"]["rows"][0]["val"]["mean"] += 1e-5
    path.write_text(json.dumps(values))
    first, second = kept.rebuild(folder, tmp_path / "out")
    assert "validation_loss.svg is not what report.json draws" in first
    assert "val of exact is 5.937649" in second


def test_metrics_of_a_run_that_is_missing_are_named(folder: Path, tmp_path: Path) -> None:
    path = folder / "paper" / METRICS
    rows = read_metrics(path)
    lost = next(iter(rows))
    write_metrics(path, {name: run for name, run in rows.items() if name != lost})
    (complaint,) = kept.rebuild(folder, tmp_path / "out")
    assert f"lacks {lost}" in complaint


def test_metrics_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    rows = {"a": [{"step": 0, "val/loss": 1.5}], "b": [{"step": 0, "val/loss": 2.5}]}
    for name in ("first.gz", "second.gz"):
        write_metrics(tmp_path / name, rows)
    first = (tmp_path / "first.gz").read_bytes()
    assert first == (tmp_path / "second.gz").read_bytes()
    assert first[4:8] == bytes(4)  # gzip's field for the time
    assert read_metrics(tmp_path / "first.gz") == rows


def test_tidying_removes_what_can_be_rebuilt(folder: Path, tmp_path: Path) -> None:
    (folder / "paper" / "report.md").write_text("")
    (folder / "speed" / "layer_cpu.md").write_text("")
    options = ["--folder", str(folder), "--out", str(tmp_path / "out")]
    assert kept.main(options) == 1
    assert kept.main([*options, "--tidy"]) == 0
    assert not (folder / "paper" / "report.md").exists()
