"""The instruments of the benchmarks: turns, quartiles, and a table of a small layer."""

import csv
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bench import bench_gpu, bench_head, bench_layer, bench_step
from bench.alternatives import ALTERNATIVES, offloading
from bench.timing import interleaved, summarise
from experiments.sus import speed as bench_sus
from harness.memory import format_bytes

CHECKPOINTS = ("exact, checkpoint", "exact, checkpoint, 8 bits", "exact, checkpoint, 4 bits")
REPOSITORY = Path(__file__).resolve().parents[2]


def test_alternatives_take_turns_and_warm_ups_do_not_count() -> None:
    order: list[str] = []
    timings = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, turns=3, warm_up=2
    )
    assert order == ["a", "b"] * 5
    assert {name: timing.count for name, timing in timings.items()} == {"a": 3, "b": 3}
    ticks = iter(range(100))
    assert (
        interleaved({"a": lambda: next(ticks)}, turns=2, clock=lambda: next(ticks))["a"].median == 2
    )  # one between two looks
    with pytest.raises(ValueError, match="turns=1"):
        interleaved({"a": lambda: None}, turns=1)


def test_quartiles() -> None:
    timing = summarise([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (timing.low, timing.median, timing.high) == (2.0, 3.0, 4.0)


def test_layer_table(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--rows",
        "64",
        "--in",
        "32",
        "--out",
        "48",
        "--rank",
        "4",
        "--turns",
        "2",
        "--dtype",
        "float32",
    ]
    assert bench_layer.main([*options, "--csv", str(tmp_path / "layer.csv")]) == 0
    lines = (tmp_path / "layer.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["layer", "exact", "limit", "basis R=4"]
    kept = dict(
        zip(["exact", "limit", "basis"], [line.split(",")[9] for line in lines[1:]], strict=True)
    )
    # B x N; nothing; R x N, and a hashing of B rows: their order, two tables of signs (one longer
    # by 2, the number of layers), and where R bins begin.
    hashing = 4 * (64 + 64 + 64 + 2 + 4)
    assert kept == {
        "exact": "8.00 KiB",
        "limit": "0 B",
        "basis": format_bytes(4 * 4 * 32 + hashing),
    }
    assert "of limit" in capsys.readouterr().out


def test_head_table(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rows", "64", "--width", "32", "--classes", "1000", "--rank", "4", "--turns", "2"]
    assert bench_head.main([*options, "--csv", str(tmp_path / "head.csv")]) == 0
    with (tmp_path / "head.csv").open() as file:
        rows = {row["head"]: row for row in csv.DictReader(file)}
    logits = 64 * 1000 * 4
    assert rows["F.linear, F.cross_entropy"]["kept"] == format_bytes(
        logits + 64 * 32 * 4 + 64 * 8 + 4
    )  # log_softmax, X, targets
    assert rows["basis exact"]["kept"] == format_bytes((64 + 1000) * 32 * 4)  # dX and dW
    # dX and the two factors of dW
    assert rows["basis R=4"]["kept"] == format_bytes((64 * 32 + 4 * (1000 + 32)) * 4)
    assert "peak" in capsys.readouterr().out


def test_step_table(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "model.n_layer=1",
        "model.n_embd=64",
        "model.n_head=2",
        "model.block_size=64",
        "model.vocab_size=97",
    ]
    assert (
        bench_step.main([*small, "--turns", "2", "--nanogpt", "--csv", str(tmp_path / "step.csv")])
        == 0
    )
    with (tmp_path / "step.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["exact, plain", "exact, lean", "basis, plain", "basis, lean", "nanogpt"]
    assert [row["step"] for row in rows] == names
    assert rows[0]["ratio"] == "1.0"
    kept = {row["step"]: row["kept"] for row in rows}
    assert kept["basis, lean"] != kept["exact, plain"]
    assert "tokens/s" in capsys.readouterr().out
    assert bench_step.main(["model.n_head=7"]) == 1
    options = ["--methods", "exact", "quantized bits=2", "--activations", "plain", "--turns", "2"]
    assert bench_step.main([*small, *options, "--csv", str(tmp_path / "bits.csv")]) == 0
    with (tmp_path / "bits.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == [
            "exact, plain",
            "quantized bits=2, plain",
        ]


@pytest.mark.slow
def test_gpu_benchmark_runs_with_torch_and_numpy_alone(tmp_path) -> None:
    blocked = ("hydra", "omegaconf", "wandb", "datasets", "tiktoken", "tqdm", "scipy", "matplotlib")
    program = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({blocked})); sys.argv[1:] = {{}}; "
    )
    program += "runpy.run_module('scripts.bench_gpu', run_name='__main__')"
    options = [
        "--out",
        str(tmp_path),
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--precision",
        "float32",
        "--turns",
        "2",
    ]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program.format([*options, *more])]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)

    done = run()
    assert done.returncode == 0, done.stderr
    for name, first in {
        "step": "exact, whole logits, context 64",
        "layer": "exact",
        "head": "F.linear, F.cross_entropy",
    }.items():
        with (tmp_path / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows[0][name] == first
        assert all(float(row["milliseconds"]) > 0 for row in rows)
        if name == "step":
            steps = [row["step"].removesuffix(", context 64") for row in rows[1::2]]
            assert steps == [n for n, row in ALTERNATIVES.items() if not row.compiled]
            kept = {row["step"].removesuffix(", context 64"): row["kept"] for row in rows}
            assert kept["exact, offload"] == "0 B"
            assert len({kept[n] for n in ("exact, plain", "exact, recompute", *CHECKPOINTS)}) == 5
        elif name == "layer":
            assert {row["layer"] for row in rows} > {"transform 4 bits", "quantized 3.75 bits"}
            assert {int(row["B"]) for row in rows} == {64, 32}
    assert not (tmp_path / "frontier.svg").exists()
    done = run("--seconds", "0", "--parts", "step", "layer")
    assert done.returncode == 1
    assert "left out for lack of time: layer 64 x 32 x 128, basis" in done.stderr


# Dynamo's own look at .grad of a block's input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_alternatives_are_compiled_each_by_its_own_settings(tmp_path: Path) -> None:
    """The same model under four settings: a graph of one does not serve another."""
    rows = [
        "exact, plain",
        "exact, memory budget 0.25",
        "exact, FP8 saved",
        "exact, checkpoint, 8 bits",
    ]
    options = ["--size", "tiny", "--device", "cpu", "--precision", "float32", "--turns", "2"]
    options += ["--compile", "--parts", "step", "--out", str(tmp_path), "--rows", *rows]
    assert bench_gpu.main(options) == 0
    with (tmp_path / "step.csv").open() as file:
        found = {row["step"].removesuffix(", context 64"): row for row in csv.DictReader(file)}
    assert list(found)[1:] == rows
    kept = {name: found[name]["kept"] for name in rows}
    assert len(set(kept.values())) == len(rows)
    assert {row["compile"] for row in found.values()} == {"yes"}


def test_offloaded_tensors_come_back_as_they_were() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64) for _ in range(3)]
    x = torch.randn(128, 64)
    found = []
    for around in (nullcontext(), offloading({w.data_ptr() for m in layers for w in [m.weight]})):
        y = x
        with around:
            for layer in layers:
                y = torch.relu(layer(y))
        y.sum().backward()
        found.append([layer.weight.grad for layer in layers])
        for layer in layers:
            layer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--rows", "exact, nothing"], "--rows 'exact, nothing': must be among exact, plain;"),
        (["--rows", "exact, FP8 saved"], "--rows 'exact, FP8 saved': torch.compile does this"),
        (["--contexts", "0"], "--contexts must be at least 1"),
    ],
)
def test_wrong_rows_of_the_gpu_benchmark_are_named(
    wrong: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_gpu.main(["--out", str(tmp_path / "out"), "--device", "cpu", *wrong])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_alternative_that_fails_is_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Out of memory in one alternative, and in the baseline: the others are measured."""
    names = ("exact, plain", "exact, checkpoint", "basis R=64, plain")
    monkeypatch.setattr(bench_gpu, "ALTERNATIVES", {n: bench_gpu.ALTERNATIVES[n] for n in names})
    real = bench_gpu.make_step
    fails = bench_gpu.ALTERNATIVES["exact, checkpoint"]

    def make_step(size: bench_gpu.Size, context: int, alternative: bench_gpu.Alternative, *rest):
        if alternative == fails or (context == 16 and alternative.plain_loss):
            raise torch.OutOfMemoryError("tried to allocate 3 GiB\nmore lines")
        return real(size, context, alternative, *rest)

    monkeypatch.setattr(bench_gpu, "make_step", make_step)
    quick = ["--size", "tiny", "--device", "cpu", "--precision", "float32", "--turns", "2"]
    options = [*quick, "--parts", "step", "--contexts", "64", "16", "--out", str(tmp_path)]
    assert bench_gpu.main(options) == 1
    with (tmp_path / "step.csv").open() as file:
        rows = {row["step"]: row for row in csv.DictReader(file)}
    failed = {name for name, row in rows.items() if row["failed"]}
    assert failed == {
        "exact, checkpoint, context 64",
        "exact, checkpoint, context 16",
        "exact, whole logits, context 16",
    }
    assert all(rows[n]["failed"] == "OutOfMemoryError: tried to allocate 3 GiB" for n in failed)
    assert float(rows["basis R=64, plain, context 64"]["ratio"]) > 0
    assert rows["basis R=64, plain, context 16"]["ratio"] == ""  # nothing to compare with
    assert float(rows["basis R=64, plain, context 16"]["milliseconds"]) > 0
    assert "failed: exact, checkpoint, context 64" in capsys.readouterr().err


def test_attention_table(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lengths", "64", "32", "--heads", "3", "--width", "8", "--c", "4", "--turns", "2"]
    assert bench_sus.main([*options, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"attention.{end}" for end in ("csv", "md", "svg")
    }
    with (tmp_path / "attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["n"], row["attention"]) for row in rows] == [
        (n, name) for n in ("32", "64") for name in ("exact", "sus dense", "sus sparse")
    ]
    size = 3 * 64 * 4  # bytes of a head's width at the longer length
    kept = [float(row["kept_entries"]) for row in rows[3:]]
    assert [row["kept"] for row in rows[3:]] == [
        format_bytes(b) for b in (33 * size, 32 * size + 8, 32 * size + 8)
    ]
    assert kept[0] == 32.5
    assert all(2 < drawn <= 4.2 for drawn in kept[1:])
    assert [row["backward_ratio"] for row in rows[::3]] == ["1.0", "1.0"]
    said = capsys.readouterr().out
    assert "Exponent of n" in said
    assert sum(f"\n{kind}: " in said for kind in ("Forward and backward", "Backward")) == 2
    with pytest.raises(SystemExit):
        bench_sus.main(["--c", "0"])


@pytest.mark.parametrize(
    ("ratios", "length", "extrapolated", "said"),
    [
        ([4.0, 2.0, 0.5], math.sqrt(2) * 200, False, "break-even at n = 283"),
        (
            [4.0, 3.0, 2.0],
            400 * 2 ** (math.log(2) / math.log(1.5)),
            True,
            "no break-even up to n = 400; at about 1,308 if",
        ),
        ([2.0, 2.0, 2.5], None, True, "none in sight"),
        ([0.5, 1.5, 0.75], 300.0, False, "break-even at n = 300"),
        ([0.9, 0.8, 0.7], 100.0, False, "or faster at every length"),
    ],
)
def test_break_even(
    ratios: list[float], length: float | None, extrapolated: bool, said: str
) -> None:
    rows = [
        {"n": n, "attention": "sus sparse", "whole_ratio": r}
        for n, r in zip((100, 200, 400), ratios, strict=True)
    ]
    found = bench_sus.break_even(rows, "whole")
    assert said in bench_sus.sentence(rows, "whole")
    assert found[1] == extrapolated
    assert found[0] == (length if length is None else pytest.approx(length))
