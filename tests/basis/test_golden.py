"""Against the published implementation: seven operator cases and three training traces (see
reference_trace.py).
"""

import numpy as np
import pytest
from golden_checks import CASES, GOLDEN, check_operator, operator_case
from reference_trace import relative_error, replay_in_full


@pytest.mark.parametrize("case", CASES)
def test_operator_matches_published_values(case: str) -> None:
    check_operator(case, "cpu")


@pytest.mark.parametrize("case", CASES)
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
    path = str(GOLDEN / f"train_{method}.npz")
    losses, final_errors, grad_errors = replay_in_full(path)
    with np.load(path) as file:
        expected = file["losses"]
    assert len(losses) == 20
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    assert max(final_errors.values()) <= 1e-5, final_errors
    assert max(grad_errors.values()) <= 1e-5, grad_errors
