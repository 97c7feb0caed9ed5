"""A run folder may come from anywhere: what is in it is read, and nothing of it is carried out."""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from harness.folder.bounded import LARGEST_JSON
from harness.folder.run_id import read_run_file
from harness.folder.rundir import read_config, read_summary

LEVELS = "abcdefg"
BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{level}: &{level} [{','.join(['*' + below] * 10)}]\n" for below, level in pairwise(LEVELS)
)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        (BOMB, "holds an alias (*a), which no run writes"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested deeper than 20 levels"),
        ("a: 1\n" * 100_000, "larger than 262,144 bytes"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: ${unfinished", "not readable as YAML"),
        ("a: 1\na: 2", "duplicate key"),
        ("a: 1\n---\nb: 2", "not readable as YAML"),
        ("word", "not a mapping of options"),
        ("[1, 2]", "not a mapping of options"),
        ("", "not a mapping of options"),
    ],
)
def test_what_is_no_plain_configuration_is_refused_at_once(
    written: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(written)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"config\.yaml: ") as refusal:
        read_config(tmp_path)
    assert why in str(refusal.value)
    assert time.perf_counter() - began < 5


def test_interpolations_and_classes_stay_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME_OF_IT", "elsewhere")
    written = "a: ${oc.env:HOME_OF_IT}\nb: {_target_: os.getcwd}\nc: ${a}\nd: 1e-3\n"
    (tmp_path / "config.yaml").write_text(written)
    assert read_config(tmp_path) == {
        "a": "${oc.env:HOME_OF_IT}",
        "b": {"_target_": "os.getcwd"},
        "c": "${a}",
        "d": 0.001,
    }


@pytest.mark.parametrize(("name", "read"), [("summary", read_summary), ("run", read_run_file)])
@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("[" * 200_000, "not readable as JSON"),
        ("[1]", "not a JSON object"),
        (b"\xff\xfe", "not readable as JSON"),
        (b" " * (LARGEST_JSON + 1), "larger than 16,777,216 bytes"),
    ],
    ids=["deep", "list", "bytes", "large"],
)
def test_json_of_no_run_is_refused_by_the_name_of_the_file(
    name: str,
    read: Callable[[Path], object],
    written: str | bytes,
    why: str,
    tmp_path: Path,
) -> None:
    file = tmp_path / f"{name}.json"
    file.write_bytes(written if isinstance(written, bytes) else written.encode())
    with pytest.raises(ValueError, match=rf"{name}\.json: {why}"):
        read(tmp_path)
