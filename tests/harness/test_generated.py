"""Command lines drawn at random: a wrong one ends in one message that names an option, with exit
code 1 and nothing written; a right one trains.
"""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from generated import command_lines, outcome
from hypothesis import HealthCheck, given, seed, settings

PARTS = 5  # for as many processes of pytest-xdist
LINES = int(os.environ.get("BASIS_COMMAND_LINES", "500"))


def try_lines(data: Path, here: Path, number: int, part: int) -> Counter[str]:
    """What became of `number` command lines, none of them tried twice."""
    ends: dict[tuple[str, ...], str] = {}

    # Examples of hypothesis repeat each other; those that are known cost nothing.
    @seed(part)
    @settings(
        max_examples=3 * number,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines())
    def check(words: list[str]) -> None:
        if tuple(words) not in ends and len(ends) < number:
            folder = here / str(len(ends))
            folder.mkdir()
            ends[tuple(words)] = outcome(data, folder, words)
            folder.rmdir()

    check()
    return Counter(ends.values())


def test_five_command_lines_train_or_are_refused(data: Path, tmp_path: Path) -> None:
    assert try_lines(data, tmp_path, 5, PARTS).total() == 5


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_five_hundred_command_lines_train_or_are_refused(
    data: Path, tmp_path: Path, part: int, record_property: Callable[[str, object], None]
) -> None:
    """BASIS_COMMAND_LINES=5000 tries ten times as many."""
    number = LINES // PARTS
    ends = try_lines(data, tmp_path, number, part)
    said = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    record_property("tried", f"{ends.total()} command lines tried: {said}, 0 failed")
    assert ends.total() == number
    assert min(ends["trained"], ends["refused"]) > number / 10
