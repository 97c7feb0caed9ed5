"""A training step on an accelerator copies nothing from the host, looks at no number and has no
shape that depends on values: on a device that does not exist, for every method."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from device_checks import Watch
from step_cases import CASES, METHODS

from basis.estimators import ESTIMATORS

PROGRAM = Path(__file__).resolve().parents[1] / "pretend_device.py"


# Of what is kept, each kind with BASIS is quick; with exact layers, and a second number of bits,
# it is slow.
SLOW = {
    case.name
    for case in CASES
    if (case.method == "exact" and case.kept.name != "plain")
    or case.name in ("basis; lean 4; exact", "basis; checkpoint 8 bits; exact")
    or case.name in ("transform; lean 2; exact", "quantized, 2.5 bits; plain; exact")
}


@functools.cache
def noted(slow: bool) -> dict[str, list[str]]:
    """What the watch noted for the slow cases, or for the others."""
    names = [case.name for case in CASES if (case.name in SLOW) == slow]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *names],
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=True,
        env=os.environ | {"PYTHONPATH": str(PROGRAM.parents[1])},
    )
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_method_is_tried() -> None:
    assert {name.partition(",")[0] for name in METHODS} == set(ESTIMATORS)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case.name, marks=pytest.mark.slow if case.name in SLOW else ())
        for case in CASES
    ],
)
def test_a_step_does_no_host_work(case: str) -> None:
    assert noted(case in SLOW)[case] == []


def test_the_watch_sees_what_it_watches_for() -> None:
    with Watch("cpu") as watch:
        x = torch.ones(4)
        for looks in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0]):
            before = len(watch.found)
            looks()
            assert len(watch.found) == before + 1, looks
        x[torch.tensor([1, 2])]
        x.index_add(0, torch.tensor([1, 2]), torch.ones(2))
        assert len(watch.found) == 3
    with Watch("meta") as watch:
        y = torch.ones(4).to("meta")
        (y + 1).sum()
        assert watch.found == ["aten._to_copy.default copies from the host at PyTorch"]
        torch.ones(()) * y
        assert watch.found[1] == "aten.mul.Tensor mixes tensors of the host in at PyTorch"
