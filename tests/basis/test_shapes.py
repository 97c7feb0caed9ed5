"""Kernels of fake tensors: results of the right shapes, and nothing held beside them."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from basis.ops import group_code, kernels, shapes
from harness.memory import LiveBytes


def test_results_are_those_of_the_function_and_the_function_runs_once() -> None:
    calls = []

    def plain(x: Tensor, bits: int) -> tuple[Tensor, int]:
        calls.append(x.shape)
        wide = torch.cat([x] * 8)
        return wide[: len(x)].to(torch.float64), bits

    def held(x: Tensor) -> int:
        with LiveBytes([x]) as live:
            y, bits = kernels.attempt(plain, plain, x, 3)
            z = y + 1
        assert (y.shape, y.dtype, bits, z.shape) == (x.shape, torch.float64, 3, x.shape)
        return max(now for _, now in live.series)

    with FakeTensorMode():
        x = torch.empty(16, 4)
        assert held(x) == (1 + 8 + 2) * x.nbytes  # the peak is within the function
        with shapes.alone():
            assert [held(x), held(torch.empty(16, 4))] == [(1 + 2 + 2) * x.nbytes] * 2
            assert len(calls) == 2
            held(torch.empty(17, 4))
            assert len(calls) == 3


def test_what_is_given_comes_back_itself() -> None:
    with FakeTensorMode(), shapes.alone():
        x = torch.empty(4)
        assert kernels.attempt(torch.Tensor.view, lambda t: t.view(2, 2), x)._base is x


def test_a_code_of_fake_tensors_has_the_sizes_of_a_real_one() -> None:
    key = torch.zeros((), dtype=torch.int64)
    real = group_code.encode(torch.randn(40, 24), key, 2.5, 16)
    with FakeTensorMode(allow_non_fake_inputs=True), shapes.alone():
        fake = group_code.encode(torch.empty(40, 24), torch.empty((), dtype=torch.int64), 2.5, 16)
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
