"""Llama: pre-norm blocks with RMSNorm, rotary positions, grouped queries and SwiGLU, no biases.

    x = wte[tokens]
    n_layer times:
        x = x + o_proj(attention(rotated q_proj(n), rotated k_proj(n), v_proj(n))),   n = norm_1(x)
        x = x + down_proj(silu(gate_proj(m)) * up_proj(m)),                           m = norm_2(x)
    logits = head(norm_f(x));  loss = mean cross-entropy, in float32

Weights are normal with deviation 0.02, as transformers draws Llama's; the head has a weight of its
own unless `tie_head`. Keys and values have n_kv_head heads, each for n_head / n_kv_head queries.
Layers are called as in transformers' LlamaForCausalLM, so that what finds them there finds them
here.

Rotary positions (2104.09864): a head's numbers i and i + d/2 are a pair, turned by the angle
t theta^(-2i/d) at position t. So q . k depends on the difference of positions alone. The sines are
made once, in float32, and are no state.

What autograd keeps of a block at float32, in units of one B x T x C tensor, for h_kv = h and
I = n_inner: the normed inputs of q, k, v and of gate, up 2; q, k, v 3 and attention's output, which
is o_proj's input, 1; the norms' inputs and what PyTorch keeps of them 4; gate, silu(gate), up and
down's input 4 I / C.

Source: H. Touvron et al., LLaMA, 2302.13971; GQA, 2305.13245. Sizes: conf/model/llama_*.yaml.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.base import CausalAttention, Transformer
from models.config import ModelConfig

THETA = 10000.0


class Rotary(nn.Module):
    """Turns pairs of numbers of each head by angles that grow with the position."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, length: int, theta: float) -> None:
        super().__init__()
        pairs = torch.arange(0, width, 2, dtype=torch.float32) / width
        angles = torch.outer(torch.arange(length, dtype=torch.float32), theta**-pairs)
        angles = torch.cat((angles, angles), -1)  # (T, d): both numbers of a pair
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, h, T, d) -> the same, turned."""
        cos, sin = (table[: x.shape[2]].to(x.dtype) for table in (self.cos, self.sin))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin


class LlamaAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.n_embd // config.n_head
        theta = THETA if config.rope_theta is None else config.rope_theta
        self.rotary = Rotary(self.width, config.block_size, theta)
        self.attend = CausalAttention(dropout=0.0)
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.kv_heads * self.width, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.kv_heads * self.width, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.width)).transpose(1, 2)  # (b, h, T, d)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = self.attend(self.rotary(q), self.rotary(k), v)
        attended: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return attended


class GatedMLP(nn.Module):
    """SwiGLU (2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.inner, bias=False)
        self.act_fn = nn.SiLU()
        self.down_proj = nn.Linear(config.inner, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class LlamaBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.n_embd, eps=config.layer_norm_eps)
        self.attn = LlamaAttention(config)
        self.norm_2 = nn.RMSNorm(config.n_embd, eps=config.layer_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Llama(Transformer):
    """The model above."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.vocab_size is not None
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer))
        self.norm_f = nn.RMSNorm(config.n_embd, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_head:
            self.head.weight = self.wte.weight
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def embedded(self, x: Tensor) -> Tensor:
        return x  # positions enter in attention

    def normed(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm_f(x)
        return normed
