"""What all tests share: two threads, as in the commands that are tested, and no network for
libraries that would try.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# The tests compare runs of this process with runs of its children to the last bit: all need the
# same number of threads.
os.environ["OMP_NUM_THREADS"] = "2"
os.environ["MKL_NUM_THREADS"] = "2"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the text of tiny runs (tiny.py) and its prepared tokens, shared by the tests of
    a module.
    """
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules whose matrices are so small that more threads are slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
