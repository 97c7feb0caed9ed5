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

import torch
from torch import Tensor, nn

from models.base import CausalAttention, Transformer
from models.config import ModelConfig as GPTConfig

__all__ = ["GPT", "CausalAttention", "GPTConfig"]


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


class GPT(Transformer):
    """The model above."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        assert config.vocab_size is not None
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

    def embedded(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        embedded: Tensor = self.drop(x + self.wpe(positions))
        return embedded

    def normed(self, x: Tensor) -> Tensor:
        normed: Tensor = self.ln_f(x)
        return normed
