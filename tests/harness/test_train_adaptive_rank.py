"""adaptive_rank in train.py: the rank follows the error both ways, is measured and logged, and a
resumed run has it too.
"""

import itertools
from pathlib import Path

import pytest
import torch
from hydra.errors import CompactHydraException
from tiny import losses, train_here

from basis import Subspace
from basis.diagnostics.adaptive_rank import AdaptiveRank
from basis.diagnostics.budget import state_bytes
from basis.estimators import ESTIMATORS
from harness import activations
from harness.folder import rundir
from harness.folder.checkpoint import Checkpoints
from harness.folder.run_id import read_run_file

# At rank 2 the error is about 0.8, at rank 8 about 0.3: between these limits no rank is left alone
# for long.
RESTLESS = [
    "method=subspace",
    "method.rank=2",
    "adaptive_rank.low=0.5",
    "adaptive_rank.high=0.501",
    "adaptive_rank.patience=1",
]


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = Checkpoints(run / "checkpoints").load_latest().state["model"]
    return state


def test_the_rank_rises_and_falls_with_the_error_and_memory_is_that_of_the_new_rank(
    data: Path, tmp_path: Path
) -> None:
    train_here(
        data,
        tmp_path,
        *RESTLESS,
        "adaptive_rank.every=3",
        "adaptive_rank.up=4",
        "steps=30",
        "eval.every=0",
    )
    rows = losses(tmp_path)
    assert [row["step"] for row in rows if "rank/error" in row] == list(range(3, 31, 3))
    rule = AdaptiveRank(2, low=0.5, high=0.501, maximum=14, up=4, patience=1)
    ranks = [rows[0]["rank/estimator"]]
    widths = (16, 64, 16)  # fc, proj, head
    for row in rows:
        if "rank/error" in row:
            assert row["rank/estimator"] == rule.observe(row["rank/error"])
            assert ("mem/saved_bytes" in row) == (row["rank/estimator"] != ranks[-1])
            ranks.append(row["rank/estimator"])
        if "mem/saved_bytes" in row:
            rank = row["rank/estimator"]
            assert row["mem/estimator_bytes"] == sum(
                state_bytes(Subspace(rank), width) for width in widths
            )
            assert row["mem/saved_bytes/sketches"] == sum(
                4 * (16 * rank + width) for width in widths[:2]
            )
    steps = {after - before for before, after in itertools.pairwise(ranks)}
    assert {4, -1} <= steps
    summary = rundir.read_summary(tmp_path)
    assert summary["rank/estimator"] == ranks[-1]
    last = [row for row in rows if "mem/saved_bytes" in row][-1]
    assert summary["memory"] == {
        name: value for name, value in last.items() if name in summary["memory"]
    }
    assert "adaptive=0.5..0.501" in read_run_file(tmp_path)["tags"]
    assert weights(tmp_path)["head.estimator_directions"].shape == (16, ranks[-1])


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["precision=bfloat16", "activations=lean"],
    ],
    ids=["plain", "bfloat16, lean"],
)
@pytest.mark.parametrize("method", ["ema_sketch", "low_rank", "subspace"])
def test_looks_alone_change_nothing(
    method: str, more: list[str], data: Path, tmp_path: Path
) -> None:
    options = [
        f"method={method}",
        "method.rank=3",
        "micro_batch_size=4",
        "model.dropout=0.1",
        *more,
    ]
    train_here(data, tmp_path / "without", *options)
    looks = [
        "adaptive_rank.every=4",
        "adaptive_rank.low=0",
        "adaptive_rank.high=100",
        "adaptive_rank.maximum=8",
    ]
    train_here(data, tmp_path / "with", *options, *looks)
    rows = losses(tmp_path / "with")
    errors = [row.pop("rank/error") for row in rows if "rank/error" in row]
    assert len(errors) == 5
    assert all(0 < error < 2 for error in errors)
    assert {row.pop("rank/estimator") for row in rows if "rank/estimator" in row} == {3}
    assert rows == losses(tmp_path / "without")
    before, after = weights(tmp_path / "without"), weights(tmp_path / "with")
    assert all(torch.equal(before[name], after[name]) for name in before)


CONTINUED = {
    "subspace": [*RESTLESS, "adaptive_rank.every=4", "tokens_per_step=32", "model.dropout=0.1"],
    "ema_sketch, monitor": [
        *("method=ema_sketch", "method.rank=4", "micro_batch_size=4", "data.order=random"),
        *(
            "adaptive_rank.every=3",
            "adaptive_rank.low=0.9",
            "adaptive_rank.high=0.95",
        ),  # it falls at every third look
        "diagnostics.monitor=true",
    ],
}


@pytest.mark.parametrize("options", CONTINUED.values(), ids=CONTINUED)
def test_a_resumed_run_has_the_rank_and_all_that_hangs_on_it(
    options: list[str], data: Path, tmp_path: Path
) -> None:
    options = [*options, "checkpoint.every=7", "log.every=3", "diagnostics.every=5"]
    train_here(data, tmp_path / "straight", *options, "steps=30")
    for steps in (7, 12, 30):  # within patience, at a check, and on
        train_here(data, tmp_path / "resumed", *options, f"steps={steps}")
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    ended = (7, 12)  # where a run ends there are a row and an evaluation more
    rows = [
        [row for row in losses(tmp_path / name) if row["step"] not in ended]
        for name in ("straight", "resumed")
    ]
    ranks = {row["rank/estimator"] for row in rows[0] if "rank/estimator" in row}
    assert len(ranks) > 1
    if "diagnostics.monitor=true" in options:  # it goes on with the layers of the new rank
        assert all("monitor/head/gradient_norm" in row for row in rows[0] if "train/loss" in row)
    for straight_row, resumed_row in zip(*rows, strict=True):
        for name in straight_row.keys() & resumed_row.keys() - {"train/loss", "monitor/head/drift"}:
            if not name.endswith("/drift"):  # against the last row
                assert straight_row[name] == resumed_row[name], (straight_row["step"], name)
    with pytest.raises(CompactHydraException, match=r"adaptive_rank\.up: 2 -> 3"):
        train_here(data, tmp_path / "resumed", *options, "steps=40", "adaptive_rank.up=3")


def test_a_method_that_looks_now_and_then_looks_at_once_with_a_new_rank(
    data: Path, tmp_path: Path
) -> None:
    options = ["method.every=50", "adaptive_rank.every=15", "steps=18"]
    train_here(data, tmp_path, *RESTLESS, *options)
    assert losses(tmp_path)[-1]["step"] == 18
    assert weights(tmp_path)["head.estimator_looks"] == 3  # of the steps since; else none


@pytest.mark.slow
def test_a_compiled_run_is_compiled_anew_with_each_rank(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations = []

    def compiled(model: torch.nn.Module, _: object) -> object:
        compilations.append(model)
        return torch.compile(
            model, backend="aot_eager"
        )  # the default one takes half a minute a rank

    monkeypatch.setattr(activations, "compiled", compiled)
    options = [*RESTLESS, "adaptive_rank.every=2", "eval.every=0", "log.every=1", "eval.batches=1"]
    train_here(data, tmp_path / "eager", *options, "steps=5")
    train_here(data, tmp_path / "straight", *options, "compile=true", "steps=5")
    assert len(compilations) == 3
    straight, eager = (losses(tmp_path / name) for name in ("straight", "eager"))
    assert [row.get("rank/estimator") for row in straight] == [2, None, 4, None, 6, None]
    assert straight[-1]["train/loss"] == pytest.approx(eager[-1]["train/loss"], rel=1e-5)


def test_methods_without_an_error_to_follow_are_known() -> None:
    assert {name for name, kind in ESTIMATORS.items() if kind.error_tells_rank} == {
        "ema_sketch",
        "low_rank",
        "subspace",
    }
    assert all(kind.knob == "rank" for kind in ESTIMATORS.values() if kind.error_tells_rank)
