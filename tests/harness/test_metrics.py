"""metrics.jsonl: rows come back bit for bit, and a kill costs at most the line that was being
written.
"""

import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.storage import write_atomic
from harness.folder.metrics import MetricsLog, read_metrics

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"step": 0, "tokens": 0, "val/loss": 4.174387454986572},
    {
        "step": 1,
        "tokens": 8192,
        "train/loss": 0.1,
        "lr": 1e-05,
        "note": "ö \n ok",
        "flag": True,
        "grad_norm": None,
    },
    {"step": 2, "tokens": 16384, "train/loss": math.inf, "lr": -math.inf},
]


def written(path: Path) -> Path:
    with MetricsLog(path) as log:
        for row in ROWS:
            log.log(row)
    return path


def test_rows_come_back_and_each_is_one_line_of_json(tmp_path):
    path = written(tmp_path / "metrics.jsonl")
    assert read_metrics(path) == ROWS
    lines = path.read_text().splitlines()
    assert lines[0] == '{"step": 0, "tokens": 0, "val/loss": 4.174387454986572}'
    assert [json.loads(line) for line in lines] == ROWS
    assert path.read_bytes().endswith(b"\n")


def test_a_row_can_be_read_as_soon_as_it_is_logged(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.log(ROWS[0])
        assert read_metrics(tmp_path / "metrics.jsonl") == ROWS[:1]
        log.log(ROWS[1])
        log.sync()
        assert read_metrics(tmp_path / "metrics.jsonl") == ROWS[:2]


@settings(max_examples=200, deadline=None)
@given(
    st.floats()
    | st.floats(width=32)
    | st.sampled_from([5e-324, -0.0, math.nan, math.inf, -math.inf, 2**53 + 1.0])
)
def test_floats_come_back_bit_for_bit(value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        with MetricsLog(path) as log:
            log.log({"step": 1, "train/loss": value})
        back = read_metrics(path)[0]["train/loss"]
    assert type(back) is float
    if math.isnan(value):  # NaN is one token, its payload is not kept
        assert math.isnan(back)
    else:
        assert struct.pack("<d", back) == struct.pack("<d", value)


def test_non_finite_numbers_are_the_tokens_that_the_docstring_says(tmp_path):
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.log({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf})
    assert (
        tmp_path / "m.jsonl"
    ).read_text() == '{"step": 1, "a": NaN, "b": Infinity, "c": -Infinity}\n'


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(1.0), "numpy.float64"),
        (np.int64(1), "numpy.int64"),
        (torch.tensor(1.0), "torch.Tensor"),
        ([1.0], "builtins.list"),
    ],
)
def test_only_plain_scalars(tmp_path, value, kind):
    with MetricsLog(tmp_path / "m.jsonl") as log:
        with pytest.raises(TypeError, match=f"metric 'train/loss' is a {kind}"):
            log.log({"step": 1, "train/loss": value})
        with pytest.raises(AssertionError, match="int `step`"):
            log.log({"train/loss": 1.0})
        with pytest.raises(AssertionError, match="int `step`"):
            log.log({"step": np.int64(3)})  # type: ignore[dict-item]
    assert read_metrics(tmp_path / "m.jsonl") == []


def test_a_file_cut_at_any_byte_loses_at_most_its_last_row(tmp_path):
    intact = written(tmp_path / "metrics.jsonl").read_bytes()
    path = tmp_path / "cut.jsonl"
    new = {"step": 9, "train/loss": 1.5}
    for size in range(len(intact) + 1):
        path.write_bytes(intact[:size])
        # A row is there if all of its line is, whether or not the newline got written.
        whole = [row for row, end in zip(ROWS, line_ends(intact), strict=True) if size >= end - 1]
        assert read_metrics(path) == whole, size
        with MetricsLog(path) as log:
            log.log(new)
        assert read_metrics(path) == [*whole, new], size
        assert path.read_bytes().count(b"\n") == len(whole) + 1


def line_ends(content: bytes) -> list[int]:
    return [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]


def test_zeros_after_a_power_cut_are_a_torn_line_too(tmp_path):
    path = written(tmp_path / "metrics.jsonl")
    with path.open("ab") as file:
        file.write(b"\0" * 40)
    assert read_metrics(path) == ROWS
    MetricsLog(path).close()
    assert b"\0" not in path.read_bytes()


@pytest.mark.parametrize(
    "bad", [b'{"step": 1, "train/lo', b"\xff\xfe", b"", b"[1, 2]", b'{"tokens": 3}']
)
def test_a_bad_line_elsewhere_is_an_error_that_names_it(tmp_path, bad):
    path = written(tmp_path / "metrics.jsonl")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], bad, *lines[1:]]))
    for attempt in (read_metrics, MetricsLog):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not "):
            attempt(path)
    assert path.read_bytes().split(b"\n")[1] == bad  # left for somebody to look at


def test_no_file_is_an_error_for_the_reader_only(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "metrics.jsonl")
    MetricsLog(tmp_path / "metrics.jsonl").close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_truncate_after_a_step_and_go_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/loss": step / 3} for step in range(10)] + [
        {"step": 9, "val/loss": 2.0}
    ]
    with MetricsLog(path) as log:
        for row in rows:
            log.log(row)
    before = path.read_bytes().split(b"\n")
    with path.open("ab") as file:
        file.write(b'{"step": 10, "train')  # and then it was killed
    with MetricsLog(path) as log:
        assert log.truncate_after(6) == 4
        assert path.read_bytes().split(b"\n")[:-1] == before[:7]  # untouched, byte for byte
        assert log.truncate_after(6) == 0
        for row in rows[7:]:
            log.log(row)
    assert read_metrics(path) == rows
    assert path.read_bytes().split(b"\n") == before
    with MetricsLog(path) as log:
        assert log.truncate_after(-1) == 11
    assert path.read_bytes() == b""
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl"}


WRITE_LOOP = """
import sys
from pathlib import Path
from harness.folder.metrics import MetricsLog
log = MetricsLog(Path(sys.argv[1]))
step = 0
while True:
    step += 1
    log.log({"step": step, "train/loss": step / 7, "note": "x" * 200})
    if step == 1 or step % 100 == 0:
        print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_while_writing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    moments = random.Random(0)
    for _ in range(3):
        path.unlink(missing_ok=True)
        with subprocess.Popen(
            [sys.executable, "-c", WRITE_LOOP, str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            reported = int(child.stdout.readline())
            time.sleep(moments.uniform(0, 0.1))
            os.kill(child.pid, signal.SIGKILL)
            reported = max([reported, *map(int, child.stdout.read().split())])
        rows = read_metrics(path)
        assert len(rows) >= reported
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert all(row["train/loss"] == row["step"] / 7 for row in rows)


def test_write_atomic_replaces_the_whole_file_or_nothing(tmp_path):
    path = tmp_path / "summary.json"
    write_atomic(path, "a long first version ä\n")
    assert path.read_text(encoding="utf-8") == "a long first version ä\n"
    with path.open(encoding="utf-8") as reader:
        write_atomic(path, b"short")
        assert (
            reader.read() == "a long first version ä\n"
        )  # who reads meanwhile, reads the old one to its end
    assert path.read_bytes() == b"short"
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_bytes() == b"short"
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "absent" / "summary.json", "x")
