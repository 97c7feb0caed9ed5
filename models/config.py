"""Sizes and variants of a model: one dataclass for all families, so that a run's options have one
form. What a family does not have is refused, where it is not left at its default.
"""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES = ("gpt", "llama", "hf")
INITS = {"gpt": ("paper", "gpt2"), "llama": ("llama",), "hf": ("weights",)}
"""By family, how weights are drawn."""
OF_LLAMA = ("n_kv_head", "n_inner", "rope_theta")
"""Options that a GPT does not have."""
OF_HF = ("path", "sha256", "architecture")
"""Options of a model that was read from a folder."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variants. Raises ValueError that names the option (`model.n_head=3: ...`).

    vocab_size: ids that the model knows; None: to be filled in from the data before the model is
    built. block_size: T, tokens of context. n_layer: blocks. n_head: attention heads; divides
    n_embd, the width. layer_norm_eps: added to the variance, or by llama to the mean square.
    tie_head: the head uses the embedding's weight. init: how weights are drawn, see the family's
    module. Of llama only, null elsewhere: n_kv_head, heads of keys and values, divides n_head
    (None: n_head); n_inner, width of the MLP (None: 8/3 of n_embd, rounded up to a multiple of
    64); rope_theta, base of the rotary frequencies (None: 10,000). Of hf only: path, a folder;
    sha256 of what is in it; architecture, its config.json; models/hf.py fills in all but path.
    """

    vocab_size: int | None = None
    block_size: int = 64
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 64
    dropout: float = 0.0
    layer_norm_eps: float = 1e-6
    tie_head: bool = False
    init: str = "paper"
    n_kv_head: int | None = None
    n_inner: int | None = None
    rope_theta: float | None = None
    family: str = "gpt"
    path: str | None = None
    sha256: str | None = None
    architecture: str | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"model.family={self.family!r}: must be one of {', '.join(FAMILIES)}")
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "n_inner")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name}={value}: must be at least 1")
        if self.n_embd % self.n_head and self.family != "hf":
            raise ValueError(f"model.n_head={self.n_head}: must divide model.n_embd={self.n_embd}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout={self.dropout}: must be in [0, 1)")
        if not self.layer_norm_eps > 0.0:
            raise ValueError(f"model.layer_norm_eps={self.layer_norm_eps}: must be positive")
        if self.init not in INITS[self.family]:
            raise ValueError(
                f"model.init={self.init!r}: must be {' or '.join(INITS[self.family])} with "
                f"model.family={self.family}"
            )
        for name in OF_HF:
            if (getattr(self, name) is None) == (self.family == "hf"):
                raise ValueError(
                    f"model.{name}={getattr(self, name)}: is of model.family=hf, where it is needed"
                )
        if self.family == "llama":
            self._check_llama()
        elif self.family == "gpt":
            for name in OF_LLAMA:
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f"model.{name}={value}: is of model.family=llama only; leave it null"
                    )

    def _check_llama(self) -> None:
        if self.n_head % self.kv_heads:
            raise ValueError(
                f"model.n_kv_head={self.n_kv_head}: must divide model.n_head={self.n_head}"
            )
        if self.n_embd // self.n_head % 2:
            raise ValueError(
                f"model.n_head={self.n_head}: rotary positions need heads of even width; "
                f"model.n_embd={self.n_embd} gives {self.n_embd // self.n_head}"
            )
        if self.dropout:
            raise ValueError(f"model.dropout={self.dropout}: must be 0 with model.family=llama")
        if self.rope_theta is not None and not self.rope_theta > 0.0:
            raise ValueError(f"model.rope_theta={self.rope_theta}: must be positive")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def inner(self) -> int:
        """Width of the MLP's inner layer."""
        if self.family == "gpt" or (self.family == "hf" and self.n_inner is None):
            return 4 * self.n_embd
        return -(-8 * self.n_embd // 192) * 64 if self.n_inner is None else self.n_inner

    @property
    def block_matrices(self) -> int:
        """Weights of the dense layers of one block, without biases; of hf at least so many."""
        width, kept = self.n_embd, self.kv_heads * (self.n_embd // self.n_head)
        if self.family == "gpt":
            return 12 * width**2
        in_mlp = 2 if self.family == "hf" else 3
        return 2 * width**2 + 2 * width * kept + in_mlp * width * self.inner

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied ones once; an open vocabulary counts 1. Of hf at least so
        many.
        """
        width, words = self.n_embd, self.vocab_size or 1
        tables = (1 if self.tie_head else 2) * words * width
        if self.family == "gpt":
            vectors, tables = 13 * width, tables + self.block_size * width + 2 * width
        else:
            vectors, tables = 2 * width, tables + width
        return self.n_layer * (self.block_matrices + vectors) + tables
