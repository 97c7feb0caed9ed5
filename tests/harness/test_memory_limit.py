"""More memory than there is: refused by option before it is asked for, told by category after."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.errors import CompactHydraException
from tiny import losses, train_here

import models
from harness import memory_limit
from harness.compose import configuration
from harness.folder import rundir
from harness.memory_limit import HALVES, explain, is_out_of_memory, machine_bytes
from harness.run import Run
from models import GPTConfig, ModelConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "model",
    [
        GPTConfig(vocab_size=11, block_size=7, n_layer=3, n_head=2, n_embd=6),
        GPTConfig(vocab_size=11, block_size=7, n_layer=1, n_head=1, n_embd=4, tie_head=True),
        ModelConfig(11, 7, 2, 4, 16, family="llama", init="llama", n_kv_head=2, n_inner=24),
        ModelConfig(11, 7, 2, 4, 16, family="llama", init="llama", tie_head=True),
    ],
)
def test_parameters_are_counted_without_a_model(model: ModelConfig) -> None:
    made = models.build(model)
    assert model.parameters == sum(p.numel() for p in made.parameters())


TOO_LARGE = [
    (["model.n_embd=100000"], "model.n_embd=100000, model.n_layer=1"),
    (["model.n_layer=1000000000"], "model.n_layer=1000000000"),
    (["model.vocab_size=20000000000"], "model.vocab_size=20000000000"),
    (["micro_batch_size=1000000000000"], "micro_batch_size=1000000000000, model.block_size=16"),
    (["tokens_per_step=1600000000000"], "tokens_per_step=1600000000000"),
]


@pytest.mark.parametrize(("words", "said"), TOO_LARGE, ids=lambda value: str(value)[:40])
def test_what_can_not_fit_is_refused_by_the_option(
    words: list[str], said: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(CompactHydraException) as refusal:
        train_here(data, tmp_path / "run", *words)
    assert said in str(refusal.value)
    assert "B, and cpu has " in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_is_held_is_divided_by_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "machine_bytes", lambda device: 100 << 20)
    words = ["model.n_embd=512", "model.n_layer=6", "model.vocab_size=100", "method=exact"]
    with pytest.raises(ValueError, match=r"at least .* MiB, and cpu has 100 MiB"):
        memory_limit.check(configuration(words), CPU)
    memory_limit.check(configuration([*words, "parallel=fsdp", "world_size=4"]), CPU)


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = tmp_path / "memory.max"
    monkeypatch.setattr(memory_limit, "_GROUPS", (str(limits), "/absent"))
    limits.write_text("max\n")
    machine = machine_bytes(CPU)
    limits.write_text(f"{1 << 20}\n")
    assert machine_bytes(CPU) == 1 << 20 < machine


def test_every_way_to_say_it_is_known() -> None:
    """Of PyTorch and numpy as they are installed: 2^60 bytes."""
    for ask in (lambda: torch.empty(1 << 58), lambda: np.empty(1 << 57)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            ask()
        assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError(), None])
def test_where_it_ran_out_each_category_has_its_knob(
    error: Exception | None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Run.micro_batch_loss

    def fails(self: Run, step: int, micro_batch: int) -> torch.Tensor:
        if self.step == 13:
            if error is None:
                torch.empty(1 << 58)
            else:
                raise error
        return batch(self, step, micro_batch)

    options = ["method.rank=3", "micro_batch_size=2"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "micro_batch_loss", fails)
        with pytest.raises(CompactHydraException) as refusal:
            train_here(data, tmp_path, *options)
    said = str(refusal.value)
    assert said.startswith("out of memory on cpu (")
    assert "micro_batch_size=1 (tokens_per_step stays) halves" in said
    kept = losses(tmp_path)[0]
    for name in ("linear inputs", "sketches", "attention", "norms", "activations"):
        assert kept[f"mem/saved_bytes/{name}"] > 0
        assert HALVES[name] in said
    assert rundir.read_summary(tmp_path)["reason"] == "out of memory"
    train_here(data, tmp_path, *options)  # the same command goes on
    assert rundir.read_summary(tmp_path)["status"] == "finished"


def test_out_of_memory_in_the_set_up_is_one_message_and_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.set_up.build_model", lambda config: torch.empty(1 << 58))
    with pytest.raises(CompactHydraException, match=r"^out of memory on cpu .*block_size=8 halves"):
        train_here(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_knobs_halve_what_they_stand_beside(data: Path, tmp_path: Path) -> None:
    sizes = ["steps=1", "micro_batch_size=4", "model.block_size=32", "model.n_embd=32"]

    def kept(name: str, *options: str) -> dict[str, int]:
        train_here(data, tmp_path / name, *sizes, *options)
        prefix = "mem/saved_bytes/"
        row = losses(tmp_path / name)[0]
        return {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}

    plain = kept("plain", "method=exact")
    for name, options, categories in (
        ("bf16", ["precision=bfloat16"], ["linear inputs"]),
        ("lean", ["activations=lean"], ["attention", "norms", "activations"]),
        ("checkpoint", ["activations=checkpoint"], ["attention", "norms", "activations"]),
        ("fewer", ["micro_batch_size=2"], ["linear inputs", "attention", "norms"]),
    ):
        less = kept(name, "method=exact", *options)
        for category in categories:
            assert less[category] <= 0.56 * plain[category], (name, category)
    sketched = kept("sketched", "method=basis", "method.include=['*']", "method.rank=8")
    assert sketched["linear inputs"] + sketched["sketches"] < plain["linear inputs"] / 2


def test_without_measurements_there_is_the_first_line_alone() -> None:
    config = configuration(["method=exact", "micro_batch_size=1"])
    assert len(explain(config, CPU, {}).splitlines()) == 1
    assert "cuda_graph=false" in explain(config, CPU, {}, captured=True)
