"""Where and how a run computes: device, precision, compilation and CUDA graphs, decided in one
place from one table.

| device | precisions | compile by default | cuda_graph by default |
|---|---|---|---|
| cuda | float32, bfloat16 (autocast) if the card has it | without a graph | if launch-bound |
| cpu | float32, bfloat16 (autocast) | no: it takes a minute and gains little | no |

A step is launch-bound if starting its operations takes longer than computing them, `launch_bound`.
The rule knows the sizes of the model alone, not the card, nor the method: runs that are compared
take the same way, and a run may go on with another card. A graph removes what compilation would
gain there, and takes a second to make instead of a minute; `compile=true` has both.

Parameters, gradients and optimiser state are float32 always; `precision=bfloat16` is autocast
around forward. `float32` on CUDA allows TF32 in matrix products unless `deterministic=true`.

Bit-wise reproducible: on the CPU always, for the same machine, thread count, versions and
`compile`. On CUDA with `deterministic=true`. Between devices, or with and without compile or
cuda_graph, losses agree only to rounding.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from models import ModelConfig

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("float32", "bfloat16")
LAUNCH_SECONDS = 5e-6
"""What starting an operation takes the host."""
LAUNCHES = (30, 40)
"""Operations of a micro-batch, forward and backward with exact gradients: in a block, and beside
the blocks."""
FLOPS = 1e14
"""Floating-point operations that a card does in a second, a low guess."""


@dataclass(frozen=True)
class Runtime:
    """What `resolve` decided."""

    device: torch.device
    precision: str
    compile: bool
    cuda_graph: bool = False

    def describe(self) -> dict[str, str | bool]:
        """What was decided, in words that a summary can hold and a resumed run can compare."""
        return {
            "device": self.device.type,
            "precision": self.precision,
            "compile": self.compile,
            "cuda_graph": self.cuda_graph,
        }

    def forward(self, model: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        """`model(*batch)`, computed on the run's device and in its precision."""
        with self.autocast():
            return model(*(tensor.to(self.device) for tensor in batch))

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which forward runs: autocast to bfloat16 if that is the precision.

        Without its cache of weights in bfloat16: a weight is used once in a forward, and the cache
        would hold copies of all until the forward ends.
        """
        return (
            torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
            if self.precision == "bfloat16"
            else nullcontext()
        )

    def synchronize(self) -> None:
        """Wait for the device, so that a clock may be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


MANY_WORDS = 1 << 16
"""What an unknown vocabulary counts as: more than any tokenizer of data/ but hf has."""


def launch_bound(model: ModelConfig, rows: int) -> bool:
    """Whether a step of `model`, `rows` tokens in a micro-batch, is launch-bound.

    FLOPs of forward and backward: 6 for each weight and token in dense layers (12 C^2 weights in a
    block, C V in the head), 6 T C for each token in causal attention. An unknown vocabulary counts
    as a large one.
    """
    layers, width = model.n_layer, model.n_embd
    head = width * (model.vocab_size or MANY_WORDS)
    block = model.block_matrices + model.block_size * width
    flops = 6 * rows * (layers * block + head)
    launches = LAUNCHES[0] * layers + LAUNCHES[1]
    return launches * LAUNCH_SECONDS > flops / FLOPS


def resolve(
    device: str,
    precision: str,
    compile: bool | None,
    *,
    deterministic: bool = False,
    cuda_graph: bool | None = False,
    small: bool = False,
) -> Runtime:
    """The table above. small: whether cuda_graph=None means true on CUDA. Raises ValueError naming
    the option if this machine lacks what was asked for.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ValueError(
            "device='cuda': PyTorch finds no CUDA device here; use device=cpu or device=auto"
        )
    kind = "cuda" if cuda and device != "cpu" else "cpu"
    if cuda_graph and kind != "cuda":
        raise ValueError(
            f"cuda_graph=true: needs device=cuda; with device={device} this run computes on the "
            "CPU, so give cuda_graph=null or false"
        )
    captured = kind == "cuda" and (small if cuda_graph is None else cuda_graph)
    if (
        precision == "bfloat16"
        and kind == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ValueError(
            "precision='bfloat16': this CUDA device has no bfloat16; use precision=float32"
        )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
    torch.use_deterministic_algorithms(deterministic)
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = not deterministic
    else:
        keep_freed_memory()
    if compile is None:
        compile = kind == "cuda" and not captured
    return Runtime(torch.device(kind), precision, compile, captured)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that a training step frees, for the next step to use again.

    By default blocks of more than a few MB go back to the system when freed, and each page of the
    next one has to be mapped and zeroed again: a sixth of the paper model's step. The cost is that
    up to half a gigabyte stays with the process. Elsewhere than on Linux with glibc nothing is
    done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        # Older versions take no more than 32 MiB. Trimming is left alone if neither is taken, or it
        # would be for nothing. Larger ones, such as the logits of an evaluation, are seldom enough
        # to be mapped again each time.
        if mallopt(m_mmap_threshold, 64 << 20) or mallopt(m_mmap_threshold, 32 << 20):
            mallopt(m_trim_threshold, 512 << 20)
