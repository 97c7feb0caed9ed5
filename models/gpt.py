"""GPT: one decoder-only transformer, by configuration the paper's model or one of the GPT-2 family.

    x = wte[tokens] + wpe[positions]
    n_layer times, pre-LayerNorm:
        x = x + proj(attention(qkv(ln_1(x))))
        x = x + mlp.proj(gelu(mlp.fc(ln_2(x))))
    logits = head(ln_f(x));  loss = mean cross-entropy, in float32

| | paper (arXiv 2604.16324 and its code) | GPT-2 (as in nanoGPT) |
|---|---|---|
| head | a weight of its own, no bias | tied to wte, no bias |
| `init` | "paper" | "gpt2" |
| dense weights | truncated normal, variance 1 / fan_in | normal 0.02 |
| projections into the residual stream | the same | normal 0.02 / sqrt(2 n_layer) |
| embeddings | normal, variance 1 / n_embd | normal 0.02 |
| LayerNorm eps | 1e-6 | 1e-5 |

Both have biases in attention, MLP and LayerNorm, learned positions and tanh-approximated GELU.
Query, key and value are one fused dense layer `qkv`: the same distribution at initialisation, one
product instead of three.

What autograd keeps of a block at float32, in units of one B x T x C tensor (B x T tokens): inputs
of qkv, proj, fc and mlp.proj 1 + 1 + 1 + 4; attention's q, k, v 3 and its output, which is proj's
input; GELU's input 4; the LayerNorms' inputs 2, and statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis import linear_cross_entropy
from basis.embedding import tied_embedding


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and variants. Raises ValueError that names the option (`model.n_head=3: ...`)."""

    vocab_size: int | None = None  # None: to be filled in from the data before the model is built
    block_size: int = 64  # T, tokens of context
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 64
    dropout: float = 0.0
    layer_norm_eps: float = 1e-6
    tie_head: bool = False
    init: str = "paper"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name}={value}: must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"model.n_head={self.n_head}: must divide model.n_embd={self.n_embd}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout={self.dropout}: must be in [0, 1)")
        if not self.layer_norm_eps > 0.0:
            raise ValueError(f"model.layer_norm_eps={self.layer_norm_eps}: must be positive")
        if self.init not in ("paper", "gpt2"):
            raise ValueError(f"model.init={self.init!r}: must be paper or gpt2")


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(d) + causal mask) v: a module, so that other ways to attend can take its
    place.
    """

    is_causal = True  # as F.scaled_dot_product_attention calls it

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (b, h, T, d) -> (b, h, T, d)."""
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.attend = CausalAttention(config.dropout)
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).view(
            batch, length, 3, self.n_head, width // self.n_head
        )  # (b, T, 3, h, d)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each (b, h, T, d)
        y = self.attend(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.gelu(self.fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x)))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Weights are drawn from PyTorch's default generator when the model is made."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size=null: give a number, or take it from the data")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_head:
            self.head.weight = self.wte.weight
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        paper = self.config.init == "paper"
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if module.weight is self.wte.weight:
                    pass  # tied: drawn as an embedding
                elif paper:
                    # A normal cut at two deviations has 0.8796 of its deviation left.
                    std = 1.0 / math.sqrt(module.in_features) / 0.87962566103423978
                    nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                else:
                    residual = name.endswith(".proj")
                    nn.init.normal_(
                        module.weight,
                        std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02,
                    )
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(
                    module.weight, std=1.0 / math.sqrt(self.config.n_embd) if paper else 0.02
                )

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens (b, T) int64 -> logits (b, T, V); with targets (b, T) -> their mean cross-entropy
        in nats, a scalar.

        Raises ValueError if T is larger than block_size.
        """
        length = tokens.shape[1]
        if length > self.config.block_size:
            raise ValueError(
                f"{length} tokens do not fit model.block_size={self.config.block_size}"
            )
        positions = torch.arange(length, device=tokens.device)
        weight = None
        if targets is not None and self.head.weight is self.wte.weight:
            x, weight = tied_embedding(self.wte, tokens)
        else:
            x = self.wte(tokens)
        x = self.drop(x + self.wpe(positions))  # (b, T, C)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            logits: Tensor = self.head(x)  # (b, T, V)
            return logits
        return linear_cross_entropy(self.head, x, targets, weight=weight, ignore_index=None)

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
