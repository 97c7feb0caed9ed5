"""Where kernels are used, and that a kernel which can't be built costs a warning and nothing else.

There is no CUDA device here: kernels run in Triton's interpreter, failures are made.
"""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

from basis.ops import kernels

needs_triton = pytest.mark.skipif(not kernels._INSTALLED, reason="needs triton")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_devices", {})
    monkeypatch.setattr(kernels, "_given_up", set())


def plain(x: Tensor, by: float) -> Tensor:
    return x * by


def test_nothing_is_asked_for_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_runs_on", lambda device: pytest.fail("tried"))
    assert not kernels.usable(torch.ones(3))


@needs_triton
@pytest.mark.usefixtures("forced")
def test_a_kernel_runs_in_the_interpreter() -> None:
    from basis.ops.triton import trial

    assert trial.runs_on(torch.device("cpu"))
    assert kernels.usable(torch.ones(3))
    with kernels.forced(False):
        assert not kernels.usable(torch.ones(3))
    assert kernels.usable(torch.ones(3))


@needs_triton
def test_an_operator_of_a_kernel_is_called_by_the_compiler_alone() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def times(x, out, by, n, SIZE: tl.constexpr):
        place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        tl.store(out + place, by * tl.load(x + place, mask=place < n), mask=place < n)

    launched = []

    def scaled(x: Tensor, by: float) -> Tensor:
        launched.append(type(x))
        out = torch.empty_like(x)
        kernels.wrap(times)[(triton.cdiv(x.numel(), 8),)](x, out, by, x.numel(), SIZE=8)
        return out

    call = kernels.as_op("test_times", scaled)
    x = torch.arange(19.0)
    assert torch.equal(call(x, 3.0), 3.0 * x)
    assert launched == [Tensor]
    assert torch.equal(torch.ops.basis.test_times(x, 3.0), 3.0 * x)


@pytest.mark.usefixtures("forced")
def test_a_kernel_that_can_not_be_compiled_is_given_up_with_one_warning() -> None:
    tried = []

    def broken(x: Tensor, by: float) -> Tensor:
        tried.append(1)
        raise OSError("no space left\non device")

    x = torch.ones(3)
    with pytest.warns(RuntimeWarning, match=r"kernel .*broken could not.*OSError: no space left$"):
        assert torch.equal(kernels.attempt(broken, plain, x, 2.0), 2.0 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(kernels.attempt(broken, plain, x, 3.0), 3.0 * x)
    assert len(tried) == 1


@needs_triton
@pytest.mark.usefixtures("forced")
def test_what_triton_raises_counts_as_not_compiled_and_a_wrong_argument_does_not() -> None:
    from triton.runtime.errors import OutOfResources

    def greedy(x: Tensor, by: float) -> Tensor:
        raise OutOfResources(300_000, 232_448, "shared memory")

    def wrong(x: Tensor, by: float) -> Tensor:
        raise RuntimeError("illegal memory access")

    x = torch.ones(3)
    with pytest.warns(RuntimeWarning, match="shared memory"):
        assert torch.equal(kernels.attempt(greedy, plain, x, 2.0), 2.0 * x)
    with pytest.raises(RuntimeError, match="illegal"):
        kernels.attempt(wrong, plain, x, 2.0)


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), ImportError("x")])
def test_a_device_on_which_the_trial_fails_is_tried_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from basis.ops.triton import trial

    def fails(device: torch.device) -> bool:
        raise error

    monkeypatch.setattr(trial, "runs_on", fails)
    device = torch.device("cuda", 0)
    with pytest.warns(RuntimeWarning, match=r"Triton on cuda:0 could not.*take its place"):
        assert not kernels._runs_on(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels._runs_on(device)


@pytest.mark.usefixtures("forced")
def test_fake_tensors_and_transforms_are_left_to_plain_operators() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert not kernels.usable(torch.ones(3))
    seen = []
    torch.func.grad(lambda x: (seen.append(kernels.usable(x)), x.sum())[1])(torch.ones(3))
    assert seen == [False]


def test_basis_is_imported_without_triton_and_the_compiler() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; before = set(sys.modules)\n"
        "import basis; from basis.ops import kernels\n"
        "assert not kernels._INSTALLED and not kernels.usable(torch.ones(3))\n"
        "print([name for name in set(sys.modules) - before if 'dynamo' in name])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
