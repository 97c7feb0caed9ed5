"""The arena's report: whether its numbers and sentences come out by a second route. Plan and
command: test_arena_plan.py.
"""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from composed import in_place_of_conf
from tiny import evaluate_here, train_here

import conf
from bench.bench_step import step_options
from experiments.arena import ledger, plan, standings, step_times
from experiments.arena import tables as arena
from experiments.sections import studies
from harness.compose import configuration
from report import write
from report.recompute import Losses
from report.results import RunResult, find_runs, group_runs
from report.statistics import Estimate

BLOCKS = "method.include=[blocks.*]"
QUICK = ["micro_batch_size=4", "diagnostics.every=10"]


@pytest.fixture(autouse=True)
def quick_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conf, "compose", in_place_of_conf)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exact, BASIS at two budgets and a smaller batch, two seeds each; one run that only tuned; one
    cell out of reach.
    """
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train_here(data, folder / f"exact{seed}", *QUICK, "method=exact", f"seed={seed}")
        train_here(
            data,
            folder / f"small{seed}",
            *QUICK,
            "method=exact",
            "micro_batch_size=1",
            f"seed={seed}",
        )
        for share in ("1/4", "1/16"):
            budget = [f"method.budget={share}", BLOCKS]
            train_here(
                data,
                folder / f"basis{share.replace('/', '-')}_{seed}",
                *QUICK,
                *budget,
                f"seed={seed}",
            )
    tuning = ["purpose=tuning", "method.budget=1/4", BLOCKS]
    for rate in ("0.01", "0.5"):
        train_here(data, folder / f"tuning{rate}", *QUICK, *tuning, "seed=7", f"optim.lr={rate}")
    with pytest.raises(
        Exception,
        match=r"method\.budget=1/1000: BalancedSketch keeps at least 1/56\.9 of an input",
    ):
        train_here(data, folder / "refused", *QUICK, "method.budget=1/1000", BLOCKS)
    assert not (folder / "refused").exists()
    refused = plan.Contender("basis", "1/1000", (), (), refused="method.budget=1/1000: too little")
    ledger.write_ledger(folder, [refused], jobs=2)
    return folder


def summaries(runs: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((runs / f"{name}{seed}" / "summary.json").read_text()) for seed in (0, 1)]


def test_report_by_a_second_route(runs: Path, tmp_path: Path) -> None:
    report = write.gather([runs], studies())
    assert [table.name for table in report.tables[:4]] == [
        "arena",
        "arena_rates",
        "arena_quality",
        "arena_refused",
    ]
    written = {path.name for path in write.write(report, tmp_path, command="the command")}
    assert {
        "arena.csv",
        "arena_costs.svg",
        "arena_quality.svg",
    } <= written
    with (tmp_path / "arena.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"exact", "exact, 1 windows", "basis 1/4", "basis 1/16"}
    exact = summaries(runs, "exact")
    for name, folder in (
        ("basis 1/4", "basis1-4_"),
        ("basis 1/16", "basis1-16_"),
        ("exact, 1 windows", "small"),
    ):
        found = summaries(runs, folder)
        apart = [a["val/loss"] - b["val/loss"] for a, b in zip(found, exact, strict=True)]
        assert float(rows[name]["above"]) == pytest.approx(sum(apart) / 2, abs=1e-6)
        # Student's t with one degree of freedom: 12.706 standard errors, which are half the
        # distance of two values.
        assert float(rows[name]["above_half_width"]) == pytest.approx(
            12.7062 * abs(apart[0] - apart[1]) / 2, rel=1e-3
        )
        assert rows[name]["seeds"] == "2"  # not the run that only tuned
    # 64 rows, one block of width 16: X of 16 + 16 + 16 + 64 numbers a row. A quarter: 16 rows and 8
    # bytes do not fit, so 15.
    inputs = 4 * 64 * 112
    assert {
        run.last("mem/input_bytes")
        for group in report.groups
        for run in group.runs
        if group.method == "basis"
    } == {inputs}

    def kept_bytes(rank: int) -> int:
        """Sketches, and what layers share: rows in order, two tables of signs (one longer by the
        number of dense layers, 5), where bins begin. That is in no layer's budget.
        """
        return 4 * rank * 112 + 4 * (64 + 64 + 64 + 5 + rank)

    for name, rank in (("basis 1/4", 15), ("basis 1/16", 3)):
        kept = kept_bytes(rank)
        assert float(rows[name]["share"]) == pytest.approx(kept / inputs)
        assert float(rows[name]["dense_ratio"]) == pytest.approx(
            kept / (4 * 64 * 96)
        )  # exact: attention keeps proj's input
    assert rows["basis 1/4"]["off"] == ""
    assert rows["basis 1/16"]["off"] == f"{kept_bytes(3) / inputs * 16 - 1:+.0%}" == "+20%"
    assert float(rows["exact, 1 windows"]["dense_ratio"]) == pytest.approx(0.25)
    losses = {name: float(row["val"]) for name, row in rows.items()}
    assert [row["rank"] for row in rows.values()] == ["1", "2", "3", "4"]
    assert list(losses.values()) == sorted(losses.values())
    assert (
        not {"step_ratio", "seconds"} & rows["basis 1/4"].keys()
    )  # the ledger says that two runs shared the machine
    assert "seconds" not in "".join(row["front"] for row in rows.values())
    tables = {table.name: table for table in report.tables}
    (refused,) = tables["arena_refused"].rows
    assert (refused["method"], refused["budget"]) == ("basis", "1/1000")
    (tried,) = tables["arena_rates"].rows
    ends = {
        rate: json.loads((runs / f"tuning{rate}" / "summary.json").read_text())["val/loss"]
        for rate in ("0.01", "0.5")
    }
    assert (tried["method"], {rate: tried[rate] for rate in ends}) == ("basis 1/4", ends)
    assert tried["edge"] == "yes"
    assert any("2 runs shared the machine" in note for note in tables["arena"].notes)
    text = "\n".join(report.sentences)
    assert "At 1/4 of the bytes, basis 1/4 ends " in text
    assert "Out of reach at 1/1000 of the bytes: basis." in text
    assert "At 1/4, basis 1/4 beside exact, 1 windows (0.25 of exact's dense bytes): " in text
    assert not any("settings" in complaint for complaint in report.complaints)


def test_a_ranking_that_can_not_be_made_is_said(
    runs: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = sorted(runs.glob("basis*"))
    reports = [
        write.gather(budgets, studies()),
        write.gather([runs / "small0", runs / "basis1-4_0"], studies(compare=True)),
    ]
    train_here(data, tmp_path / "low", *QUICK, "method.budget=1/4", BLOCKS, "precision=bfloat16")
    reports.append(write.gather([tmp_path / "low", runs / "exact0"], studies()))
    for report, said in zip(reports, ("float32", None, "bfloat16"), strict=True):
        left = [
            sentence
            for sentence in report.sentences
            if sentence.startswith("No ranking of methods at their bytes: ")
        ]
        assert len(left) == (said is not None)
        assert all(
            f"none of method=exact activations=plain precision={said} tokens_per_step=null" in line
            for line in left
        )
        assert ("arena" in [table.name for table in report.tables]) == (said is None)
    assert not any("ank" in sentence for sentence in write.gather([runs], studies()).sentences)
    evaluate_here(f"runs=[{','.join(map(str, budgets))}]", f"out={tmp_path / 'out'}")
    assert "No ranking of methods at their bytes" in capsys.readouterr().out
    assert "No ranking of methods at their bytes" in (tmp_path / "out" / "report.md").read_text()


def test_who_is_of_another_model_is_not_ranked_and_said(
    runs: Path, data: Path, tmp_path: Path
) -> None:
    train_here(
        data,
        tmp_path / "wide",
        *QUICK,
        "method=low_rank",
        "method.budget=1/4",
        BLOCKS,
        "model.n_embd=32",
    )
    report = write.gather([tmp_path / "wide", runs / "exact0", runs / "basis1-4_0"], studies())
    (ranks,) = (table for table in report.tables if table.name == "arena")
    assert {row["method"] for row in ranks.rows} == {"exact", "basis 1/4"}
    (said,) = (sentence for sentence in report.sentences if sentence.startswith("Not ranked"))
    assert said.startswith("Not ranked, being of another model or text than exact")
    assert "low_rank" in said
    assert "basis" not in said


def test_a_share_counts_state_that_stands_in_for_the_input() -> None:
    options = {
        "micro_batch_size": 4,
        "model.block_size": 16,
        "model.n_layer": 1,
        "model.n_embd": 16,
        "model.n_head": 2,
    }
    row = {"step": 0, "mem/saved_bytes/sketches": 100.0, "mem/estimator_bytes": 924.0}
    summary = {"sketched_layers": ["blocks.0.mlp.fc"]}  # its input: 64 x 16 numbers, 4,096 bytes
    for method, expected in {"ema_sketch": 1024 / 4096, "subspace": 100 / 4096}.items():
        run = RunResult(
            Path(), options | {"method.name": method, "precision": "float32"}, summary, [row]
        )
        assert standings.share_of_inputs(run) == pytest.approx(expected)


def test_training_seconds_weigh_rows_by_their_steps() -> None:
    rows = [{"step": 4, "step_seconds": 0.5}, {"step": 5}, {"step": 10, "step_seconds": 0.25}]
    assert step_times.training_seconds(RunResult(Path(), {}, {}, rows)) == pytest.approx(
        4 * 0.5 + 6 * 0.25
    )


STEPS = [
    (["method=exact"], "plain", 64, 10.0, "float32"),
    (["method.budget=1/4", BLOCKS], "lean", 64, 11.0, "float32"),
    (["method.budget=1/4", BLOCKS, "method.center=true"], "plain", 64, 12.0, "float32"),
    (["method.budget=1/4", BLOCKS], "plain", 128, 13.0, "float32"),
    (["method.budget=1/4", BLOCKS], "plain", 64, 14.0, "bfloat16"),
    (["method.budget=1/4", BLOCKS], "plain", 64, 15.0, "float32"),
]
"""Options, activations, tokens, milliseconds and precision of steps that a benchmark timed."""


def step_table() -> str:
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(["step", "tokens", "milliseconds", "precision", "config"])
    for words, kind, *numbers in STEPS:
        config = configuration([*words, f"activations={kind}"])
        writer.writerow(["a name", *numbers, json.dumps(step_options(config))])
    writer.writerow(["nanogpt", 64, 20.0, "float32", ""])
    return lines.getvalue()


def test_step_times_of_runs_alone_of_a_benchmark_and_of_busy_machines(
    runs: Path, tmp_path: Path
) -> None:
    """Alone: medians of what the runs logged. By a benchmark: the row of the same method, options,
    activations and tokens.
    """
    found, _ = find_runs([runs])
    groups = group_runs([run for run in found if not run.tuning])
    losses = {
        run.id: Losses(run.last("val/loss"), run.last("val/loss"), run.last("val/loss"))
        for run in found
    }
    logged = [
        json.loads(line)["step_seconds"]
        for seed in (0, 1)
        for line in (runs / f"basis1-4_{seed}" / "metrics.jsonl").read_text().splitlines()
        if "step_seconds" in line
    ]
    clock, said = step_times.choose([{"jobs": 2, "devices": 2}], None)
    alone = standings.standings(groups, losses, clock)
    assert said == ""
    assert {s.label: s.step for s in alone}["basis 1/4"] == statistics.median(logged)
    busy, said = step_times.choose([{"jobs": 2}], None)
    assert busy(groups[0]) == (None, None)
    assert said.startswith("2 runs shared the machine at a time")
    file = tmp_path / "step.csv"
    file.write_text(step_table())
    clock, said = step_times.choose([{"jobs": 2}], file)
    timed = standings.standings(groups, losses, clock)
    table = arena.ranks(timed, said)
    assert {s.label: s.step for s in timed} == {
        "exact": 0.01,
        "basis 1/4": 0.015,
        "basis 1/16": None,
        "exact, 1 windows": None,
    }
    assert {row["method"]: row["step_ratio"] for row in table.rows}["basis 1/4"] == pytest.approx(
        1.5
    )
    steps = found[0].options["steps"]
    assert {s.label: s.seconds for s in timed}["basis 1/4"] == pytest.approx(0.015 * steps)
    evaluate_here(f"runs={runs}", f"times={file}", f"out={tmp_path / 'out'}")
    with (tmp_path / "out" / "arena.csv").open() as opened:
        ratios = {row["method"]: row["step_ratio"] for row in csv.DictReader(opened)}
    assert ratios == {"exact": "1.0", "basis 1/4": "1.5", "basis 1/16": "", "exact, 1 windows": ""}
    for wrong in (tmp_path / "none.csv", runs / "arena.json"):
        with pytest.raises(ValueError, match=r"times=.*must be a \.csv of scripts/bench_step\.py"):
            step_times.choose([], wrong)


def standing(
    label: str,
    losses: dict[int, float],
    dense: float,
    above: Estimate | None,
    method: str = "basis",
) -> standings.Standing:
    from report.results import Group
    from report.statistics import estimate

    run = RunResult(Path(), {"method.name": method}, {"status": "finished"}, [])
    loss = estimate(list(losses.values())) if losses else None
    budget = label.split()[-1] if method != "exact" else None
    return standings.Standing(
        label, Group(label, [run]), budget, loss, above, dense, dense, 0, None, 1, 1, {}, losses
    )


def test_front_is_what_nothing_beats() -> None:
    points = [
        standing(f"m{i} 1/8", {0: loss}, dense, None)
        for i, (dense, loss) in enumerate([(1, 5), (2, 4), (2, 6), (3, 4), (4, 1)])
    ]
    assert [s.label[:2] for s in standings.front(points, lambda s: s.dense)] == ["m0", "m1", "m4"]


@pytest.mark.parametrize(
    ("above", "said"),
    [
        (
            Estimate(0.01, 0.02, 3),
            "within 0.0300 nats of exact (+0.0100 ± 0.0200, 3 pairs): undecided which is better",
        ),
        (Estimate(0.04, 0.02, 3), "0.0400 nats worse than exact (+0.0400 ± 0.0200, 3 pairs)"),
        (Estimate(-0.04, 0.02, 3), "0.0400 nats better than exact (-0.0400 ± 0.0200, 3 pairs)"),
        (
            Estimate(0.04, None, 1),
            "+0.0400 nats from exact (one pair): undecided, one pair having no interval",
        ),
    ],
)
def test_sentences_follow_the_intervals(above: Estimate, said: str) -> None:
    exact = standing("exact", {0: 1.0, 1: 1.1, 2: 1.2}, 100, None, "exact")
    best = standing("a 1/8", {0: 1.0, 1: 1.1, 2: 1.2}, 12, above)
    close = standing("b 1/8", {0: 1.1, 1: 1.1, 2: 1.1 + 1e-3}, 12, above)
    far = standing("c 1/8", {0: 2.0, 1: 2.1, 2: 2.2001}, 12, above)
    lost = standing("d 1/8", {}, 12, None)
    out_of_reach = arena.refused([])
    first, second = arena.conclusions([exact, best, close], out_of_reach)
    assert first == (
        f"At 1/8 of the bytes, a 1/8, the best of 2 on these very seeds, ends {said} at 1.00 times "
        "its step time."
    )
    assert second.endswith("undecided, the interval covers zero.")
    *_, last = arena.conclusions([exact, best, far, lost], out_of_reach)
    assert last.endswith("nats, a 1/8 is better.")
    assert "At 1/8 of the bytes, d 1/8 diverged." in arena.conclusions(
        [exact, best, far, lost], out_of_reach
    )


def test_the_rate_that_counts_has_the_most_seeds_then_the_lowest_loss(runs: Path) -> None:
    found, _ = find_runs([runs])
    groups = group_runs([run for run in found if run.options.get("method.budget") == "1/4"])
    recomputed = {run.id: Losses(run.last("val/loss"), 0.0, run.last("val/loss")) for run in found}
    assert len(groups) == 2  # rates 0.01 (three seeds, the tuning one told apart below) and 0.5
    exact = group_runs([run for run in found if run.options["method.name"] == "exact"])
    (chosen,) = [s for s in standings.standings([*exact, *groups], recomputed) if s.budget]
    assert chosen.group.runs[0].options["optim.lr"] == 0.01
