"""A run folder may come from anywhere: what is in it is read, and nothing of it is carried out."""

import time
from itertools import pairwise
from pathlib import Path

import pytest

from harness.rundir import read_config

LEVELS = "abcdefg"
BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{level}: &{level} [{','.join(['*' + below] * 10)}]\n" for below, level in pairwise(LEVELS)
)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        (BOMB, "it holds an alias"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deep"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: ${unfinished", ""),
    ],
)
def test_what_is_no_plain_configuration_is_refused_at_once(
    written: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(written)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"config\.yaml: not readable as YAML") as refusal:
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
