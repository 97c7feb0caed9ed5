"""A sweep is one command that may be given again and again: what is finished is skipped, what was
killed goes on.
"""

import re
import subprocess
import time
from pathlib import Path

import pytest
from composed import composed
from tiny import command, losses, run_command, train_here

from harness.compose import load
from harness.folder import rundir


def test_a_finished_cell_is_skipped_within_two_seconds(data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path)
    start = time.perf_counter()
    train_here(data, tmp_path)
    assert time.perf_counter() - start < 2.0  # with the composition of its configuration


@pytest.mark.slow
def test_repeated_sweep_skips_continues_and_reports(data: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    cells = ["experiment=paper", "row=exact,r8", "optim.lr=0.01,1e20", "seed=1"]
    options = [
        "data.order=paper",
        "steps=600",
        "eval.every=0",
        "checkpoint.every=50",
        f"hydra.sweep.dir={sweep}",
    ]
    arguments = command(data, "-m", *cells, *options)

    def folder(method: str, lr: float) -> Path | None:
        """By what is in it: with the overrides of a test its name is cut short."""
        for path in sweep.glob("*/config.yaml"):
            config = rundir.read_config(path.parent)
            if (config["method"]["name"], config["optim"]["lr"]) == (method, lr):
                return path.parent
        return None

    def status(method: str, lr: float) -> str:
        found = folder(method, lr)
        assert found is not None
        return str(rundir.read_summary(found)["status"])

    output = tmp_path / "output.txt"
    with (
        output.open("w") as file,
        subprocess.Popen(arguments, cwd=tmp_path, stdout=file, stderr=file) as process,
    ):
        try:
            deadline = time.monotonic() + 300
            while (killed := folder("basis", 0.01)) is None or not list(
                killed.glob("checkpoints/step_*")
            ):
                assert process.poll() is None, output.read_text()
                assert time.monotonic() < deadline, output.read_text()
                time.sleep(0.02)
        finally:
            process.kill()
    assert (status("exact", 0.01), status("basis", 0.01)) == ("finished", "running")

    again = run_command(arguments, tmp_path)
    assert again.returncode == 1, again.stdout
    assert again.stdout.count("is finished (step 600") == 1
    assert re.search(r"continuing from step (50|100|150|[2-5]\d\d) ", again.stdout)
    failed = re.findall(r"^FAILED: (.*)$", again.stdout, re.MULTILINE)
    assert len(failed) == 2
    assert all("optim.lr=1e+20" in line for line in failed)
    assert "Traceback" not in again.stdout
    assert {status(method, 0.01) for method in ("exact", "basis")} == {"finished"}
    assert {status(method, 1e20) for method in ("exact", "basis")} == {"diverged"}

    third = run_command(arguments, tmp_path)
    assert third.returncode == 1
    assert third.stdout.count("is finished (step 600") == 2
    assert third.stdout.count("holds a run that diverged: step ") >= 2
    # Cells of one seed are pairs: same weights and text, whatever the method and however often they
    # were interrupted.
    cells_of_one_rate = [found for method in ("exact", "basis") if (found := folder(method, 0.01))]
    first = [losses(cell)[0]["val/loss"] for cell in cells_of_one_rate]
    assert first[0] == first[1]
    configs = [rundir.read_config(cell) for cell in cells_of_one_rate]
    assert [c.pop("method")["name"] for c in configs] == ["exact", "basis"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("exact", {"name": "exact"}),
        *(
            (f"r{rank}", {"name": "basis", "rank": rank, "shrinkage": 0.01})
            for rank in (64, 32, 16, 8, 1)
        ),
        ("r1_unscaled", {"rank": 1, "invariant_scalars": False}),
        ("r8_uniform", {"rank": 8, "hashing": "uniform"}),
    ],
)
def test_rows_are_what_their_names_say(row: str, expected: dict[str, object]) -> None:
    config = load(composed("experiment=paper", f"row={row}"))
    method = config.method.to_dict()
    assert {name: method[name] for name in expected} == expected
    table_2 = (
        config.steps,
        config.micro_batches,
        config.micro_batch_size,
        config.model.block_size,
        config.model.n_embd,
    )
    assert table_2 == (50_000, 1, 1, 64, 64)
    assert (config.model.n_layer, config.model.n_head, config.model.vocab_size) == (2, 2, 50_257)
    assert (config.optim.name, config.optim.lr, config.optim.momentum, config.optim.schedule) == (
        "sgd",
        0.01,
        0.9,
        "constant",
    )
    assert (config.optim.weight_decay, config.optim.grad_clip, config.data.order) == (
        0.0,
        None,
        "paper",
    )
