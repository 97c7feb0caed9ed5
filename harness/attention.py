"""`attention`: which entries of the attention matrix the gradient follows, orthogonal to method and activations.

| name | backward | costs |
|---|---|---|
| exact | PyTorch's own | |
| sus | SUS backprop (basis/sus/): about c entries of a row, drawn without bias; forward is exact | noise in the gradient |

With `activations=lean` q, k, v and output are kept in 8 bits, and SUS forms its probabilities from these.
"""

from __future__ import annotations

from dataclasses import dataclass

import basis.sus
from basis.sus.attention import check_options
from models import GPT
from models.gpt import CausalAttention

NAMES = ("exact", "sus")


@dataclass
class AttentionOptions:
    """c (entries of a row, at most and on average) and mode (sparse; dense for the reference) are of sus."""

    name: str = "exact"
    c: float = 25.0
    mode: str = "sparse"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"attention.name={self.name!r}: must be one of {', '.join(NAMES)}")
        try:
            check_options(self.c, self.mode)
        except ValueError as error:
            raise ValueError(f"attention.{error}") from None

    def telling(self) -> dict[str, object]:
        """What a run's labels say of it: nothing of exact attention, "sus c=25" as two settings, the mode if it isn't sparse."""
        if self.name == "exact":
            return {}
        return {"attention": self.name, "c": self.c} | ({} if self.mode == "sparse" else {"mode": self.mode})


def apply(model: GPT, options: AttentionOptions) -> None:
    """Change `model` in place as `options` say; before `activations.apply`, which wraps whatever attends."""
    if options.name == "sus":
        basis.sus.convert(model, CausalAttention, c=options.c, mode=options.mode)
