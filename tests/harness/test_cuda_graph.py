"""Steps replayed as CUDA graphs, against steps taken one operation at a time: recorded and run
again on the CPU (tape.py), so that all that Python does beside the operators is seen to be
unnecessary.
"""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.errors import CompactHydraException
from tape import Tape, Tapes, use_tapes
from tiny import losses, train_here, values_of

import harness.set_up
import harness.step
import train
from harness import device
from harness.compose import load
from harness.device import launch_bound, resolve
from harness.run import Run
from harness.step import CapturedStep, CudaGraphs, EagerStep
from models import GPTConfig

RATE = "optim.lr=0.0078125"  # a power of two is the same in float32
METHODS = {
    "exact": ["method=exact"],
    "basis": ["method=basis", "method.rank=3"],
    "basis, bfloat16": ["method=basis", "method.rank=3", "precision=bfloat16"],
    "basis, lean": ["method=basis", "method.rank=3", "activations=lean"],
    "basis, checkpoint": ["method=basis", "method.rank=3", "activations=checkpoint"],
    "exact, sus": ["method=exact", "attention=sus", "attention.c=3"],
    "transform": ["method=transform", "method.every=3"],
    "subspace": ["method=subspace", "method.rank=3", "method.every=5"],
    "ema_sketch": ["method=ema_sketch", "method.rank=3"],
    "quantized": ["method=quantized"],
}
ACCUMULATED = ["micro_batch_size=4", "tokens_per_step=128"]
COSINE = ["optim=adamw", "optim.schedule=cosine", "optim.warmup_steps=3", "optim.grad_clip=0.5"]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, runs of this process replay their steps from tapes."""
    return lambda: use_tapes(monkeypatch, always=True)


@pytest.fixture(autouse=True)
def rates_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that float32 holds: what is left is equal to the last bit."""
    original = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *args: float(torch.tensor(original(*args))))


QUICK = [("exact", "adamw"), ("basis, lean", "adamw"), ("subspace", "adamw"), ("transform", "sgd")]
WITH = [*((method, "adamw") for method in METHODS), ("exact", "sgd"), ("transform", "sgd")]


@pytest.mark.parametrize(
    ("method", "optim"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in WITH],
)
def test_replayed_steps_are_the_steps(
    method: str, optim: str, captured: Callable[[], None], data: Path, tmp_path: Path
) -> None:
    options = [*METHODS[method], RATE, "steps=36", "checkpoint.every=0", "data.order=random"]
    options += ["optim.momentum=0.5"] if optim == "sgd" else [*ACCUMULATED, *COSINE]
    options += ["model.dropout=0.1"] if method == "exact" else []
    train_here(data, tmp_path / "taken", *options)
    captured()
    train_here(data, tmp_path / "replayed", *options)
    assert losses(tmp_path / "replayed") == losses(tmp_path / "taken")
    kinds = 4 if method in ("transform", "subspace") else 2  # does it learn, is it shown
    assert len(Tapes.made) <= kinds
    assert Tapes.replays[0] >= 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "optim"),
    [
        (["method=exact"], []),
        (["method=basis", "method.rank=32"], COSINE),
        (["method=transform"], []),
    ],
)
def test_the_papers_model(
    method: list[str],
    optim: list[str],
    captured: Callable[[], None],
    data: Path,
    tmp_path: Path,
) -> None:
    options = ["model.vocab_size=50257", "model.block_size=64", "model.n_layer=2"]
    options += ["model.n_embd=64", "steps=100", "eval.every=0", "checkpoint.every=0"]
    train_here(data, tmp_path / "taken", *options, *method, *optim)
    captured()
    train_here(data, tmp_path / "replayed", *options, *method, *optim)
    assert losses(tmp_path / "replayed") == losses(tmp_path / "taken")
    assert Tapes.replays[0] >= 75


def test_a_replayed_run_is_resumed_to_the_last_bit(
    captured: Callable[[], None], data: Path, tmp_path: Path
) -> None:
    options = [*METHODS["transform"], *ACCUMULATED, *COSINE, "optim.schedule=constant"]
    options += ["log.every=7", "checkpoint.every=10"]
    train_here(data, tmp_path / "taken", *options, "steps=44")
    captured()
    train_here(data, tmp_path / "straight", *options, "steps=44")
    for steps in (20, 44):
        train_here(data, tmp_path / "resumed", *options, f"steps={steps}")
    assert Tapes.replays[0] > 0
    straight = losses(tmp_path / "straight")
    assert straight == losses(tmp_path / "taken")
    resumed = {row["step"]: row for row in losses(tmp_path / "resumed")}
    assert all(resumed[row["step"]] == row for row in straight if row["step"] > 21)


def test_it_is_not_continued_one_operation_at_a_time(
    captured: Callable[[], None],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train_here(data, tmp_path / "run", "steps=4")
    captured()
    with pytest.raises(CompactHydraException, match="cuda_graph: False -> True"):
        train_here(data, tmp_path / "run", "steps=8")


def test_looks_at_the_gradient_and_the_monitor_change_nothing(
    captured: Callable[[], None], data: Path, tmp_path: Path
) -> None:
    options = [*METHODS["transform"], RATE, "steps=40", "checkpoint.every=0", "log.every=4"]
    watched = ["diagnostics.monitor=true", "diagnostics.every=6", "diagnostics.masks=2"]
    train_here(data, tmp_path / "taken", *options, *watched)
    captured()
    train_here(data, tmp_path / "replayed", *options, *watched)
    assert losses(tmp_path / "replayed") == losses(tmp_path / "taken")
    assert Tapes.replays[0] >= 20


def test_graphs_are_made_again_when_the_rank_changes(
    captured: Callable[[], None], data: Path, tmp_path: Path
) -> None:
    options = ["method=subspace", "method.rank=2", "method.every=4", "adaptive_rank.every=12"]
    options += ["adaptive_rank.low=0.4", "adaptive_rank.high=0.401", "adaptive_rank.patience=1"]
    options += [RATE, "steps=60", "checkpoint.every=0"]
    train_here(data, tmp_path / "taken", *options)
    captured()
    train_here(data, tmp_path / "replayed", *options)
    replayed = losses(tmp_path / "replayed")
    assert replayed == losses(tmp_path / "taken")
    assert len({row["rank/estimator"] for row in replayed if "rank/estimator" in row}) > 1
    assert len(Tapes.made) > 3  # as many as a run of one rank makes


# Numbers go between host and device there only if the device is the CPU.
OF_THE_CPU = {
    "loss_head.linear_cross_entropy",
    "loss_head.backward",
    "gaussian_code._blocks",
    "tables.table",
}
FORBIDDEN = (  # whose shape depends on values, or sure to wait, or with a generator's noise
    *("nonzero", "masked_select", "unique", "bincount", "repeat_interleave.Tensor"),
    *("_linalg_eigh", "_linalg_svd", "linalg_lstsq", "randint", "random_", "index.Tensor(bool"),
)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_step_is_the_same_operations_whatever_its_numbers(
    method: str, captured: Callable[[], None], data: Path, tmp_path: Path
) -> None:
    captured()
    options = [*METHODS[method], *ACCUMULATED, *COSINE, "model.dropout=0"]
    with run_of(data, tmp_path / "run", *options) as run:
        step = CapturedStep(run)
        for _ in range(3):
            step(0.001, True)
            run.step += 1
        tapes = []
        run.step = 12  # no method but ema_sketch learns there
        for number in (13, 14):
            run.step = number
            step._inputs.load(number)
            step._rate.fill_(0.001 * number)
            with Tape() as tape:
                step._work(True)
            tapes.append(tape)
    first, second = (tape.outline() for tape in tapes)
    assert first == second
    assert tapes[0].looks <= OF_THE_CPU, tapes[0].looks - OF_THE_CPU
    assert [call for call in first if call.startswith(tuple(f"aten.{f}" for f in FORBIDDEN))] == []


class run_of:
    """A run that has been set up, as a context."""

    def __init__(self, data: Path, folder: Path, *options: str) -> None:
        self.run = harness.set_up.set_up(load(values_of(data, *options)), folder)

    def __enter__(self) -> Run:
        return self.run

    def __exit__(self, *_: object) -> None:
        self.run.metrics.close()


def test_what_differs_from_step_to_step_is_seen_by_a_replay(
    captured: Callable[[], None], data: Path, tmp_path: Path
) -> None:
    """The test of the tests: a number of the host that is baked into the record shows."""
    options = ["method=basis", "method.rank=3", RATE, "steps=20", "checkpoint.every=0"]
    train_here(data, tmp_path / "taken", *options)
    captured()
    original = harness.step.assign_keys

    def baked(model: Any, base: torch.Tensor, **numbers: int) -> None:
        original(model, torch.full((), int(base), dtype=torch.int64), **numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.step, "assign_keys", baked)
        train_here(data, tmp_path / "replayed", *options)
    assert losses(tmp_path / "replayed") != losses(tmp_path / "taken")


class Refusing(Tapes):
    """No step can be recorded: `error`."""

    error: Exception = RuntimeError("operation not permitted when stream is capturing\nmore")

    def record(self, work: Callable[[], None]) -> tuple[Callable[[], None], int]:
        work()
        raise self.error


def test_what_cannot_be_captured_is_taken_after_a_warning(
    captured: Callable[[], None],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    captured()

    class Unrecorded(Refusing):
        def record(self, work: Callable[[], None]) -> tuple[Callable[[], None], int]:
            raise self.error

    monkeypatch.setattr(CapturedStep, "graphs", Unrecorded)
    options = [RATE, "steps=12", "checkpoint.every=0"]
    with caplog.at_level(logging.WARNING):
        train_here(data, tmp_path / "run", *options)
    said = [r.getMessage() for r in caplog.records if "can't be captured" in r.getMessage()]
    assert len(said) == 2  # once for each kind of step
    assert said[0].startswith("cuda_graph=null: step 2 and its like can't be captured (operation")
    monkeypatch.setattr(harness.set_up, "resolve", resolve)
    train_here(data, tmp_path / "taken", *options)
    assert losses(tmp_path / "run") == losses(tmp_path / "taken")


@pytest.mark.parametrize(
    ("error", "said", "reason"),
    [
        (Refusing.error, r"^cuda_graph=true: a step .* \(operation not .*\); give cuda", "capt"),
        (torch.OutOfMemoryError("no"), "^out of memory on .* cuda_graph=false", "out of memory"),
    ],
)
def test_a_capture_that_was_asked_for_and_fails_ends_the_run(
    error: Exception,
    said: str,
    reason: str,
    captured: Callable[[], None],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured()
    monkeypatch.setattr(Refusing, "error", error)
    monkeypatch.setattr(CapturedStep, "graphs", Refusing)
    asked = harness.set_up.resolve
    monkeypatch.setattr(
        harness.set_up, "resolve", lambda *args, **more: asked(*args, **more | {"cuda_graph": None})
    )
    with pytest.raises(CompactHydraException, match=said):
        train_here(data, tmp_path / "run", "cuda_graph=true")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert reason in summary["reason"]


def test_out_of_memory_is_not_hidden_by_the_end_of_a_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA complains about a record that was cut short, whatever cut it."""

    class Record:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    for name in ("graph_pool_handle", "CUDAGraph", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph", Record)
    graphs = CudaGraphs(torch.device("cuda"))

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
        graphs.record(lambda: fail(torch.OutOfMemoryError("tried to allocate")))
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.record(lambda: fail(RuntimeError("not permitted")))


def test_a_loss_that_is_no_number_names_its_step(
    captured: Callable[[], None], data: Path, tmp_path: Path
) -> None:
    captured()
    with pytest.raises(CompactHydraException, match=r"^step \d+: the training loss is nan"):
        train_here(data, tmp_path / "run", "method=exact", "optim.lr=1e30")


# The rule of cuda_graph=null.
PAPER = GPTConfig(vocab_size=50257)
SMALL = GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)


@pytest.mark.parametrize(
    ("model", "rows", "bound"),
    [(PAPER, 64, True), (PAPER, 1024, True), (SMALL, 16384, False), (SMALL, 1024, False)],
)
def test_a_step_is_launch_bound_where_its_products_are_short(
    model: GPTConfig, rows: int, bound: bool
) -> None:
    assert launch_bound(model, rows) is bound


def test_the_flops_of_the_rule_are_counted_ones() -> None:
    """At the tokens where the rule turns, what FlopCounterMode counts takes as long as the
    launches.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from models import GPT

    config = GPTConfig(vocab_size=3000, n_layer=3, n_embd=96, n_head=2, block_size=128)
    with torch.device("meta"):
        model, tokens = GPT(config), torch.zeros(2, 128, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            logits = model(tokens)
    # forward; a full square of attention is counted there, and half of it computed
    square = 4 * 3 * 2 * 128 * 128 * 96
    forward = counter.get_total_flops()
    assert logits.shape == (2, 128, 3000)
    attention = square if forward > 2 * 256 * (3 * 12 * 96**2 + 3000 * 96) else 0
    counted = 3 * (forward - attention / 2) / 256  # of a token
    turn = (3 * device.LAUNCHES[0] + device.LAUNCHES[1]) * device.LAUNCH_SECONDS * device.FLOPS
    rows = turn / counted
    assert launch_bound(config, math.floor(0.999 * rows))
    assert not launch_bound(config, math.ceil(1.001 * rows))


def test_null_graphs_small_models_on_cuda_and_compiles_large_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        decided = {
            (graph, small, compile): (r.cuda_graph, r.compile)
            for graph in (None, True, False)
            for small in (True, False)
            for compile in (None, True, False)
            for r in [resolve("auto", "float32", compile, cuda_graph=graph, small=small)]
        }
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert decided[None, True, None] == (True, False)
    assert decided[None, False, None] == (False, True)
    assert decided[None, True, True] == (True, True)
    assert decided[True, False, None] == (True, False)
    assert decided[False, True, None] == (False, True)
    assert decided[True, True, True] == (True, True)


@pytest.mark.parametrize(
    ("options", "by_default"),
    [
        ([], True),
        (["method=zeroth_order"], False),
        (["method=subspace", "method.energy=0.9"], False),
        (["activations=budget"], False),
        (["model.n_embd=1024", "model.block_size=1024", "micro_batch_size=8"], False),
    ],
)
def test_which_runs_are_captured_by_default(
    options: list[str], by_default: bool, data: Path
) -> None:
    assert load(values_of(data, *options)).captured_by_default is by_default


def test_without_graphs_a_step_is_eager(data: Path, tmp_path: Path) -> None:
    with run_of(data, tmp_path / "run") as run:
        assert type(harness.step.make_step(run)) is EagerStep
