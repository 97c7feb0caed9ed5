"""Directions followed between steps, against the eigenvectors that they follow."""

import torch

from basis.ops import principal_directions

DEVICE = torch.device("cpu")


def batches(count: int, rows: int, deviations: torch.Tensor, basis_seed: int = 1):
    generator = torch.Generator().manual_seed(0)
    width = len(deviations)
    frame, _ = torch.linalg.qr(
        torch.randn(width, width, generator=torch.Generator().manual_seed(basis_seed))
    )
    for _ in range(count):
        yield (torch.randn(rows, width, generator=generator) * deviations) @ frame.t() + 3.0


def test_finds_the_principal_directions_and_their_variances() -> None:
    deviations = 2.0 ** -torch.arange(12, dtype=torch.float32)
    state = principal_directions.initial_directions(12, 4, DEVICE)
    for x in batches(30, 4096, deviations):
        state = principal_directions.follow(state, x)
    frame, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))
    overlap = (state["directions"].t() @ frame[:, :4]).abs()
    torch.testing.assert_close(overlap, torch.eye(4), atol=0.02, rtol=0)
    torch.testing.assert_close(state["variances"], deviations[:4].square(), rtol=0.05, atol=0)


def test_directions_stay_orthonormal_and_sorted() -> None:
    state = principal_directions.initial_directions(12, 12, DEVICE)
    for x in batches(5, 64, torch.rand(12, generator=torch.Generator().manual_seed(3))):
        state = principal_directions.follow(state, x)
        torch.testing.assert_close(
            state["directions"].t() @ state["directions"], torch.eye(12), atol=1e-5, rtol=0
        )
        assert (state["variances"].diff() <= 0).all()


def test_turns_when_the_data_turn() -> None:
    deviations = torch.cat([torch.ones(3), torch.full((9,), 0.05)])
    state = principal_directions.initial_directions(12, 3, DEVICE)
    for seed in (1, 2):
        for x in batches(25, 512, deviations, basis_seed=seed):
            state = principal_directions.follow(state, x)
        frame, _ = torch.linalg.qr(
            torch.randn(12, 12, generator=torch.Generator().manual_seed(seed))
        )
        captured = (state["directions"].t() @ frame[:, :3]).square().sum() / 3
        assert captured > 0.99


def test_looks_at_the_first_steps_and_then_now_and_then() -> None:
    looks = [step for step in range(41) if principal_directions.due(step, 10)]
    assert looks == [*range(principal_directions.EAGER_STEPS), 10, 20, 30, 40]


def test_groups_are_followed_as_if_each_were_alone() -> None:
    """7 features in 2 groups: the first 4, and the other 3 with a feature of zeros."""
    whole = principal_directions.initial_directions(7, 2, DEVICE, groups=2)
    parts = [principal_directions.initial_directions(4, 2, DEVICE) for _ in range(2)]
    for x in batches(5, 64, torch.rand(7, generator=torch.Generator().manual_seed(3)) + 0.1):
        whole = principal_directions.follow(whole, x, groups=2)
        filled = torch.cat((x, torch.zeros(len(x), 1)), 1)
        parts = [
            principal_directions.follow(part, filled[:, 4 * i : 4 * i + 4])
            for i, part in enumerate(parts)
        ]
    for name in ("directions", "variances"):
        torch.testing.assert_close(whole[name], torch.cat([part[name] for part in parts]))
    assert whole["looks"] == 5


def test_state_is_float32_whatever_the_default_is() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        state = principal_directions.initial_directions(4, 2, DEVICE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
