"""More memory than there is: refused before it is asked for, or told by category where it ran out.

*Before.* Linux hands out memory that it does not have and kills the process when it is used. So
`check` compares the least that a run must hold at once with what the machine has (a container's
limit counts): parameters, gradients and optimiser state; what one block makes of one micro-batch;
the order in which the windows of a step are drawn. All three are lower bounds, so what passes may
still be too much: `scripts/plan_memory.py` plans to the byte.

*Where it ran out.* CUDA, PyTorch's CPU allocator and numpy say it in three ways
(`is_out_of_memory`). `explain` shows what was kept from forward to backward, measured before the
first step, and with each category the option that at least halves it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.memory import format_bytes

if TYPE_CHECKING:
    from harness.config import Config

_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CPU_SAYS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")

HALVES = {
    "linear inputs": "precision=bfloat16, or method.include=['*'] with a method that estimates dW",
    "sketches": "half of method.rank, or of method.budget",
    "attention": "activations=lean or activations=checkpoint",
    "norms": "activations=lean or activations=checkpoint",
    "activations": "activations=lean or activations=checkpoint",
    "loss head": "half of micro_batch_size, but for the head's dW (model.vocab_size)",
    "weight copies": "precision=float32 has none",
    "parameters": "half of model.n_layer, or parallel=fsdp on two devices",
    "gradients": "half of model.n_layer, or parallel=fsdp on two devices",
    "optimiser state": "optim=sgd has none, or parallel=fsdp on two devices",
}
"""What at least halves the bytes of a category; half of micro_batch_size halves the others."""


def machine_bytes(device: torch.device) -> int:
    """The memory of `device`; of the CPU what this process may have of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [Path(name).read_text().strip() for name in _GROUPS if Path(name).exists()]
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([here, *(int(limit) for limit in limits if limit.isdecimal())])


def check(config: Config, device: torch.device) -> None:
    """Raise ValueError, naming the options, if the run can't fit into the memory of `device`."""
    has = machine_bytes(device)
    model, rows = config.model, config.micro_batch_size * config.model.block_size
    element = 2 if config.precision == "bfloat16" else 4
    copies = 1 if config.method.zeroth_order is not None else 2
    copies += 2 if config.optim.name == "adamw" else int(config.optim.momentum > 0)
    held = 4 * copies * model.parameters
    held //= config.world_size if config.parallel == "fsdp" else 1
    sizes = ", ".join(f"model.{n}={getattr(model, n)}" for n in ("n_embd", "n_layer", "vocab_size"))
    windows = config.step_tokens // model.block_size
    batch = f"micro_batch_size={config.micro_batch_size}, model.block_size={model.block_size}"
    for option, needed, what in (
        (
            sizes,
            held,
            "parameters, gradients and the optimiser's state",
        ),
        (batch, rows * (16 + 5 * model.n_embd * element), "one micro-batch in one block"),
        (
            f"tokens_per_step={config.tokens_per_step}",
            8 * windows if config.data.order == "random" else 0,
            f"the order of the {windows:,} windows of a step",
        ),
    ):
        if needed > has:
            raise ValueError(
                f"{option}: {what}: at least {format_bytes(needed)}, and {device.type} has "
                f"{format_bytes(has)}; give a smaller one"
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: CUDA's, the CPU allocator's, numpy's and
    Python's.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_SAYS)


def explain(
    config: Config, device: torch.device, measured: Mapping[str, Any], *, captured: bool = False
) -> str:
    """What to say where memory ran out. measured: metrics `mem/...`, as far as they are known;
    captured: steps are CUDA graphs, which keep a memory of their own.
    """
    fewer = (
        f"micro_batch_size={config.micro_batch_size // 2} (tokens_per_step stays)"
        if config.micro_batch_size > 1
        else f"model.block_size={max(config.model.block_size // 2, 1)}"
    )
    said = (
        f"out of memory on {device} ({format_bytes(machine_bytes(device))}): {fewer} halves what a "
        f"micro-batch keeps{', and cuda_graph=false needs less' if captured else ''}"
    )
    prefix = "mem/saved_bytes/"
    kept = {k.removeprefix(prefix): v for k, v in measured.items() if k.startswith(prefix)}
    kept |= {
        name: measured.get(f"mem/{metric}_bytes", 0)
        for name, metric in (
            ("parameters", "parameter"),
            ("gradients", "gradient"),
            ("optimiser state", "optimizer"),
        )
    }
    lines = [
        f"  {name:<16}{format_bytes(size):>10}  {HALVES.get(name, 'half of micro_batch_size')}"
        for name, size in kept.items()
        if size
    ]
    return "\n".join([said + ("; of each kind, and what halves it:" if lines else ""), *lines])
