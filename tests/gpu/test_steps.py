"""Whole training steps of a GPT on a GPU: gradients of the CPU for every method, no host work, the
gradients of eager mode when compiled."""

import copy
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from device_checks import Watch, refusing_to_wait
from estimator_checks import relative
from step_cases import CASES, Case, Steps
from torch import Tensor, nn

from models import GPT, GPTConfig

pytestmark = pytest.mark.gpu

TINY = GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32)
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
QUICK = ("basis; plain; exact", "basis; lean 2; exact", "transform; plain; exact")
COMPILED = [
    pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow, id=case.name)
    for case in CASES
    if case.method != "zeroth_order"
]


def tiny(device: str) -> GPT:
    torch.manual_seed(0)
    return GPT(TINY).to(device)


def found_in(steps: Steps, loss: Tensor) -> dict[str, Tensor]:
    gradients = {name: p.grad for name, p in steps.model.named_parameters() if p.grad is not None}
    return {"loss": loss} | gradients


@every_case
def test_gradients_are_those_of_the_cpu(case: Case, device: str) -> None:
    found = []
    for place in (device, "cpu"):
        steps = Steps(case, tiny(place))
        found.append(found_in(steps, steps.gradients(0)))
    ours, expected = found
    assert ours.keys() == expected.keys()
    # a slope between two close losses loses digits
    tolerance = 0.05 if case.method == "zeroth_order" else 5e-3
    errors = {name: relative(grad.cpu(), expected[name]) for name, grad in ours.items()}
    assert max(errors.values()) < tolerance, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
@every_case
def test_a_step_does_no_host_work(case: Case, optim: str, device: str) -> None:
    """Also where kernels are used that a pretend device can't have."""
    steps = Steps(case, tiny(device), optim=optim)
    steps(0)  # tables that are made once, the optimiser's state
    with Watch(device) as watch:
        waiting: AbstractContextManager[object] = nullcontext()
        if device == "cuda":
            waiting = refusing_to_wait()
        with waiting:
            for number in (1, 999):
                steps(number)
    if device == "cuda":  # on a CPU a number may be looked at
        assert watch.found == []
    assert watch.count > 100


@pytest.mark.parametrize("case", COMPILED)
def test_a_compiled_step_has_the_gradients_of_eager_mode(case: Case, device: str) -> None:
    eager = Steps(case, tiny(device))
    other = copy.deepcopy(eager)
    expected = found_in(eager, eager.gradients(0))
    other.run = torch.compile(other.model)
    ours = found_in(other, other.gradients(0))
    for name, grad in expected.items():
        assert relative(ours[name], grad) < 1e-2, name


def test_bfloat16_steps_are_near_float32(device: str) -> None:
    found = []
    for autocast in (True, False):
        steps = Steps(CASES[1], tiny(device))
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = steps.gradients(0)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in steps.model.parameters())
        found.append(found_in(steps, loss))
    errors = {name: relative(grad, found[1][name]) for name, grad in found[0].items()}
    assert max(errors.values()) < 0.1, errors


def test_the_watch_sees_host_work(device: str) -> None:
    layer = nn.Linear(4, 4).to(device)
    with Watch(device) as watch:
        layer(torch.ones(2, 4).to(device)).sum().item()
    assert any("_local_scalar_dense" in note for note in watch.found)
    if device == "cuda":
        assert any("copies from the host" in note for note in watch.found)
        with refusing_to_wait(), pytest.raises(RuntimeError, match="synchronizing"):
            layer.weight.sum().item()
