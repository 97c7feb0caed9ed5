"""Classes that look like those of other libraries to the code that tells them, and work alike."""

import torch
from torch import Tensor, nn


class Conv1D(nn.Module):
    """As transformers' dense layer of GPT-2."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """As an experts module of transformers, in words of its own: a loop over experts, with the
    options that the registry's decorator puts on it.
    """

    def __init__(
        self,
        experts: int = 4,
        width: int = 8,
        inner: int = 12,
        *,
        gate: bool = True,
        bias: bool = False,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.num_experts = object(), experts
        self.has_gate, self.has_bias, self.is_transposed = gate, bias, transposed
        first = 2 * inner if gate else inner
        self.first_name = "gate_up_proj" if gate else "up_proj"
        for name, out, into in ((self.first_name, first, width), ("down_proj", width, inner)):
            shape = (experts, into, out) if transposed else (experts, out, into)
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / into**0.5))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(experts, out)))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def _product(self, name: str, x: Tensor, expert: int) -> Tensor:
        weight = self.get_parameter(name)[expert]
        y = x @ (weight if self.is_transposed else weight.t())
        return y + self.get_parameter(f"{name}_bias")[expert] if self.has_bias else y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):  # one of more is no expert
            tokens, places = torch.where(top_k_index == expert)
            h = self._product(self.first_name, hidden_states[tokens], expert)
            h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
            y = self._product("down_proj", h, expert) * top_k_weights[tokens, places, None]
            result = result.index_add(0, tokens, y.to(result.dtype))
        return result


class Mixture(nn.Module):
    """A router of two experts a token, and the experts."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = Experts(**options)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        return self.experts(x, chosen, weights)
