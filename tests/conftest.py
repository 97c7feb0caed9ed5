"""What all tests share: one thread for each process, no network for libraries that would try, and
as many workers of pytest-xdist as help.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, here and in the processes that tests start. Tests compare runs of this
# process with runs of its children to the last bit, so all need the same number of threads. One is
# the fastest number for matrices of this size, and it leaves the other cores to other workers.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
# cuBLAS reads it at the first product of a process; later tests may ask for determinism.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# Compiled code goes to a folder of this worker, and no pool of compiling processes is started.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(
    Path(tempfile.gettempdir()) / f"basis-tests-inductor-{os.getuid()}" / WORKER
)
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# Before triton is imported: without a GPU its kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# BASIS_REHEARSAL=1: tests of a GPU that ask for `device` run on the CPU, to see that they run.
REHEARSAL = os.environ.get("BASIS_REHEARSAL") == "1"


@pytest.fixture
def forced() -> Iterator[None]:
    """Kernels are used on every device: on the CPU in Triton's interpreter."""
    from basis.ops import kernels

    with kernels.forced():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, and shown as such, where there is no CUDA device. Their
    warnings are shown and are no errors: compilers say there what a card is not good at.
    """
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if not item.get_closest_marker("gpu"):
            continue
        item.add_marker(pytest.mark.filterwarnings("default"))
        rehearsed = REHEARSAL and "device" in getattr(item, "fixturenames", ())
        if not torch.cuda.is_available() and not rehearsed:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests have recorded (record_property), such as how much they tried; a worker of
    pytest-xdist can't print.
    """
    for report in terminalreporter.stats.get("passed", []):
        for _, said in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {said}")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """The number for `-n auto`: none for the tests of a single file, otherwise one for each core.

    A worker takes some seconds to start, and it hides the debugger and what a test prints.
    """
    named = {argument.partition("::")[0] for argument in config.args}
    return 0 if len(named) == 1 and named.pop().endswith(".py") else None


@pytest.fixture
def device() -> str:
    """The device of tests that need CUDA; in a rehearsal the CPU."""
    return "cpu" if REHEARSAL else "cuda"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the text of tiny runs (tiny.py) and its prepared tokens, shared by the tests of
    a module.
    """
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> Iterator[None]:
    """Forget what a test has compiled: torch.compile gives up where one function has been compiled
    for too many layers in a process, in whatever tests.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
