"""The frontier against its definition, and its figure from a small table made by hand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench.frontier import NAME, Point, draw, figure, frontier, main, read

TABLE = """\
step,milliseconds,ratio,peak,peak_bytes,failed
"exact, whole logits, context 64",10.0,1.0,4 GiB,4294967296,
"exact, plain, context 64",11.0,1.1,2 GiB,2147483648,
"exact, whole logits, context 64",12.0,1.0,4 GiB,4294967296,
"exact, checkpoint, context 64",15.6,1.3,1 GiB,1073741824,
"exact, whole logits, context 64",12.0,1.0,4 GiB,4294967296,
"exact, offload, context 64",24.0,2.0,1.5 GiB,1610612736,
"exact, lean, context 64",,,,,OutOfMemoryError: tried
"exact, whole logits, context 128",20.0,1.0,5 GiB,5368709120,
"exact, plain, context 128",18.0,0.9,5 GiB,5368709120,
"""


def test_frontier_is_what_nobody_beats() -> None:
    """Against all pairs, with equal times, equal peaks and equal points among them."""
    draws = random.Random(0)
    for _ in range(200):
        points = [
            Point(str(i), draws.randint(1, 6), draws.randint(1, 6))
            for i in range(draws.randint(1, 9))
        ]

        def beaten(p: Point, points: list[Point] = points) -> bool:
            return any(
                q.time <= p.time and q.peak <= p.peak and (q.time, q.peak) != (p.time, p.peak)
                for q in points
            )

        best = {(p.time, p.peak) for p in points if not beaten(p)}
        found = frontier(points)
        assert {(p.time, p.peak) for p in found} == best
        assert len(found) == len(best)
        assert [p.time for p in found] == sorted(p.time for p in found)


def test_figure_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "step.csv"
    table.write_text(TABLE)
    points, unit, failed = read(table)
    assert points["context 64"] == [
        Point("exact, whole logits", 1.0, 4 * 2**30),
        Point("exact, plain", 1.1, 2 * 2**30),
        Point("exact, checkpoint", 1.3, 2**30),
        Point("exact, offload", 2.0, 1.5 * 2**30),
    ]
    assert unit == "time of a step, exact with whole logits = 1"
    assert failed == ["exact, lean, context 64"]
    panels = figure(points, unit).panels
    assert [panel.title for panel in panels] == ["context 64", "context 128"]
    stairs, best, others = panels[0].lines
    assert (stairs.x, stairs.y) == ([1.0, 1.1, 1.1, 1.3, 1.3], [4.0, 4.0, 2.0, 2.0, 1.0])
    assert best.texts == ["exact, whole logits", "exact, plain", "exact, checkpoint"]
    assert (others.x, others.y, others.texts) == ([2.0], [1.5], ["exact, offload"])
    assert main([str(table)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "context 64: exact, whole logits; exact, plain; exact, checkpoint",
        "context 128: exact, plain",
        "failed: exact, lean, context 64",
    ]
    drawn = (tmp_path / f"{NAME}.svg").read_text()
    assert all(name in drawn for name in ("exact, offload", "exact, checkpoint", "context 128"))
    assert main([str(table), "--out", str(tmp_path / "other.svg")]) == 0
    assert (tmp_path / "other.svg").read_text() == drawn


def test_without_a_baseline_times_are_milliseconds(tmp_path: Path) -> None:
    table = tmp_path / "step.csv"
    lines = TABLE.splitlines(keepends=True)
    table.write_text("".join([*lines, '"exact, plain, context 256",8.0,,1 GiB,1073741824,\n']))
    points, unit, _ = read(table)
    assert unit == "time of a step, ms"
    assert points["context 64"][2] == Point("exact, checkpoint", 15.6, 2**30)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "no column milliseconds, peak_bytes, ratio, step"),
        ("step,milliseconds,ratio,peak_bytes\n", "no row has both a time and a peak"),
        ("", "no column"),
    ],
)
def test_other_files_are_refused(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "step.csv").write_text(text)
    if text.endswith("peak_bytes\n"):
        (tmp_path / "step.csv").write_text(text + '"exact, lean, context 64",,,\n')
    with pytest.raises(ValueError, match=said):
        draw(tmp_path / "step.csv")
    assert main([str(tmp_path / "step.csv")]) == 1
    assert said in capsys.readouterr().err
    assert main([str(tmp_path / "none.csv")]) == 1
