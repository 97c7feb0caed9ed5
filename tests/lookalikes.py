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
