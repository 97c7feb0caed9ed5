"""What the tests of a GPU share: each begins with products in full float32, whatever a run before
it has allowed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def full_precision() -> None:
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = False
