"""Against the published implementation: seven operator cases and three training traces (see
reference_trace.py).
"""

import numpy as np
import pytest
import torch
from reference_trace import relative_error, replay_in_full

from basis.linear import basis_linear

GOLDEN = __file__.rsplit("/", 1)[0] + "/golden"


def operator_case(case: str) -> dict[str, torch.Tensor]:
    with np.load(f"{GOLDEN}/op_cases.npz") as file:
        return {
            key.split("/")[1]: torch.from_numpy(file[key])
            for key in file.files
            if key.startswith(case)
        }


@pytest.mark.parametrize("case", ["00", "01", "02", "03", "04", "05", "06"])
def test_operator_matches_published_values(case: str) -> None:
    golden = operator_case(case)
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
    assert relative_error(y.detach(), golden["output"]) <= 1e-6
    assert relative_error(x.grad, golden["grad_input"]) <= 1e-6
    assert relative_error(weight.grad, golden["grad_weight"]) <= 1e-6


@pytest.mark.parametrize("case", ["00", "01", "02", "03", "04", "05", "06"])
def test_float64_reference_matches_published_values(case: str) -> None:
    import oracle as reference

    golden = operator_case(case)
    estimate = reference.weight_grad(
        golden["x"],
        golden["grad_output"],
        golden["bins"],
        golden["signs"],
        int(golden["rank"]),
        invariant_scalars=True,
        shrinkage=float(golden["shrinkage"]),
    )
    assert relative_error(estimate, golden["grad_weight"]) <= 1e-6


@pytest.mark.parametrize("method", ["exact", "rank1", "rank32"])
def test_training_trace_matches_published_run(method: str) -> None:
    path = f"{GOLDEN}/train_{method}.npz"
    losses, final_errors, grad_errors = replay_in_full(path)
    with np.load(path) as file:
        expected = file["losses"]
    assert len(losses) == 20
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    assert max(final_errors.values()) <= 1e-5, final_errors
    assert max(grad_errors.values()) <= 1e-5, grad_errors
