"""What all families of models have in common: tokens in, logits or a loss out, and text by
sampling.

A family gives `wte`, the embedding, `blocks`, each a module of x (b, T, C), and `head`. One that is
a `Transformer` also says what the first block reads (`embedded`) and what the head does (`normed`).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis import linear_cross_entropy
from basis.embedding import tied_embedding
from models.config import ModelConfig


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(d) + causal mask) v: a module, so that other ways to attend can take its
    place.
    """

    is_causal = True  # as F.scaled_dot_product_attention calls it

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (b, h, T, d), k and v (b, h_kv, T, d) with h a multiple of h_kv -> (b, h, T, d)."""
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            enable_gqa=k.shape[1] != q.shape[1],
        )


class LanguageModel(nn.Module, abc.ABC):
    """Weights are drawn from PyTorch's default generator when the model is made.

    Raises ValueError if the configuration leaves the vocabulary open.
    """

    wte: nn.Embedding
    blocks: nn.ModuleList
    head: nn.Linear

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size=null: give a number, or take it from the data")
        self.config = config

    @abc.abstractmethod
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens (b, T) int64 -> logits (b, T, V); with targets (b, T) -> their mean cross-entropy
        in nats, a scalar.

        Raises ValueError if T is larger than block_size.
        """

    def check_length(self, tokens: Tensor) -> None:
        """Raise ValueError if `tokens` (b, T) are more than block_size."""
        if (length := tokens.shape[1]) > self.config.block_size:
            raise ValueError(
                f"{length} tokens do not fit model.block_size={self.config.block_size}"
            )

    @property
    def names(self) -> dict[str, str]:
        """Where `blocks` and `head` are, if these are not their names."""
        return {}

    def pattern(self, pattern: str) -> str:
        """A pattern of layers' names, such as blocks.*.mlp.*, in this model's own names."""
        first, dot, rest = pattern.partition(".")
        return self.names.get(first, first) + dot + rest

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue `tokens` (b, T) by `new_tokens` samples; yields each new column (b, 1).
        temperature 0 is greedy.

        Only ids below `vocab_size` are drawn, for a tokenizer that is smaller than the model's
        padded vocabulary. The model is run in the mode it is in: call eval() first. The last
        block_size tokens are the context.
        """
        for _ in range(new_tokens):
            logits = self(tokens[:, -self.config.block_size :])[
                :, -1, :vocab_size
            ].float()  # (b, V)
            if top_k is not None and top_k < logits.shape[-1]:
                least = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial(
                    torch.softmax(logits / temperature, -1), 1, generator=generator
                )
            tokens = torch.cat([tokens, new], 1)
            yield new

    def parameter_count(self) -> int:
        """Parameters, tied ones once."""
        return sum(p.numel() for p in self.parameters())


class Transformer(LanguageModel):
    """A model whose forward is written here: an embedding, blocks one after the other, a head."""

    @abc.abstractmethod
    def embedded(self, x: Tensor) -> Tensor:
        """What the first block reads, of the embedded tokens x (b, T, C)."""

    @abc.abstractmethod
    def normed(self, x: Tensor) -> Tensor:
        """What the head reads, of the last block's x (b, T, C)."""

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        self.check_length(tokens)
        weight = None
        if targets is not None and self.head.weight is self.wte.weight:
            x, weight = tied_embedding(self.wte, tokens)
        else:
            x = self.wte(tokens)
        x = self.embedded(x)
        for block in self.blocks:
            x = block(x)
        x = self.normed(x)
        if targets is None:
            logits: Tensor = self.head(x)  # (b, T, V)
            return logits
        return linear_cross_entropy(self.head, x, targets, weight=weight, ignore_index=None)
