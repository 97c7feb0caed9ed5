"""The rows of bench_gpu's table of steps: what is done about the memory of activations, here and by
PyTorch.

In the order in which time is given to them: what a claim rests on comes first. Those marked
`compiled` exist under torch.compile only.

| row | kept of a block's 16 units | whose |
|---|---|---|
| exact, plain | all | |
| checkpoint; selective | the block's input; products and attention | torch.utils.checkpoint |
| memory budget | a share that the compiler keeps to | torch.compile |
| FP8 saved | what the compiler keeps, 8 bits a number | an Inductor pass, see `saving_in_fp8` |
| offload | on the host, copied there and back | hooks on saved tensors, as torch's save_on_cpu |
| recompute | 10 | basis/lean/recompute.py |
| checkpoint, 8 or 4 bits | the block's input in so many bits | basis/lean/boundary.py |
| basis, quantized, transform; lean | codes of dense layers' inputs; of the rest | basis/ |

FP8 here is e5m2 with a scale for each tensor, for all saved tensors but parameters that have half
as many bytes as a block's input in bfloat16, so that statistics of rows stay exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import basis
from basis.estimator import Estimator
from harness.activations import ActivationsOptions
from models import LanguageModel

PLAIN, LEAN = ActivationsOptions(), ActivationsOptions(name="lean")
RECOMPUTE = ActivationsOptions(name="recompute")
CHECKPOINT = ActivationsOptions(name="checkpoint")
EIGHT, FOUR = (ActivationsOptions(name="checkpoint", boundary=bits) for bits in (8, 4))
Around = Callable[[], AbstractContextManager[object]]


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A row of the table of steps: the method of the dense layers whose names match `include`
    (None: exact), what else is kept, and whether whole logits are formed.

    fp8, offload: what PyTorch does with what is saved, see above. compiled: under torch.compile
    only.
    """

    method: Estimator | None = None
    kept: ActivationsOptions = PLAIN
    plain_loss: bool = False
    include: tuple[str, ...] = ("*",)
    fp8: bool = False
    offload: bool = False

    @property
    def compiled(self) -> bool:
        return self.fp8 or self.kept.name == "budget"

    def around(self, model: LanguageModel, tokens: int) -> Around:
        """What forward runs in, for a step of so many tokens."""
        if self.offload:
            known = {parameter.data_ptr() for parameter in model.parameters()}
            return lambda: offloading(known)
        if self.fp8:
            return lambda: saving_in_fp8(tokens * model.config.n_embd / 2**20)
        return nullcontext


def _budget(share: float) -> Alternative:
    return Alternative(kept=ActivationsOptions(name="budget", budget=share))


R64 = basis.BalancedSketch(64)
ALTERNATIVES = {
    "exact, plain": Alternative(),
    "exact, checkpoint": Alternative(kept=CHECKPOINT),
    "basis R=64, plain": Alternative(R64),
    "basis R=64, lean": Alternative(R64, LEAN),
    "exact, recompute": Alternative(kept=RECOMPUTE),
    "exact, checkpoint, 8 bits": Alternative(kept=EIGHT),
    "exact, checkpoint, 4 bits": Alternative(kept=FOUR),
    "exact, memory budget 0.5": _budget(0.5),
    "exact, FP8 saved": Alternative(fp8=True),
    "exact, checkpoint, whole logits": Alternative(kept=CHECKPOINT, plain_loss=True),
    "transform 4 bits, plain": Alternative(basis.Transform(4.0)),
    "quantized 3.75 bits, plain": Alternative(basis.Quantized(3.75)),
    "basis R=64, recompute": Alternative(R64, RECOMPUTE),
    "basis R=64, checkpoint, 8 bits": Alternative(R64, EIGHT),
    "exact, checkpoint, selective": Alternative(
        kept=ActivationsOptions(name="checkpoint", selective=True)
    ),
    "exact, lean": Alternative(kept=LEAN),
    "exact, memory budget 0.25": _budget(0.25),
    "exact, memory budget 0.75": _budget(0.75),
    # one input in five is neither a norm's output nor GELU's: only that is sketched
    "basis R=64 on attn.proj, recompute": Alternative(R64, RECOMPUTE, include=("*.attn.proj",)),
    "exact, offload": Alternative(offload=True),
    "basis R=64, checkpoint": Alternative(R64, CHECKPOINT),
    "exact, checkpoint, FP8 saved": Alternative(kept=CHECKPOINT, fp8=True),
    "basis R=512, plain": Alternative(basis.BalancedSketch(512)),
}


def saving_in_fp8(megabytes: float) -> AbstractContextManager[object]:
    """Within, a graph that is compiled keeps what it saves in FP8: tensors of at least so many
    megabytes, parameters excepted.
    """
    from torch._inductor import config

    options = {
        "quant_type": "torch.float8_e5m2",
        "use_scaling": True,
        "size_in_mb": megabytes,
        "exclude_primals": True,
        "allowed_dtypes": "torch.bfloat16;torch.float32",
    }
    name = "activation_quantization_aten_pass"
    found: AbstractContextManager[object] = config.patch(
        post_grad_fusion_options=config.post_grad_fusion_options | {name: options}
    )
    return found


_SMALL = 1 << 12  # numbers: not worth a copy


@contextmanager
def offloading(known: set[int]) -> Iterator[None]:
    """Within, what autograd saves goes to the host's memory, pinned if it comes from CUDA; tensors
    at the addresses `known` (parameters) and small ones stay.
    """

    def pack(tensor: Tensor) -> Any:
        if tensor.numel() < _SMALL or tensor.data_ptr() in known:
            return tensor
        pinned = tensor.device.type == "cuda"
        held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        held.copy_(tensor, non_blocking=pinned)  # in the order of the stream
        return tensor.device, held

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        device, held = kept
        restored: Tensor = held.to(device, non_blocking=True)
        return restored

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
