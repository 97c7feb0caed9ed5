"""Training steps on a device that does not exist, under the watch of device_checks.py.

    python tests/pretend_device.py NAME...  prints JSON: for each case what the watch noted

PyTorch lets a backend be written in Python. This one has no kernels at all: in FakeTensorMode an
operator is asked for the shapes of its results only, and a tensor knows the device it claims to lie
on. So "which device is this on, and who looked at its values" is answered for the code that runs on
any accelerator, without one. What is written for CUDA alone is not seen here.

A process of its own, because a device must be there before autograd starts its threads.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from device_checks import Watch
from step_cases import CASES, Case, Steps

import basis
from basis import noise_key
from basis.ops import tables
from models import GPT, GPTConfig

DEVICE = "pretend"
# gpt2: the paper's initial weights are drawn by a function that looks at numbers.
SHAPES = GPTConfig(vocab_size=257, n_layer=1, init="gpt2")


class Module:
    """What PyTorch asks of a device's module: one device, autocast, a generator without state."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device(self, index: int) -> AbstractContextManager[None]:
        return nullcontext()

    def get_rng_state(self, device: int = 0) -> None:
        return None

    def set_rng_state(self, state: None, device: int = 0) -> None:
        pass


def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """torch.tensor, which makes the tensor on the host and copies it; it asks this device for
    memory unseen by FakeTensorMode, so here the two are done one after the other.
    """
    made = _tensor(data, **options)
    return made if device is None else made.to(device)


_tensor, torch.tensor = torch.tensor, tensor


def noted(case: Case) -> list[str]:
    """What the watch noted in steps of a case, the first ones of a run; if one fails, why."""
    with torch.device(DEVICE):
        model = GPT(SHAPES)
    step = Steps(case, model)
    # The harness's is fused, and PyTorch does not know the shapes of that on such a device.
    step.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    # Methods that learn look at their inputs in the first steps, and then every so many.
    learns = any(layer.state for _, layer in basis.sketched_layers(model))
    numbers = (0, 999) if learns else (0,)
    found = watched(step, numbers)
    # What is not found again was a table made once.
    return found and watched(step, numbers)


def watched(step: Steps, numbers: tuple[int, ...]) -> list[str]:
    with Watch(DEVICE) as watch:
        try:
            for number in numbers:
                step(number)
        except RuntimeError as error:  # of a pretend device that has no value to give
            return [*watch.found, f"{type(error).__name__}: {str(error)[:300]}"]
    assert watch.count > 100
    return watch.found


def main() -> None:
    _setup_privateuseone_for_python_backend(DEVICE, Module())
    # One mode for all: tables that the library makes once are fake from then on. allow...: those
    # that it made for the meta device.
    # Tables are kept, as on a real device; fake ones may be, as long as all are of one mode.
    noise_key._identities = noise_key._known_identities
    tables.in_eager_mode = lambda _: True
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = {case.name: noted(case) for case in CASES if case.name in sys.argv[1:]}
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
