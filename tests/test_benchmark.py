"""The instruments of the benchmarks: turns, quartiles, and a table of a small layer."""

import csv

import pytest

from harness.benchmark import interleaved, summarise
from scripts import bench_layer, bench_step


def test_alternatives_take_turns_and_warm_ups_do_not_count() -> None:
    order: list[str] = []
    timings = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, turns=3, warm_up=2)
    assert order == ["a", "b"] * 5
    assert {name: timing.count for name, timing in timings.items()} == {"a": 3, "b": 3}
    with pytest.raises(ValueError, match="turns=1"):
        interleaved({"a": lambda: None}, turns=1)


def test_quartiles() -> None:
    timing = summarise([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (timing.low, timing.median, timing.high) == (2.0, 3.0, 4.0)


def test_layer_table(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rows", "64", "--in", "32", "--out", "48", "--rank", "4", "--turns", "2", "--dtype", "float32"]
    assert bench_layer.main([*options, "--csv", str(tmp_path / "layer.csv")]) == 0
    lines = (tmp_path / "layer.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["layer", "exact", "limit", "basis R=4"]
    kept = dict(zip(["exact", "limit", "basis"], [line.split(",")[9] for line in lines[1:]], strict=True))
    assert kept == {"exact": "8.00 KiB", "limit": "0 B", "basis": "520 B"}  # B x N; nothing; R x N and the key
    assert "of limit" in capsys.readouterr().out


def test_step_table(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.n_layer=1", "model.n_embd=64", "model.n_head=2", "model.block_size=64", "model.vocab_size=97"]
    assert bench_step.main([*small, "--turns", "2", "--nanogpt", "--csv", str(tmp_path / "step.csv")]) == 0
    with (tmp_path / "step.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["exact, plain", "exact, lean", "basis, plain", "basis, lean", "nanogpt"]
    assert [row["step"] for row in rows] == names
    assert rows[0]["ratio"] == "1.0"
    kept = {row["step"]: row["kept"] for row in rows}
    assert kept["basis, lean"] != kept["exact, plain"]
    assert "tokens/s" in capsys.readouterr().out
    assert bench_step.main(["model.n_head=7"]) == 1
