"""Several processes compute what one does: compared with a single process that accumulates as many
micro-batches, in gradients, losses and what methods learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_checks import on_processes, trained

from harness.compose import configuration
from harness.world import World, _device, here

Jobs = dict[str, tuple[str, dict[str, Any]]]
KINDS = ("ddp", "fsdp")
METHODS = ("exact", "basis", "transform")
DRAWS = 200


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has seen of every kind and method."""
    jobs: Jobs = {
        f"{kind} {method}": ("trained", {"kind": kind, "method": method})
        for kind in KINDS
        for method in METHODS
    }
    for kind in KINDS:
        jobs[f"{kind} one step"] = "trained", {"kind": kind, "method": "transform", "steps": 1}
    jobs["noise"] = ("noise", {"draws": DRAWS})
    return on_processes(2, tmp_path_factory.mktemp("two"), jobs)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return {method: trained("none", method) for method in METHODS}


def _close(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for name, gradient in alone["gradients"].items():
        error = (found["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < 1e-6, (name, float(error))
    torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-5, atol=0)
    # After a step a rounding at random may fall to the other side.
    torch.testing.assert_close(found["norms"], alone["norms"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["exact", "basis"])
def test_two_processes_compute_what_one_accumulates(
    two: list[dict[str, Any]], one: dict[str, Any], kind: str, method: str
) -> None:
    for seen in two:
        _close(seen[f"{kind} {method}"], one[method])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_is_the_first_process_s_to_the_last_bit(
    two: list[dict[str, Any]], one: dict[str, Any], kind: str
) -> None:
    first, second = (seen[f"{kind} transform"]["learned"] for seen in two)
    assert first
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    # In the first step a single process learns from the same rows, under the same weights.
    alone = trained("none", "transform", steps=1)["learned"]
    for seen in two:
        for name, tensor in seen[f"{kind} one step"]["learned"].items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_an_evaluation_is_the_same_in_every_process(
    two: list[dict[str, Any]], one: dict[str, Any], kind: str, method: str
) -> None:
    first, second = (seen[f"{kind} {method}"]["evaluated"] for seen in two)
    assert first == second
    if method != "transform":  # whose weights differ: two processes learn from other rows
        assert first == pytest.approx(one[method]["evaluated"], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_the_whole_and_gives_each_its_part(
    two: list[dict[str, Any]], one: dict[str, Any], kind: str
) -> None:
    assert all(seen[f"{kind} {method}"]["continued"] for seen in two for method in METHODS)
    for name, tensor in one["exact"]["state"].items():
        torch.testing.assert_close(
            two[0][f"{kind} exact"]["state"][name], tensor, rtol=1e-4, atol=1e-5
        )


def test_fsdp_holds_half_of_the_parameters(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for seen in two:
        assert seen["fsdp exact"]["bytes"] == one["exact"]["bytes"] / 2
        assert seen["ddp exact"]["bytes"] == one["exact"]["bytes"]


def test_basis_is_unbiased_its_noise_differs_by_process_and_its_variance_halves(
    two: list[dict[str, Any]],
) -> None:
    """z-tests of 20 projections over keys; variances as sums over all entries."""
    first, second = (seen["noise"] for seen in two)
    assert torch.equal(first["joint"], second["joint"])
    assert not torch.equal(first["alone"][0], second["alone"][0])
    mean = (first["alone"] + second["alone"]) / 2
    torch.testing.assert_close(first["joint"], mean, rtol=1e-4, atol=1e-7)
    projections = torch.randn(
        first["exact"].numel(), 20, generator=torch.Generator().manual_seed(0)
    )
    errors = (first["joint"] - first["exact"]) @ projections
    z = errors.mean(0) / (errors.std(0) / DRAWS**0.5)
    assert z.abs().max() < 4.0
    alone, joint = (first[mode].var(0).sum() for mode in ("alone", "joint"))
    # 200 draws of hundreds of correlated entries: a ratio known to a tenth or so.
    assert 0.42 < joint / alone < 0.58


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_with_other_methods_and_activations_too(kind: str, tmp_path: Path) -> None:
    jobs: Jobs = {"quantized": ("trained", {"kind": kind, "method": "quantized"})}
    for kept in ("lean", "checkpoint", "recompute"):
        jobs[kept] = "trained", {"kind": kind, "method": "basis", "kept": kept}
    for seen in on_processes(2, tmp_path, jobs):
        for name, (_, given) in jobs.items():
            _close(seen[name], trained(**given | {"kind": "none"}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_two_processes_compute_what_one_accumulates(kind: str, tmp_path: Path) -> None:
    jobs: Jobs = {
        f"{method} {kept}": ("trained", {"kind": kind, "method": method, "kept": kept})
        for method, kept in (("exact", "plain"), ("basis", "plain"), ("basis", "checkpoint"))
    }
    compiled: Jobs = {name: (job, given | {"compile": True}) for name, (job, given) in jobs.items()}
    for seen in on_processes(2, tmp_path, compiled):
        for name, (_, given) in jobs.items():
            _close(seen[name], trained(**given | {"kind": "none"}))


def test_the_place_of_a_process_is_read_from_its_environment() -> None:
    assert here({}) == World(1, 0, 0)
    assert here({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}) == World(4, 3, 1)
    srun = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    assert here(srun) == World(8, 5, 1)
    # A batch script runs once, whatever its job has asked for.
    assert here({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == World(1, 0, 0)
    with pytest.raises(ValueError, match=r"^RANK='4': .* less than 4$"):
        here({"WORLD_SIZE": "4", "RANK": "4"})
    with pytest.raises(ValueError, match=r"^WORLD_SIZE='two': "):
        here({"WORLD_SIZE": "two", "RANK": "0"})


def test_a_process_takes_the_device_of_its_number_or_the_only_one_that_it_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    assert _device(World(8, 5, 1), devices=4) == 1
    with pytest.raises(ValueError, match=r"^parallel: process 5 is number 1 .* 1 CUDA devices"):
        _device(World(8, 5, 1), devices=1)
    monkeypatch.setenv("SLURM_PROCID", "5")  # srun --gpus-per-task shows each its own
    assert _device(World(8, 5, 1), devices=1) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel=some"], r"^parallel='some': must be one of none, ddp, fsdp$"),
        (["world_size=0"], r"^world_size=0: must be at least 1$"),
        (["parallel=none", "world_size=2"], r"^parallel=none: world_size=2 processes would"),
        (["parallel=ddp", "cuda_graph=true"], r"^cuda_graph=true: not with parallel=ddp"),
        (["parallel=ddp", "method=zeroth_order"], r"^method=zeroth_order: not with parallel=ddp"),
        (["parallel=fsdp", "diagnostics.every=5"], r"^diagnostics.every=5: .*parallel=none or ddp"),
        (["parallel=fsdp", "diagnostics.monitor=true"], r"^diagnostics.monitor=true: not with"),
        (["resume.world_size=4"], r"^resume.world_size='4': must be same or any$"),
        (
            ["world_size=2", "micro_batch_size=4", "model.block_size=16", "tokens_per_step=192"],
            r"micro_batch_size \* model.block_size \* world_size = 4 \* 16 \* 2 = 128; "
            r"nearest are 128 and 256$",
        ),
    ],
)
def test_what_can_t_be_is_refused_by_name(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        configuration(words)


def test_tokens_of_a_step_are_those_of_all_processes() -> None:
    words = ["micro_batch_size=4", "model.block_size=16"]
    alone = configuration([*words, "tokens_per_step=256"])
    both = configuration([*words, "tokens_per_step=256", "world_size=2"])
    assert (alone.parallel, alone.micro_batches) == ("none", 4)
    assert (both.parallel, both.micro_batches, both.step_tokens) == ("ddp", 2, 256)
    assert configuration([*words, "world_size=2"]).step_tokens == 128
