"""What programs show goes nowhere once nobody reads it; what they do is done all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import REPOSITORY, command, losses

WORK = """
import logging, os, sys
from harness import terminal
terminal.attach()
logging.basicConfig(stream=sys.stdout)
file = open(sys.argv[1], "w")
assert file.fileno() > 2, file.fileno()
for line in range(3):
    print("caf\\u00e9 \\u2713", line, flush=True)
    logging.warning("said")
    print("error", file=sys.stderr)
os.write(1, b"from C"), os.write(2, b"from C")
file.write("done")
"""


def work(folder: Path, redirect: str, **environment: str) -> tuple[subprocess.Popen[bytes], Path]:
    """WORK started by a shell; the file that it writes."""
    file = folder / "file.txt"
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$0" -c "$1" "$2" {redirect}', sys.executable, WORK, str(file)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    return process, file


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_costs_nothing(unbuffered: str, tmp_path: Path) -> None:
    process, file = work(tmp_path, "2>&1", PYTHONUNBUFFERED=unbuffered)  # stderr goes there too
    with process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=30) == 0
    assert file.read_text() == "done"


@pytest.mark.parametrize("redirect", [">&- 2>&- <&-", "2>&-", "<&- >&-"])
def test_a_stream_that_is_not_there_takes_no_file_in_its_place(
    redirect: str, tmp_path: Path
) -> None:
    process, file = work(tmp_path, redirect)
    said, complained = process.communicate(timeout=30)
    assert process.returncode == 0, complained
    assert file.read_text() == "done"
    if redirect == "2>&-":
        assert said.decode().count("café ✓") == 3
        assert said.endswith(b"from C")


def test_a_character_that_the_terminal_lacks_is_shown_as_another(tmp_path: Path) -> None:
    process, _ = work(tmp_path, "", PYTHONIOENCODING="latin-1")
    said, complained = process.communicate(timeout=30)
    assert process.returncode == 0, complained
    assert said.decode("latin-1").count("café ?") == 3
    assert complained.count(b"error\n") == 3


def test_a_full_disk_behind_stdout_is_said(tmp_path: Path) -> None:
    process, file = work(tmp_path, "> /dev/full")
    _, complained = process.communicate(timeout=30)
    assert process.returncode != 0
    assert b"No space left on device" in complained
    assert not file.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("redirect", ["| true", "2>&1 | true", "<&- >&- 2>&-"])
def test_a_run_and_its_report_are_made_though_nobody_reads(redirect: str, tmp_path: Path) -> None:
    run, report = tmp_path / "run", tmp_path / "report"
    words = command(tmp_path, f"hydra.run.dir={run}")
    for program in (
        words,
        [sys.executable, str(REPOSITORY / "eval.py"), f"runs={run}", f"out={report}"],
    ):
        # The pipe's end is in the hands of `true`, which has long gone when the first line comes.
        done = subprocess.run(
            ["bash", "-c", f'set -o pipefail; "$@" {redirect}', "bash", *program],
            cwd=tmp_path,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert b"Traceback" not in done.stderr
    assert losses(run)[-1]["step"] == 20
    assert (report / "report.md").exists()
