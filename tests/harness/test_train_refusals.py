"""What train.py refuses: in few lines, by the name of the option, with exit code 1 and nothing
written.
"""

import re
import sys
from pathlib import Path

import pytest
from hydra.errors import CompactHydraException
from tiny import REPOSITORY, command, run_command, train_here

from harness.folder import rundir

ADAPTIVE = ["method=low_rank", "method.rank=2", "adaptive_rank.every=5"]
REFUSED = [
    (["method.rnk=3"], "method.rnk"),
    (["tracker.tags=[[1]]"], "tracker.tags=[[1]]: must be a list of words"),
    (["method.include=[{a:1}]"], "method.include=[{'a': 1}]: must be a list of words"),
    (["+method.rnk=3"], "method.rnk"),
    (["method.rank=abc"], "method.rank"),
    (["method.rank=0"], "method.rank=0"),
    (["method.hashing=other"], "method.hashing='other'"),
    (["method.include=[blocks.*.mpl.*]"], "method.include='blocks.*.mpl.*'"),
    (["optim.lr=0"], "optim.lr=0"),
    (["model.n_head=3"], "model.n_head=3"),
    (["model.vocab_size=5"], "model.vocab_size=5"),
    (["tokens_per_step=100"], "tokens_per_step=100"),
    (["micro_batch_size=0"], "micro_batch_size=0"),
    (["eval.batches=0"], "eval.batches=0"),
    (["diagnostics.masks=1"], "diagnostics.masks=1"),
    (["cuda_graph=maybe"], "cuda_graph"),
    (
        ["cuda_graph=true", "device=cpu"],
        "cuda_graph=true: needs device=cuda; with device=cpu this run computes on the CPU, so give "
        "cuda_graph=null or false",
    ),
    (
        ["cuda_graph=true", "method=zeroth_order"],
        "cuda_graph=true: method=zeroth_order draws its directions by numbers of the host",
    ),
    (
        ["cuda_graph=true", "method=subspace", "method.energy=0.9"],
        "cuda_graph=true: method.energy asks the device at each step how many directions to use; "
        "give cuda_graph=null or false",
    ),
    (["diagnostics.monitor=true", "compile=true"], "diagnostics.monitor=true: hooks on layers"),
    (
        ["diagnostics.monitor=true", "method=zeroth_order"],
        "diagnostics.monitor=true: zeroth_order has no backward",
    ),
    (["diagnostics.monitor=often"], "diagnostics.monitor"),
    (
        ["attention=sus", "method=zeroth_order"],
        "attention=sus: method=zeroth_order has no backward",
    ),
    (
        ["activations=lean", "method=zeroth_order"],
        "activations=lean: method=zeroth_order has no backward",
    ),
    (
        ["attention.c=10"],
        "attention.c=10: is of attention=sus only, exact attention follows every entry; give "
        "attention=sus",
    ),
    (["+attention.c=10"], "attention.c=10: is of attention=sus only"),
    (["attention=exact", "attention.c=0"], "attention.c=0: is of attention=sus only"),
    (
        ["attention.mode=dense"],
        "attention.mode=dense: is of attention=sus only, exact attention follows every entry",
    ),
    (["attention.c=few"], "attention.c"),
    (["attention=sus", "attention.c=0"], "attention.c=0.0: must be positive"),
    (["adaptive_rank.every=-1"], "adaptive_rank.every=-1: must be at least 0"),
    (["adaptive_rank.every=often"], "adaptive_rank.every"),
    (
        ["adaptive_rank.low=0.3", "adaptive_rank.high=0.3"],
        "adaptive_rank.low=0.3, high=0.3: must be 0 <= low < high",
    ),
    (["adaptive_rank.patience=0"], "adaptive_rank.patience=0: must be at least 1"),
    (["adaptive_rank.minimum=0"], "adaptive_rank.minimum=0: must be at least 1"),
    (
        ["adaptive_rank.minimum=3", "adaptive_rank.maximum=2"],
        "adaptive_rank.maximum=2: must be at least adaptive_rank.minimum=3",
    ),
    (
        ["method=exact", "adaptive_rank.every=5"],
        "adaptive_rank.every=5: method=exact has no rank; it can be used with low_rank",
    ),
    (
        ["method=zeroth_order", "adaptive_rank.every=5"],
        "adaptive_rank.every=5: method=zeroth_order has no rank",
    ),
    (
        ["method=quantized", "adaptive_rank.every=5"],
        "adaptive_rank.every=5: method=quantized has no rank",
    ),
    (
        ["method=basis", "adaptive_rank.every=5"],
        "adaptive_rank.every=5: method=basis errs by its rank alone",
    ),
    (
        [*ADAPTIVE, "method.budget=1/4"],
        "adaptive_rank.every=5: method.budget=1/4 sets the rank already",
    ),
    ([*ADAPTIVE, "adaptive_rank.maximum=17"], "adaptive_rank.maximum=17: must be at most 16"),
    (
        [*ADAPTIVE, "method.rank=9"],
        "method.rank=9: with adaptive_rank it must be in [minimum, maximum] = [1, 7]; 7 is the "
        "largest",
    ),
    (
        [*ADAPTIVE, "adaptive_rank.maximum=6", "method.rank=7"],
        "method.rank=7: with adaptive_rank it must be in",
    ),
    (
        [*ADAPTIVE, "adaptive_rank.minimum=9"],
        "adaptive_rank.minimum=9: must be at most 7; 7 is the largest rank",
    ),
    (
        ["method=ema_sketch", "model.block_size=2", "adaptive_rank.every=5"],
        "adaptive_rank.maximum=null: with 2 rows",
    ),
    (["precision=float16"], "precision='float16'"),
    (["device=tpu"], "device='tpu'"),
    (["data.order=sorted"], "data.order='sorted'"),
    (["tracker.mode=maybe"], "tracker.mode='maybe'"),
    (["steps=1.5"], "steps"),
    (["optim.warmup_steps=21"], "optim.warmup_steps=21"),
    (["method.name=unheard_of"], "method.name='unheard_of'"),
    (["model.n_layer=null"], "model.n_layer"),
    (["seed=18446744073709551616"], "seed=18446744073709551616"),
    (["method=exact", "+method.include=[head]"], "method.include"),
    (["method=zeroth_order", "method.sigma=0"], "method.sigma=0"),
    (["method=zeroth_order", "method.rank=0"], "method.rank=0"),
    (["method=zeroth_order", "method.budget=1/8"], "method.budget=1/8: it keeps nothing"),
    (
        ["method=zeroth_order", "+method.include=[head]"],
        "method.include, method.exclude: zeroth_order",
    ),
    (
        ["method.allocation=variance"],
        "method.allocation=variance: divides a budget; give method.budget",
    ),
    (
        ["method.budget=1/8", "method.allocation=best"],
        "method.allocation='best': must be one of uniform, variance",
    ),
    (
        ["method.budget=1/1000"],
        "method.budget=1/1000: BalancedSketch keeps at least 1/14.2 of an input of 16 x 16 "
        "(rank=1)",
    ),
    (
        ["method=exact", "method.budget=1/8"],
        "method.budget=1/8: exact backpropagation keeps everything",
    ),
    (
        ["method=quantized", "method.budget=0.9"],
        "method.budget=0.9: Quantized with its other options keeps at most 1/",
    ),
    (
        ["method=ema_sketch", "method.rows=15"],
        "method.rows=15: must be at least 16, the rows of an input",
    ),
]


@pytest.mark.parametrize(
    ("wrong", "named"), REFUSED, ids=lambda value: value if isinstance(value, str) else None
)
def test_mistakes_are_named_and_nothing_is_written(
    wrong: list[str], named: str, data: Path, tmp_path: Path
) -> None:
    from hydra.errors import ConfigCompositionException

    run = tmp_path / "runs" / "run"
    with pytest.raises((CompactHydraException, ConfigCompositionException)) as refusal:
        train_here(data, run, *wrong)
    assert named in str(refusal.value) or named in str(refusal.value.__cause__)
    assert not run.exists()


def test_refusals_on_the_command_line_are_short_and_leave_nothing(
    data: Path, tmp_path: Path
) -> None:
    done = run_command(
        command(data, "method.rank=0", f"hydra.run.dir={tmp_path / 'a' / 'b'}"), tmp_path
    )
    assert done.returncode == 1
    assert "method.rank=0: must be at least 1" in done.stdout
    assert len(done.stdout.splitlines()) == 1, done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("summary.json", '{"status":', "summary.json: not readable as JSON"),
        ("summary.json", '{"status": "finished"}', "summary.json: damaged, step is None"),
        ("summary.json", '{"status": "finished", "step": "20"}', "damaged, step is '20'"),
        ("summary.json", '{"status": "diverged", "step": 2}', "damaged, reason is None"),
        ("config.yaml", "model: [", "config.yaml: not readable as YAML"),
        ("config.yaml", "", "config.yaml: not a mapping of options"),
        ("config.yaml", None, "holds a run without config.yaml"),
    ],
)
def test_a_damaged_run_folder_is_refused_by_the_name_of_the_file(
    name: str, content: str | None, named: str, data: Path, tmp_path: Path
) -> None:
    train_here(data, tmp_path / "run")
    if content is None:
        (tmp_path / "run" / name).unlink()
    else:
        (tmp_path / "run" / name).write_text(content)
    with pytest.raises(CompactHydraException, match=named):
        train_here(data, tmp_path / "run", "steps=40")
    assert (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_sweep_goes_on_after_a_failure_reports_it_and_skips_what_is_finished(
    data: Path, tmp_path: Path
) -> None:
    arguments = command(
        data, "-m", "method=basis", "method.rank=0,2", f"hydra.sweep.dir={tmp_path / 'sweep'}"
    )
    done = run_command(arguments, tmp_path)
    assert done.returncode == 1, done.stdout
    assert done.stdout.count("method.rank=0: must be at least 1") >= 1
    assert re.search(r"^FAILED: .*method\.rank=0", done.stdout, re.MULTILINE), done.stdout
    assert re.search(
        r"^train.py: 1 of 2 jobs failed:\n  .*method\.rank=0\n*\Z", done.stdout, re.MULTILINE
    ), done.stdout
    (finished,) = [p for p in (tmp_path / "sweep").iterdir() if p.is_dir()]
    assert rundir.read_config(finished)["method"]["rank"] == 2
    again = run_command(
        [a.replace("method.rank=0,2", "method.rank=2") for a in arguments], tmp_path
    )
    assert again.returncode == 0, again.stdout
    assert "is finished" in again.stdout


@pytest.mark.slow
def test_disabled_tracker_needs_no_wandb_and_offline_says_what_to_do(
    data: Path, tmp_path: Path
) -> None:
    program = """import runpy, sys
sys.modules["wandb"] = None  # importing it fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""
    arguments = command(data, f"hydra.run.dir={tmp_path / 'run'}")
    done = run_command(
        [sys.executable, "-c", program, *arguments[1:]], tmp_path, PYTHONPATH=str(REPOSITORY)
    )
    assert done.returncode == 0, done.stdout
    other = [
        a.replace("tracker.mode=disabled", "tracker.mode=offline")
        for a in command(data, f"hydra.run.dir={tmp_path / 'other'}")[1:]
    ]
    refused = run_command(
        [sys.executable, "-c", program, *other], tmp_path, PYTHONPATH=str(REPOSITORY)
    )
    assert refused.returncode == 1
    assert "tracker.mode='offline': wandb is not installed" in refused.stdout
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_online_without_a_key_is_refused_and_leaves_nothing(data: Path, tmp_path: Path) -> None:
    arguments = command(data, "tracker.mode=online", f"hydra.run.dir={tmp_path / 'run'}")
    done = run_command(
        arguments,
        tmp_path,
        WANDB_API_KEY="",
        HOME=str(tmp_path / "home"),
        NETRC=str(tmp_path / "netrc"),
    )
    assert done.returncode == 1, done.stdout
    assert "tracker.mode='online'" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_refused_run_never_removes_the_working_directory(data: Path, tmp_path: Path) -> None:
    done = run_command(command(data, "method.rank=0", "hydra.run.dir=."), tmp_path)
    assert done.returncode == 1
    assert tmp_path.is_dir()
