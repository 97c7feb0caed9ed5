"""The published implementation's operator, seven cases, on any device."""

from pathlib import Path

import numpy as np
import torch
from reference_trace import relative_error
from torch import Tensor

from basis.linear import basis_linear

GOLDEN = Path(__file__).parent / "basis/golden"
CASES = ["00", "01", "02", "03", "04", "05", "06"]


def operator_case(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / "op_cases.npz") as file:
        return {
            key.split("/")[1]: torch.from_numpy(file[key])
            for key in file.files
            if key.startswith(case)
        }


def check_operator(case: str, device: str) -> None:
    """Output and both gradients are the published ones to 1e-6."""
    golden = {name: t.to(device) for name, t in operator_case(case).items()}
    x, weight = golden["x"].requires_grad_(), golden["weight"].requires_grad_()
    y = basis_linear(
        x,
        weight,
        rank=int(golden["rank"]),
        bins=golden["bins"],
        signs=golden["signs"],
        shrinkage=float(golden["shrinkage"]),
    )
    y.backward(golden["grad_output"])
    assert x.grad is not None
    assert weight.grad is not None
    assert relative_error(y.detach(), golden["output"]) <= 1e-6
    assert relative_error(x.grad, golden["grad_input"]) <= 1e-6
    assert relative_error(weight.grad, golden["grad_weight"]) <= 1e-6
