"""Refusals on a command line: one message that names the option, exit code 1, nothing written."""

import errno
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import REPOSITORY, command, overrides

import conf
import train
from harness import command_line
from harness.command_line import StopRequest
from harness.compose import configuration


@pytest.fixture
def restored() -> Iterator[None]:
    """Hydra configures the root logger and train.py's handler of Ctrl-C; both are put back."""
    root, interrupt = logging.getLogger(), signal.getsignal(signal.SIGINT)
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    signal.signal(signal.SIGINT, interrupt)


REFUSED = [
    (["tracker=null"], "tracker=null: must be one of wandb"),
    (["activations=null"], "activations=null: must be one of budget, checkpoint, lean, plain, rec"),
    (["row=null"], "row=null: must be one of exact, none, r1"),
    (["model=3"], "model=3: must be one of char_small"),
    (["method=nope"], "method=nope: must be one of basis"),
    (["method.rnk=3"], "method.rnk: there is no such option"),
    (["eval=null"], "eval=null: is a group of options"),
    (["method.rank=0"], "method.rank=0: must be at least 1"),
    (["method=subspace", "++method.budget=${oc.env:NOT_SET}"], "++method.budget=${oc.env:NOT_SET}"),
    (["method=subspace", "method.budget=${product:a,b}"], "method.budget=${product:a,b}"),
    (["data.path=a,b"], "data.path=a,b: several values; give -m"),
    (["data.path=lr=1.txt"], "give 'data.path=\"lr=1.txt\"'"),
    (["hydra.run.dir=/proc/x/y"], "hydra.run.dir=/proc/x"),
    (["hydra.run.dir=a/b/" + "x" * 400], "hydra.run.dir=a/b/xxx"),
    (["hydra.run.dir=${nothing}"], "hydra.run.dir=${nothing}: Interpolation key 'nothing'"),
    (["-m", "method=exact,nope"], "method=nope: must be one of"),
    (["-m", "row=exact,null"], "row=null: must be one of"),
    (["-m", "method=basis", "method.rank=0,-1"], "2 of 2 jobs failed:"),
    (["-m", "hydra.sweep.dir=/proc/x"], "hydra.sweep.dir=/proc/x"),
]


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("wrong", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_refusal_is_one_message_and_leaves_nothing(
    wrong: list[str],
    said: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*wrong[: wrong[0] == "-m"], *overrides(data), *wrong[wrong[0] == "-m" :]]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.chdir(tmp_path)
    assert command_line.run(train.main) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("train.py: ")
    assert said in errors
    assert len(errors.splitlines()) == 1 + 2 * ("jobs failed" in said), errors
    assert list(tmp_path.iterdir()) == []
    assert command_line.FULL_ERROR not in os.environ


@pytest.mark.usefixtures("restored")
def test_hydras_own_record_on_a_full_disk_is_named_by_the_option(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write says it, without a path

    monkeypatch.setattr("omegaconf.OmegaConf.save", full)
    words = ["-m", *overrides(data), "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    assert command_line.run(train.main) == 1
    said = capsys.readouterr().err
    assert f"hydra.sweep.dir={tmp_path / 'sweep'}: No space left on device" in said
    assert len(said.splitlines()) == 1


@pytest.mark.usefixtures("restored")
def test_a_fault_of_ours_keeps_its_traceback(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ValueError("not the user's mistake")

    monkeypatch.setattr(train, "execute", broken)
    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match="not the user's mistake"):
        command_line.run(train.main)


@pytest.mark.parametrize(
    "name",
    ["lr=1.txt", "本.txt", "part (2).txt", "book[1].txt", "it's.txt", "notes#2.txt", "~/book.txt"],
)
def test_a_name_that_needs_quotes_is_refused_with_the_argument_that_works(name: str) -> None:
    with pytest.raises(ValueError, match="only in quotes; give ") as refusal:
        conf.check([f"data.path={name}"])
    (word,) = shlex.split(str(refusal.value).partition("; give ")[2])
    assert configuration(["data=text", word]).data.path == name


def test_row_none_leaves_the_method_to_the_user() -> None:
    config = configuration(["experiment=paper", "row=none", "method=basis", "method.rank=4"])
    assert (config.method.name, config.method.to_dict()["rank"]) == ("basis", 4)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signals_that_ask_to_stop_set_the_exit_code(number: signal.Signals) -> None:
    given = signal.signal(number, signal.default_int_handler)  # under nohup, SIGHUP is ignored
    try:
        with StopRequest() as stop:
            assert stop.code is None
            os.kill(os.getpid(), number)
            assert stop.code == 128 + number
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, given)


def test_a_signal_passed_on_is_the_same_one_and_a_second_one_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C reaches a run and the script that started it, which may send it on."""
    now = 100.0
    monkeypatch.setattr(command_line.time, "monotonic", lambda: now)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now += 0.2
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.code == 130
        now += 1.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_under_nohup_survives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.code is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_while_starting_shows_no_traceback(data: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(data),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert "Traceback" not in said
    assert process.returncode in (-signal.SIGINT, command_line.INTERRUPTED)
