"""The configuration: one source for each default, frozen values, the vocabulary, the flat view."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

import conf
from basis import BalancedSketch, Exact
from basis.estimators import ESTIMATORS
from harness.compose import configuration, load
from harness.config import Config, flat_options
from harness.folder import rundir
from harness.folder.metrics import Stopwatch
from harness.zeroth_order import ZerothOrder

REPOSITORY = Path(__file__).resolve().parents[2]


def test_defaults_of_conf_and_of_the_classes_agree() -> None:
    """conf/ says what a run does, and the classes what an older run did that had no such option."""
    chosen = ("method.", "model.", "optim.", "data.")  # groups, whose files are choices of values
    composed, declared = configuration([]).flat(), Config().flat()
    names = [name for name in composed if not name.startswith(chosen)]
    assert {name: composed[name] for name in names} == {name: declared[name] for name in names}


@pytest.mark.parametrize("method", [name for name in ESTIMATORS if name != "exact"])
def test_methods_share_their_scope_and_budget(method: str) -> None:
    """They come from conf/method/base/layers.yaml."""
    own, basis = (configuration([f"method={name}"]).method for name in (method, "basis"))
    assert (own.budget, own.include, own.exclude) == (basis.budget, basis.include, basis.exclude)
    assert own.to_dict()["allocation"] == "uniform"


SECRET = {"WANDB_API_KEY": "0123456789abcdef", "MY_TOKEN": "hunter2-hunter2"}


@pytest.mark.parametrize(
    "argument",
    [
        "experiment_name=${oc.env:WANDB_API_KEY}",
        "+tracker.tags=[a,'${oc.env:MY_TOKEN,none}']",
        "experiment_name=${oc.decode:${oc.env: MY_TOKEN}}",
        "experiment_name=0123456789abcdef",
        "hydra.run.dir=runs/of-hunter2-hunter2-1",
        "0123456789abcdef=1",
    ],
)
def test_a_secret_of_the_environment_is_no_option(
    argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRET.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"holds the environment's (WANDB_API_KEY|MY_TOKEN)") as no:
        conf.check([argument])
    assert not [value for value in SECRET.values() if value in str(no.value)]


def test_a_secret_in_a_file_of_conf_is_found_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in SECRET.items():
        monkeypatch.setenv(name, value)
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    mine = tmp_path / "conf" / "experiment" / "mine.yaml"
    mine.write_text("# @package _global_\ndevice: ${oc.env:MY_TOKEN}\n")
    with pytest.raises(ValueError, match="device: holds the environment's MY_TOKEN") as no:
        load(conf.compose(["experiment=mine"], tmp_path / "conf"))
    assert SECRET["MY_TOKEN"] not in str(no.value)


def test_other_variables_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    monkeypatch.setenv("PASSWORD", "7")  # too short to be looked for
    assert configuration(["seed=${oc.env:SLURM_ARRAY_TASK_ID}"]).seed == 7


@pytest.mark.parametrize(
    ("argument", "option"),
    [
        ("method.exclude=${seed}", "method.exclude"),
        ("method.rank=${precision}", "method.rank"),
        ("tracker.tags=${seed}", "tracker.tags"),
    ],
)
def test_what_an_interpolation_stands_for_has_the_options_type(argument: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"^{option}: "):
        configuration([argument])
    assert configuration(["method.rank=${model.n_head}"]).method.to_dict()["rank"] > 1


def test_every_method_has_a_file() -> None:
    assert set(conf.options("method")) == {*ESTIMATORS, "zeroth_order"}


def test_the_method_is_made_in_load() -> None:
    method = configuration(["method.rank=8", "method.budget=1/24"]).method
    assert isinstance(method.estimator, BalancedSketch)
    assert method.estimator.rank == 8
    assert method.budget is not None
    assert (method.budget.text, method.budget.share) == ("1/24", 1 / 24)
    without = configuration(["method=zeroth_order"]).method
    assert isinstance(without.zeroth_order, ZerothOrder)
    assert isinstance(without.estimator, Exact)


def test_a_configuration_is_frozen_and_takes_the_vocabulary_of_its_text() -> None:
    config = configuration(["model.vocab_size=null"])
    for group, option in ((config, "seed"), (config.model, "vocab_size"), (config.optim, "lr")):
        with pytest.raises(FrozenInstanceError):
            setattr(group, option, 1)
    assert config.resolved(65).model.vocab_size == 65
    assert config.model.vocab_size is None
    assert config.resolved(65).resolved(70).model.vocab_size == 65


def test_older_runs_wrote_no_vocabulary_and_can_be_continued() -> None:
    now = configuration(["model.vocab_size=null"])
    old = now.flat()
    assert rundir.refused_changes(old, now.resolved(65)) == []
    assert rundir.refused_changes(now.resolved(65).flat(), now) == []
    (change,) = rundir.refused_changes(now.resolved(65).flat(), now.resolved(70))
    assert change == "model.vocab_size: 65 -> 70"


def test_older_runs_said_in_their_name_that_they_only_tuned() -> None:
    run = configuration(["experiment_name=arena_tuning"]).to_dict()
    assert flat_options(run)["purpose"] == "training"
    del run["purpose"]
    assert flat_options(run)["purpose"] == "tuning"


def test_a_pause_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Stopwatch()
    with clock.paused():  # from 10 to 14
        pass
    assert clock.lap() == 16.0
    assert clock.lap() == 1.0


def test_nothing_imports_the_compiler_before_it_is_asked_for() -> None:
    scripts = sorted(f"scripts.{path.stem}" for path in (REPOSITORY / "scripts").glob("*.py"))
    words = f"import sys, harness.set_up, train, {', '.join(scripts)}"
    code = f"{words}; sys.exit('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False)
    assert done.returncode == 0
