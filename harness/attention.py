"""`attention`: which entries of the attention matrix the gradient follows, orthogonal to method and
activations.

| name | backward | costs |
|---|---|---|
| exact | PyTorch's own | |
| sus | SUS backprop: about c entries of a row, drawn without bias | noise in the gradient |

SUS (basis/sus/) leaves forward exact.

With `activations=lean` q, k, v and output are kept in 8 bits, and SUS forms its probabilities from
these.

c and mode mean nothing to exact attention, so they are refused there: a run whose label says c = 10
has followed 10. How c and the variance of the gradient go together is not logged beside training:
it takes many windows (scripts/sus_variance.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import basis
from basis.diagnostics.quality import TOTAL
from basis.sus.attention import check_options
from models import LanguageModel
from models.base import CausalAttention

NAMES = ("exact", "sus")
OF_SUS = ("c", "mode")
"""Options of sus alone."""


@dataclass(frozen=True)
class AttentionOptions:
    """c (entries of a row, at most and on average; None: 25) and mode (None: sparse; dense for the
    reference) are of sus.
    """

    name: str = "exact"
    c: float | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"attention.name={self.name!r}: must be one of {', '.join(NAMES)}")
        if self.name != "sus":
            for option in OF_SUS:
                value = getattr(self, option)
                if value is not None:
                    given = f"{value:g}" if isinstance(value, float) else value
                    raise ValueError(
                        f"attention.{option}={given}: is of attention=sus only, {self.name} "
                        "attention follows every entry; give attention=sus, or leave "
                        f"attention.{option} null"
                    )
            return
        c = 25.0 if self.c is None else self.c
        mode = "sparse" if self.mode is None else self.mode
        try:
            check_options(c, mode)
        except ValueError as error:
            raise ValueError(f"attention.{error}") from None
        # null stands for these values, and a run is compared by what it computed with.
        object.__setattr__(self, "c", c)
        object.__setattr__(self, "mode", mode)

    def label_options(self) -> dict[str, object]:
        """What a run's labels say of it: nothing of exact attention, "sus c=25" as two settings,
        the mode if it isn't sparse.
        """
        if self.name == "exact":
            return {}
        found: dict[str, object] = {"attention": self.name, "c": self.c}
        return found if self.mode == "sparse" else found | {"mode": self.mode}


def apply(model: LanguageModel, options: AttentionOptions) -> None:
    """Change `model` in place as `options` say; before `activations.apply`, which wraps whatever
    attends.
    """
    if options.name == "sus":
        assert options.c is not None, options
        assert options.mode is not None, options
        basis.convert(model, basis.SUS(CausalAttention, c=options.c, mode=options.mode))


def kept_metrics(model: LanguageModel, forward: Callable[[], object]) -> dict[str, float]:
    """What the SUS attention of each block keeps in `forward()`, and all of them together, as
    `sus/<layer>/<name>`.

    `forward` runs `model`. A layer is called as its block's attention, blocks.0.attn, whatever is
    wrapped around what attends.
    """
    found = {
        name.partition(".attend")[0]: kept
        for name, kept in basis.sus.kept_statistics(model, forward).items()
    }
    found[TOTAL] = basis.sus.Kept.together(found.values())
    return {
        f"sus/{layer}/{name}": value
        for layer, kept in found.items()
        for name, value in kept.metrics().items()
    }
