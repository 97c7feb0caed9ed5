"""Byte accounting against counts made by hand."""

import pytest
import torch

import basis
from harness.memory import (
    cpu_peak_bytes,
    format_bytes,
    optimizer_bytes,
    saved_bytes,
    saved_bytes_total,
    tensor_bytes,
)
from models import GPT, GPTConfig

BATCH, T, C, V, LAYERS, HEADS = 3, 16, 32, 50, 2, 2
ROWS = BATCH * T
UNIT = ROWS * C * 4  # bytes of one B x T x C tensor in float32


def model_and_forward(method: str):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=V, block_size=T, n_layer=LAYERS, n_head=HEADS, n_embd=C))
    if method == "basis":
        basis.convert(model, basis.BalancedSketch(4), exact_if_kept=False)
    tokens = torch.randint(V, (BATCH, T))
    return model, lambda: model(tokens, tokens)


def test_categories_of_an_exact_gpt_as_counted_by_hand() -> None:
    model, forward = model_and_forward("exact")
    table = saved_bytes(model, forward)
    # Inputs of qkv, fc and mlp.proj (proj's input is the attention output, saved by attention); the
    # head keeps none.
    assert table["linear inputs"] == LAYERS * (1 + 1 + 4) * UNIT
    assert table["sketches"] == 0
    # q, k, v and output, and the log-sum-exp: one float32 per row and head.
    assert table["attention"] == LAYERS * (4 * UNIT + ROWS * HEADS * 4)
    # Two LayerNorms a block and the last one: input, mean and reciprocal deviation.
    assert table["norms"] == (2 * LAYERS + 1) * (UNIT + 2 * ROWS * 4)
    assert table["activations"] == LAYERS * 4 * UNIT
    assert table["loss head"] == UNIT + V * C * 4  # dX and dW of the head
    assert table["other"] <= ROWS * 8 + T * 8 + 64  # token and position indices


def test_sketches_replace_linear_inputs() -> None:
    exact = saved_bytes(*model_and_forward("exact"))
    sketched = saved_bytes(*model_and_forward("basis"))
    assert sketched["linear inputs"] == 0
    # The hashing that all share: rows in order, two tables of signs, one of them longer by the
    # number of layers, and where 4 bins begin.
    hashing = 4 * (ROWS + ROWS + (ROWS + 4 * LAYERS + 1) + 4)
    assert sketched["sketches"] == LAYERS * 4 * 4 * (C + C + C + 4 * C) + hashing
    # Of the head dX, and what dW is formed of in backward: P (V, R) and Z (R, C).
    assert sketched["loss head"] == UNIT + 4 * 4 * (V + C)
    unchanged = ("attention", "norms", "activations", "other")
    assert {name: sketched[name] for name in unchanged} == {name: exact[name] for name in unchanged}


def test_hooks_are_removed_and_nothing_is_left_behind() -> None:
    model, forward = model_and_forward("basis")
    saved_bytes(model, forward)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_total_without_categories_agrees_in_eager_mode() -> None:
    model, forward = model_and_forward("exact")
    assert saved_bytes_total(model, forward) == sum(saved_bytes(model, forward).values())


@pytest.mark.parametrize("method", ["exact", "basis"])
def test_cpu_peak_holds_at_least_what_must_exist_at_once(method: str) -> None:
    model, forward = model_and_forward(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parameters = tensor_bytes(model.parameters())
    kept = sum(saved_bytes(model, forward).values())
    peak = cpu_peak_bytes(model, optimizer, lambda _: forward().backward())
    assert optimizer_bytes(optimizer) == parameters  # momentum is counted before it exists
    assert 2 * parameters + kept < peak < 3 * parameters + 3 * kept
    again = cpu_peak_bytes(model, optimizer, lambda _: forward().backward(), micro_batches=2)
    assert (
        again > peak + 0.5 * parameters
    )  # the second micro-batch meets the gradients of the first
    optimizer.step()
    assert optimizer_bytes(optimizer) == parameters
    optimizer.zero_grad()
    assert cpu_peak_bytes(model, optimizer, lambda _: forward().backward()) == pytest.approx(
        peak, rel=0.02
    )  # now it does


def test_cpu_peak_of_a_chain_as_counted_by_hand() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)  # 64 bytes
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.ones(1, 4)

    def forward_backward(_: int) -> None:
        (layer(x) * torch.ones(100, 1)).exp()  # 16, 400, 1600 and 1600 bytes

    # While exp runs: the weight, the column (kept for backward), exp's input and output; the
    # layer's result is gone.
    assert cpu_peak_bytes(layer, optimizer, forward_backward) == 64 + 400 + 1600 + 1600


@pytest.mark.parametrize("method", ["exact", "basis"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_cpu_peak_is_what_pytorchs_own_tracker_counts(method: str, micro_batches: int) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    model, forward = model_and_forward(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    forward().backward()
    optimizer.step()
    optimizer.zero_grad()
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for _ in range(micro_batches):
            # it refuses a second pass through a module otherwise; the peak is kept
            tracker.reset_mod_stats()
            forward().backward()
    (theirs,) = tracker.get_tracker_snapshot("peak").values()
    optimizer.zero_grad()
    assert (
        cpu_peak_bytes(model, optimizer, lambda _: forward().backward(), micro_batches)
        == theirs["Total"]
    )


def test_autocast_copies_of_weights_are_no_inputs() -> None:
    for method, copies in (("exact", LAYERS * 12 * C * C * 2), ("basis", 0)):
        model, forward = model_and_forward(method)

        def low(forward=forward) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return forward()

        table = saved_bytes(model, low)
        assert table["weight copies"] == copies
        if method == "exact":
            assert table["linear inputs"] == LAYERS * (1 + 1 + 4) * UNIT // 2


def test_tensor_bytes_counts_a_storage_once() -> None:
    whole = torch.zeros(100)
    assert (
        tensor_bytes(
            [whole, whole[:10], whole.view(10, 10), None, torch.zeros(3, dtype=torch.int64)]
        )
        == 400 + 24
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (20480, "20.0 KiB"),
        (12.3 * 2**20, "12.3 MiB"),
    ],
)
def test_format_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text
