"""Steps as CUDA graphs on a GPU: the numbers of eager steps, through a resume too, and the time."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import CompactHydraException
from tape import use_tapes
from tiny import losses, train_here

pytestmark = pytest.mark.gpu

METHODS = {
    "exact": ["method=exact"],
    "basis": ["method=basis", "method.rank=3"],
    "lean": ["method=basis", "method.rank=3", "activations=lean"],
    "checkpoint": ["method=basis", "method.rank=3", "activations=checkpoint"],
    "sus": ["method=exact", "attention=sus", "attention.c=3"],
    "transform": ["method=transform", "method.every=3"],
    "subspace": ["method=subspace", "method.rank=3", "method.every=5"],
    "ema_sketch": ["method=ema_sketch", "method.rank=3"],
    "quantized": ["method=quantized"],
}
STEPS = ["steps=40", "checkpoint.every=0", "micro_batch_size=4"]
COSINE = ["optim=adamw", "optim.schedule=cosine", "optim.warmup_steps=3", "optim.grad_clip=0.5"]


@pytest.fixture(autouse=True)
def tapes_in_a_rehearsal(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        use_tapes(monkeypatch, always=False)


@pytest.fixture
def cuda(device: str) -> None:
    """For what a tape can't tell."""
    if device == "cpu":
        pytest.skip("nothing to rehearse")


def assert_close(first: Path, second: Path, names: tuple[str, ...]) -> None:
    """Rows of metrics agree to the rounding of the learning rate, which training makes larger."""
    ours, others = losses(first), losses(second)
    assert [row["step"] for row in ours] == [row["step"] for row in others]
    for row, other in zip(ours, others, strict=True):
        for name in names:
            if name in row:
                assert math.isclose(row[name], other[name], rel_tol=5e-3), (row["step"], name)


@pytest.mark.parametrize("method", list(METHODS))
def test_replayed_steps_are_the_steps(method: str, data: Path, tmp_path: Path) -> None:
    options = [*METHODS[method], *STEPS, *COSINE, "tokens_per_step=128", "compile=false"]
    train_here(data, tmp_path / "taken", *options, "cuda_graph=false")
    train_here(data, tmp_path / "replayed", *options, "cuda_graph=true")
    assert_close(tmp_path / "replayed", tmp_path / "taken", ("train/loss", "val/loss"))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_steps_are_captured_too(precision: str, data: Path, tmp_path: Path) -> None:
    options = [*METHODS["basis"], *STEPS, "compile=true", f"precision={precision}"]
    train_here(data, tmp_path / "taken", *options, "cuda_graph=false")
    train_here(data, tmp_path / "replayed", *options, "cuda_graph=true")
    assert_close(tmp_path / "replayed", tmp_path / "taken", ("val/loss",))


@pytest.mark.parametrize("method", ["exact", "basis", "transform"])
def test_resumed_to_the_last_bit(method: str, data: Path, tmp_path: Path) -> None:
    options = [*METHODS[method], *STEPS, "model.dropout=0.1", "cuda_graph=true"]
    options += ["deterministic=true"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    try:
        train_here(data, straight, *options)
        for steps in (20, 40):
            train_here(data, resumed, *options, f"steps={steps}")
    finally:
        torch.use_deterministic_algorithms(False)
    rows: list[dict[str, Any]] = [
        {name: row[name] for name in row if name != "mem/peak_bytes"}
        for folder in (straight, resumed)
        for row in losses(folder)
        if row["step"] > 20
    ]
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]


def test_small_models_are_captured_by_default_and_watched_ones_too(
    data: Path, tmp_path: Path
) -> None:
    watched = ["diagnostics.monitor=true", "diagnostics.every=6"]
    train_here(data, tmp_path / "run", *METHODS["transform"], *STEPS, *watched)
    summary = (tmp_path / "run" / "summary.json").read_text()
    assert '"cuda_graph": true' in summary


@pytest.mark.usefixtures("cuda")
def test_the_peak_is_that_of_a_step_although_a_replay_allocates_nothing(
    data: Path, tmp_path: Path
) -> None:
    options = [*METHODS["exact"], *STEPS, "compile=false", "micro_batch_size=64"]
    peaks = {}
    for graph in ("false", "true"):
        train_here(data, tmp_path / graph, *options, f"cuda_graph={graph}")
        peaks[graph] = losses(tmp_path / graph)[-1]["mem/peak_bytes"]
    assert peaks["true"] > 0.8 * peaks["false"]


@pytest.mark.usefixtures("cuda")
def test_out_of_memory_says_so(data: Path, tmp_path: Path) -> None:
    # Parameters fit, a step doesn't: forward keeps 64 GiB and more of a block.
    size = ["model.block_size=1024", "micro_batch_size=4096", "model.n_embd=512", "eval.every=0"]
    with pytest.raises(CompactHydraException, match="out of memory"):
        train_here(data, tmp_path / "run", "method=exact", *STEPS, *size, "cuda_graph=true")
    torch.cuda.empty_cache()


@pytest.mark.slow
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("method", ["exact", "basis"])
def test_the_papers_step_takes_a_millisecond(method: str, data: Path, tmp_path: Path) -> None:
    options = ["model.block_size=64", "model.n_layer=2", "model.n_embd=64"]
    options += ["model.vocab_size=50257", "steps=1000", "log.every=100", "eval.every=0"]
    options += [f"method={method}", "checkpoint.every=0"]
    train_here(data, tmp_path / "run", *options)
    from harness.folder.metrics import read_metrics

    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    seconds = [row["step_seconds"] for row in rows if row["step"] > 200]
    assert sorted(seconds)[len(seconds) // 2] <= 1e-3
