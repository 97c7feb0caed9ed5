"""Parts of today's blocks as transformers writes them, in words of their own, some that have the
name of such a part and compute something else, and what tests ask of stand-ins.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N, WIDE, ROWS = 64, 128, 96
LOW = torch.bfloat16


class LlamaRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class GemmaRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class T5LayerNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, LOW):
            x = x.to(self.weight.dtype)
        return self.weight * x


class LateRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * y).to(x.dtype)


class ScaledRMSNorm(LlamaRMSNorm):
    """Of the name, but not what it says."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.0001 * super().forward(x)


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * F.silu(gate))


class SiLUActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class NewGELUActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class ReLUSquaredActivation(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return torch.square(F.relu(input))


class QuickGELUActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class LlamaMLP(nn.Module):
    def __init__(self, act: nn.Module | None = None, bias: bool = True) -> None:
        super().__init__()
        self.hidden_size = N
        self.gate_proj = nn.Linear(N, WIDE, bias=bias)
        self.up_proj = nn.Linear(N, WIDE, bias=bias)
        self.down_proj = nn.Linear(WIDE, N, bias=bias)
        self.act_fn = SiLUActivation() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FusedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(N, 2 * WIDE, bias=False)
        self.down_proj = nn.Linear(WIDE, N, bias=False)
        self.activation_fn = nn.GELU(approximate="tanh")

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class T5Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(N, WIDE, bias=False) for _ in range(2))
        self.wo = nn.Linear(WIDE, N, bias=False)
        self.dropout, self.act = nn.Dropout(0.1), NewGELUActivation()

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.act(self.wi_0(x)) * self.wi_1(x))
        return self.wo(y.to(self.wo.weight.dtype))


class MultipliedMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(make: object) -> nn.Module:
    torch.manual_seed(0)
    return make()


def gradients(module: nn.Module, x: Tensor, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of x and of the parameters."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    y = module(x)
    return y, list(torch.autograd.grad(y, (x, *module.parameters()), normal(*y.shape).to(y)))


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        float((a - b).float().norm() / b.float().norm()) for a, b in zip(found, exact, strict=True)
    ]


def kept_by(model: nn.Module, x: Tensor, *, trained_before: bool = True) -> int:
    """Bytes that a forward keeps, but for x itself and parameters. trained_before: whether x has a
    gradient.
    """
    x = x.detach().requires_grad_(trained_before)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    for known in (x, *model.parameters()):
        kept.pop(known.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    return sum(kept.values())
