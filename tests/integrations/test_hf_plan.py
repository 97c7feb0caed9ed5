"""Plans of models of a folder: from config.json alone, equal to steps that are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import basis
from bench import memory_plan as planning
from bench import plan_memory
from harness import memory
from harness.build import build_model
from harness.compose import configuration
from harness.config import Config
from harness.optim import make_optimizer

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "gpt2": lambda: transformers.GPT2Config(
        **SIZES, n_embd=32, n_layer=2, n_head=2, n_positions=32
    ),
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=4),
    "gemma2": lambda: transformers.Gemma2Config(**LLAMA | {"head_dim": 8, "pad_token_id": 0}),
}


def folder_of(config: Any, tmp_path: Path) -> Path:
    """A folder with config.json and no weights."""
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def config_of(folder: Path, *more: str) -> Config:
    given = ["model=hf", f"model.path={folder}", "device=cpu", "micro_batch_size=2", "optim=adamw"]
    return configuration([*given, *more], weights=False)


QUANTIZED = ["method=quantized", "method.budget=1/4", "method.include=['*']"]
SHRUNK = ["activations=lean", "precision=bfloat16"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", ["method=exact"]),
        ("llama", [*QUANTIZED, *SHRUNK]),
        ("llama", ["method=basis", "method.rank=4", "activations=checkpoint"]),
        ("gpt2", [*QUANTIZED, "activations=lean"]),
        ("mixtral", ["method=exact", "activations=lean"]),
        ("mixtral", [*QUANTIZED, *SHRUNK]),
        ("gemma2", [*QUANTIZED, "activations=lean"]),
    ],
)
def test_a_plan_agrees_with_a_step_that_is_taken(
    family: str, options: list[str], tmp_path: Path
) -> None:
    config = config_of(folder_of(CONFIGS[family](), tmp_path), *options)
    plan = planning.plan(config)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).save_pretrained(
        tmp_path / "model"
    )
    model, _ = build_model(config)
    tokens = torch.randint(64, (2, config.model.block_size))
    low = config.precision == "bfloat16"

    def forward() -> torch.Tensor:
        basis.set_noise_key(model, seed=0, step=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False):
            return model(tokens, tokens)

    measured = memory.saved_bytes(model, forward)
    assert plan.kept == pytest.approx(measured, rel=0.05)
    assert plan.parameters == memory.tensor_bytes(model.parameters())
    optimizer = make_optimizer(model, config.optim)
    peak = memory.cpu_peak_bytes(model, optimizer, lambda _: forward().backward())
    # A plan does not see the few rows that lie in a CPU's cache: much of so small a model.
    assert plan.peak == pytest.approx(peak, rel=0.08)


def test_blocks_of_several_kinds_are_walked_through_as_their_period_asks(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 4
    deep = {"num_hidden_layers": 8, "layer_types": kinds, "sliding_window": 8}
    settings = transformers.Qwen3Config(**LLAMA | deep, head_dim=8, use_sliding_window=True)
    config = config_of(folder_of(settings, tmp_path), "method=exact")
    assert planning._depths(planning._kinds(config.model)) == (4, 6)
    assert planning.plan(config) == planning.walk(config).plan()
    assert planning._depths([0, 0, 0, 0, 0, 1]) is None
    assert planning._depths([1, 0, 0, 0, 0, 0]) == (3, 4)
    assert planning._depths([0] * 4) is None


def test_the_command_wants_no_weights_and_knows_the_longest_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder_of(CONFIGS["llama"](), tmp_path)
    words = ["model=hf", f"model.path={path}", "parallel=fsdp", "world_size=64"]
    quick = ["--methods", "quantized budget=1/4", "--activations", "lean"]
    assert plan_memory.main([*words, *quick]) == 0
    assert "vocabulary 64" in capsys.readouterr().out
    assert plan_memory.most_context(config_of(path)) == 32
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors"):
        configuration(words[:2])
