"""Statistics, stability, claims and complexity against numbers worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments.paper import claims, complexity, stability
from experiments.paper.complexity import BASE, Point, count, slope
from experiments.paper.published import published_row
from report import losses
from report.figures import Figure, validation_curves
from report.recompute import Losses
from report.results import RunResult, differing_options, group_runs, setting
from report.statistics import Estimate, estimate
from report.tables import Column, Table

PAPER = {
    "model.vocab_size": 50257,
    "model.block_size": 64,
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 64,
    "model.init": "paper",
    "model.tie_head": False,
    "model.dropout": 0.0,
    "model.layer_norm_eps": 1e-6,
    "precision": "float32",
    "steps": 50000,
    "micro_batch_size": 1,
    "optim.name": "sgd",
    "optim.lr": 0.01,
    "optim.momentum": 0.9,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0.0,
    "optim.grad_clip": None,
    "data.order": "paper",
    "tokens_per_step": None,
}


def run(
    rank: int | None, seed: int, val: list[float], status: str = "finished", **more: Any
) -> RunResult:
    """A run of the paper's setting with these validation losses, one every 1,000 steps."""
    method: dict[str, Any] = {"method.name": "exact"}
    if rank is not None:
        method = {
            "method.name": "basis",
            "method.rank": rank,
            "method.hashing": "balanced",
            "method.invariant_scalars": True,
            "method.shrinkage": 0.01,
            "method.eps": 1e-8,
            "method.include": ["blocks.*.mlp.*", "head"],
            "method.exclude": [],
        }
    rows = [{"step": 1000 * i, "val/loss": loss} for i, loss in enumerate(val)]
    summary = {
        "status": status,
        "run_id": f"{rank}-{seed}-{more}",
        "step": 1000 * (len(val) - 1),
        "data": "text",
    }
    return RunResult(Path("nowhere"), PAPER | method | {"seed": seed} | more, summary, rows)


def again(runs: list[RunResult]) -> dict[str, Losses]:
    return {
        r.id: Losses(r.last("val/loss"), 0.0, r.last("val/loss")) for r in runs if not r.diverged
    }


def test_interval_and_p_value_are_students() -> None:
    value = estimate([1.0, 2.0, 3.0])
    assert value.mean == 2.0
    assert value.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t(0.975, 2)
    t = 2.0 * math.sqrt(3)
    assert value.p == pytest.approx(
        1 - t / math.sqrt(t * t + 2), rel=1e-9
    )  # closed form for two degrees of freedom
    assert estimate([5.0]) == Estimate(5.0, None, 1)
    assert estimate([5.0]).text() == "5.000"
    assert value.text(digits=1, sign=True) == "+2.0 ± 2.5"
    assert estimate([1.0, 1.0]).p == 0.0
    assert estimate([0.0, 0.0]).p == 1.0


def test_late_train_loss_weighs_rows_by_their_steps() -> None:
    steps = [(500, 9.0), (1200, 8.0), (1600, 7.0), (2000, 5.0)]
    result = RunResult(Path("nowhere"), {}, {}, [{"step": s, "train/loss": x} for s, x in steps])
    assert losses.late_train_loss(result) == pytest.approx(
        (200 * 8.0 + 400 * 7.0 + 400 * 5.0) / 1000
    )
    assert math.isnan(losses.late_train_loss(RunResult(Path("nowhere"), {}, {}, [])))


def test_rises_share_and_momentum() -> None:
    result = run(1, 0, [9.0, 8.0, 8.5, 8.25, math.nan, math.nan])
    assert stability.rises(result) == [-1.0, 0.5, -0.25, math.inf, 0.0]
    assert stability.worse_count(group_runs([result])[0]) == (2, 5)
    assert stability.largest_rise(result) == math.inf
    assert stability.largest_rise(run(1, 0, [3.0, 2.0])) == 0.0
    norms = [(100, 50.0), (200, 3.0), (900, 5.0), (1000, 4.0)]
    result = RunResult(Path("nowhere"), {}, {}, [{"step": s, "momentum_norm": x} for s, x in norms])
    assert stability.momentum(result) == pytest.approx(
        (4.0, 1.0 / 4.0)
    )  # the first tenth is left out


def test_groups_find_their_published_row() -> None:
    rows = {
        group.rank: published_row(group)
        for group in group_runs([run(rank, 0, [9.0, 8.0]) for rank in (None, 32, 1, 5)])
    }
    assert rows[None].val_loss == 6.616
    assert rows[32].val_loss == 6.575
    assert rows[5] is None
    for option, value in (
        ("method.shrinkage", 0.0),
        ("method.eps", 1.0),
        ("optim.lr", 0.1),
        ("optim.weight_decay", 0.1),
        ("model.n_layer", 4),
        ("tokens_per_step", 128),
    ):
        (group,) = group_runs([run(32, 0, [9.0, 8.0], **{option: value})])
        assert published_row(group) is None, option


@pytest.mark.parametrize(
    ("r32", "verdict"),
    [
        ((4.9, 4.91, 4.92), "supported"),
        ((5.1, 5.12, 5.11), "contradicted"),
        ((4.9, 5.1, 5.0), "not supported"),
    ],
)
def test_regulariser_is_judged_by_the_interval(r32: tuple[float, ...], verdict: str) -> None:
    runs = [run(None, seed, [9.0, 5.0]) for seed in range(3)] + [
        run(32, seed, [9.0, loss]) for seed, loss in enumerate(r32)
    ]
    (sentence,) = [s for s in claims.claims(group_runs(runs), again(runs)) if "regulariser" in s]
    assert f'regulariser" is {verdict}' in sentence
    assert "3 pairs" in sentence


def test_an_adaptive_rank_is_the_methods_and_told() -> None:
    exact, fixed = (
        run(None, 0, [6.0, 5.0], **{"adaptive_rank.every": 0}),
        run(8, 0, [6.0, 5.5], **{"adaptive_rank.every": 0}),
    )
    adaptive = run(8, 0, [6.0, 5.2], **{"adaptive_rank.every": 20})
    assert setting(adaptive) == setting(exact)  # a pair
    assert differing_options([exact, adaptive]) == ["", ""]
    assert [g.label for g in group_runs([adaptive, exact, fixed])][1:] == [
        f"basis R=8 adaptive_rank.every={every}" for every in (0, 20)
    ]


def test_one_seed_decides_nothing() -> None:
    runs = [run(None, 0, [9.0, 5.0]), run(32, 0, [9.0, 4.0]), run(1, 0, [9.0, 7.0])]
    sentences = claims.claims(group_runs(runs), again(runs))
    assert (
        sum("undecided, one pair having no interval" in s for s in sentences) == 2
    )  # regulariser and cuts
    assert any(
        "convergence" in s and "undecided, with so few evaluations or seeds: 0 of 1" in s
        for s in sentences
    )
    assert not any("supported" in s or "contradicted" in s for s in sentences)


def test_monotonic_convergence_is_counted() -> None:
    runs = [run(1, 0, [9.0, 8.0, 8.1, 8.0, 7.9])]
    (sentence,) = claims.claims(group_runs(runs), again(runs))
    assert "not literally so: 1 of 4 evaluations got worse, by at most 0.100 nats" in sentence
    smooth = [run(1, seed, [9.0 - 0.1 * i for i in range(12)]) for seed in range(2)]
    exact = [run(None, seed, [9.0, 8.0, 8.5]) for seed in range(2)]
    (sentence,) = [
        s
        for s in claims.claims(group_runs(smooth + exact), again(smooth + exact))
        if "convergence" in s
    ]
    assert "is supported: 0 of 22 evaluations got worse" in sentence
    assert "of exact backpropagation, 2 of 4" in sentence


def test_divergence_is_never_passed_over() -> None:
    runs = [run(None, seed, [9.0, 5.0]) for seed in range(4)]
    for rank in (32, 1):
        runs += [run(rank, seed, [9.0, 4.9 + 0.01 * seed]) for seed in range(1, 4)]
        lost = run(rank, 0, [9.0, 9.5], status="diverged")
        lost.summary["diverged_at"] = 13
        runs.append(lost)
    groups = group_runs(runs)
    sentences = claims.claims(groups, again(runs))
    assert any(
        "R = 32 trains like exact" in s
        and "contradicted: 1 of 4 runs diverged, the first at step 13" in s
        for s in sentences
    )
    assert any("convergence" in s and "contradicted: 1 of 4 runs diverged" in s for s in sentences)
    assert not any("regulariser" in s for s in sentences)
    assert losses.differences(groups, again(runs)).rows == []


def test_graceful_degradation_goes_cut_by_cut() -> None:
    runs = [run(None, seed, [9.0, 5.0]) for seed in range(3)]
    runs += [run(32, seed, [9.0, 5.1 + 0.001 * seed]) for seed in range(3)]
    runs += [run(16, seed, [9.0, 5.1 + 0.05 * (seed - 1)]) for seed in range(3)]
    runs += [run(8, seed, [9.0, 6.0]) for seed in range(3)]
    (sentence,) = [s for s in claims.claims(group_runs(runs), again(runs)) if "Graceful" in s]
    assert "32 to 16 costs something is not supported by these runs" in sentence
    assert "16 to 8 costs something is supported" in sentence


@pytest.mark.parametrize(
    ("with_", "without", "verdict"),
    [
        (
            ["finished"] * 2,
            ["diverged"] * 2,
            "Only the runs with are stable: here stability comes from Invariant Scalars",
        ),
        (
            ["finished"] * 2,
            ["finished"] * 2,
            "do not show Invariant Scalars to be what makes it so",
        ),
        (["finished"] * 2, ["finished", "diverged"], "no clear answer"),
        (["diverged"] * 2, ["diverged"] * 2, "Neither is stable"),
        (["diverged"] * 2, ["finished"] * 2, "Only the runs without are stable"),
    ],
)
def test_what_invariant_scalars_do_is_said(
    with_: list[str], without: list[str], verdict: str
) -> None:
    runs = [run(1, seed, [9.0, 8.0], status=status) for seed, status in enumerate(with_)]
    runs += [
        run(1, seed, [9.0, 8.5], status=status, **{"method.invariant_scalars": False})
        for seed, status in enumerate(without)
    ]
    (sentence,) = [
        s for s in claims.claims(group_runs(runs), again(runs)) if s.startswith("Invariant Scalars")
    ]
    assert verdict in sentence
    assert ("Last loss with less that without: -0.500 ± 0.000 nats" in sentence) == (
        "diverged" not in with_ + without
    )


def test_a_finite_explosion_is_unstable_and_settings_are_told_apart() -> None:
    runs = [run(8, 0, [9.0, 7.0]), run(8, 0, [9.0, 12.0], **{"method.hashing": "uniform"})]
    runs += [run(8, 0, [9.0, 7.0], **{"optim.lr": 0.1})]
    runs += [run(8, 0, [9.0, 7.5], **{"optim.lr": 0.1, "method.hashing": "uniform"})]
    first, second = [
        s for s in claims.claims(group_runs(runs), again(runs)) if "Balanced Hashing" in s
    ]
    assert first.startswith(
        "optim.lr=0.01: Balanced Hashing at R = 8: balanced, 0 of 1 evaluations got worse"
    )
    assert "1 of 1 runs ended above their first loss. Only the runs balanced are stable" in first
    assert second.startswith("optim.lr=0.1: ")
    assert "Both are stable" in second
    assert second.endswith("One seed.")


def test_missing_and_infinite_numbers_do_not_stop_a_report() -> None:
    assert math.isnan(estimate([1.0, math.nan]).mean)
    assert estimate([1.0, math.inf]) == Estimate(math.inf, None, 2)
    bare = run(8, 0, [9.0, 8.0])
    table = losses.final_losses(group_runs([bare]), again([bare]))
    assert table.rows[0]["kept_all"] is None
    assert "nan" not in table.markdown()
    assert "NaN" not in json.dumps(table.json(), allow_nan=False)


def test_state_between_steps_has_its_column_where_there_is_some() -> None:
    def made(method: str, state: int) -> RunResult:
        row = {
            "step": 2000,
            "val/loss": 5.0,
            "mem/saved_bytes": 9000,
            "mem/saved_bytes/linear inputs": 0,
        }
        row |= {"mem/saved_bytes/sketches": 512, "mem/estimator_bytes": state}
        options = PAPER | {"method.name": method, "seed": 0}
        return RunResult(
            Path("nowhere"),
            options,
            {"status": "finished", "run_id": method, "step": 2000, "data": ""},
            [row],
        )

    def table(*found: RunResult) -> Table:
        return losses.final_losses(group_runs(found), again(list(found)))

    exact = made("exact", 0)
    without = table(exact, made("gaussian", 0)).markdown()
    assert "state" not in without.lower()
    some = table(exact, made("subspace", 3 * 2**20))
    assert [row["state"] for row in some.rows] == [None, "3.00 MiB"]
    assert "| kept in all | state " in some.markdown().splitlines()[0]
    assert "State: what layers hold between steps, on top of what is kept" in some.markdown()
    assert "stands in" not in some.markdown()
    stored = table(exact, made("subspace", 2048), made("ema_sketch", 1024)).markdown()
    assert "ema_sketch: the state stands in for the layers' inputs" in stored
    assert "subspace: the state" not in stored


def test_tables_leave_out_empty_columns_and_keep_raw_numbers() -> None:
    columns = {"a": Column("a|b"), "b": Column("never"), "c": Column("c", digits=1, sign=True)}
    table = Table("t", "T", columns, [{"a": "x", "c": estimate([1.0, 3.0])}], ["note"])
    assert table.markdown().splitlines()[0] == r"| a\|b | c           |"
    assert table.csv().splitlines()[0] == "a,c,c_half_width,c_count"
    assert table.csv().splitlines()[1].startswith("x,2.0,12.7")
    assert table.json()["rows"][0]["c"]["mean"] == 2.0


def test_figures_of_nothing_are_not_drawn(tmp_path: Path) -> None:
    groups = group_runs([run(1, 0, [9.0, 8.0]), run(1, 1, [9.0, 8.0, 7.0])])
    assert not stability.quality_curves(groups).shows_something()
    assert validation_curves(groups).shows_something()


def test_a_figure_is_drawn_from_what_is_kept_and_small(tmp_path: Path) -> None:
    """The same bytes from the figure and from its JSON; text stays text."""
    losses_by_seed = ([9.0, 8.0, 7.0], [9.0, 8.1, 7.2])
    groups = group_runs([run(1, seed, values) for seed, values in enumerate(losses_by_seed)])
    figure = validation_curves(groups)
    assert figure.panels[0].lines[0].y == pytest.approx([9.0, 8.05, 7.1])
    assert figure.panels[0].lines[0].half == pytest.approx([0.0, 12.7062 * 0.05, 12.7062 * 0.1])
    first = figure.draw(tmp_path / "a").read_bytes()
    again = Figure.from_json(json.loads(json.dumps(figure.json())))
    assert again.draw(tmp_path / "b").read_bytes() == first
    assert b">basis R=1 (2 seeds)</text>" in first
    assert len(first) < 20_000


def test_slope_is_the_exponent() -> None:
    assert slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


def kept_dense(B: int, L: int, R: int) -> int:
    """Bytes of BASIS: sketches, and the hashing of B rows that all 4 L + 1 dense layers share: rows
    in order, two tables of signs, one longer by the number of layers, and where R bins begin.
    """
    return 4 * (L * 7 * R * 64 + B + B + (B + 4 * L + 1) + R)


def test_counts_of_a_step_by_formula() -> None:
    """The paper's model: exact keeps 6 tensors of B x C per block for its dense layers, BASIS 7 of
    R x C (proj's own too).
    """
    exact, sketched = (count(Point(method, B=128, L=3, R=16)) for method in ("exact", "basis"))
    blocks, head = 3 * 12 * 64 * 64, 50257 * 64
    assert exact["kept_dense"] == 3 * 6 * 128 * 64 * 4
    assert sketched["kept_dense"] == kept_dense(B=128, L=3, R=16)
    # Of the head's dW exact keeps all V x C numbers, BASIS its factors V x R and R x C.
    saved = 4 * (50257 * 64 - 16 * (50257 + 64))
    assert exact["kept_besides"] - sketched["kept_besides"] == saved
    assert (exact["dw_blocks"], exact["dw_head"]) == (2 * 128 * blocks, 2 * 128 * head)
    # Of several blocks of logits too: 512 rows are two.
    assert count(Point("exact", B=512, L=3, R=16))["dw_head"] == 2 * 512 * head
    signs = 2 * 16 * 128 * 50257  # the head's S dY is a product with the sign matrix
    assert (sketched["dw_blocks"], sketched["dw_head"]) == (2 * 16 * blocks, 2 * 16 * head + signs)


def test_complexity_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complexity, "BASE", {"B": 64, "L": 1, "R": 4})
    monkeypatch.setattr(complexity, "AXES", {"B": (64, 128), "L": (1, 2), "R": (4, 8)})
    monkeypatch.setattr(complexity, "milliseconds", lambda point: 1.0 * point.B)
    table, paths = complexity.report(tmp_path, command="the command")
    assert all(path.stat().st_size > 0 for path in paths)
    assert {path.suffix for path in paths} == {".md", ".csv", ".json", ".svg"}
    rows = {(row["quantity"], row["method"]): row for row in table.rows}
    assert rows["step time (ms)", "exact"]["B"] == pytest.approx(1.0)
    kept = rows["kept by dense layers (bytes)", "basis"]
    base, more_r, more_b = (
        kept_dense(**{"B": 64, "L": 1, "R": 4} | more) for more in ({}, {"R": 8}, {"B": 128})
    )
    assert kept["R"] == pytest.approx(math.log2(more_r / base), abs=0.001)
    assert kept["B"] == pytest.approx(math.log2(more_b / base), abs=0.001)
    assert rows["kept by dense layers (bytes)", "exact"].get("R") is None
    assert "the command" in (tmp_path / "complexity.md").read_text()


def test_slopes_of_exact_bytes_and_flops_are_one() -> None:
    rows = complexity.measure(
        [Point("exact", **BASE | {"B": rows}) for rows in (64, 128, 256)],
        timed=False,
        progress=False,
    )
    table = {(row["quantity"], row["method"]): row for row in complexity.slopes(rows).rows}
    assert table["kept by dense layers (bytes)", "exact"]["B"] == pytest.approx(1.0)
    assert table["FLOPs of dW, blocks", "exact"]["B"] == pytest.approx(1.0)
    assert table["FLOPs of dW, blocks", "exact"]["paper_B"] == 1
