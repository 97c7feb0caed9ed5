"""Batches are what the documented orders say, and a function of their key alone."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from data import Sampler, TokenFile, validation_windows, write_tokens

COUNT, T = 1000, 7
TOKENS = (np.arange(COUNT) * 7919) % 1009


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "t.bin", [TOKENS], 1009)


def sampler(tokens: TokenFile, order: str, **options: int) -> Sampler:
    options = {"block_size": T, "batch_size": 3, "seed": 5, **options}
    return Sampler(tokens, order=order, **options)  # type: ignore[arg-type]


def test_paper_order_equals_the_loop_written_by_hand(tokens: TokenFile) -> None:
    """1000 = 125 windows of 8, three at a time: wraps around in the middle of step 41."""
    served = sampler(tokens, "paper")
    position = 0
    for step in range(90):
        inputs, targets = served.batch(step)
        for row in range(3):
            window = TOKENS[position : position + T + 1]
            assert inputs[row].tolist() == window[:-1].tolist()
            assert targets[row].tolist() == window[1:].tolist()
            position += T + 1
            if position + T + 1 > COUNT:
                position = 0


def test_paper_order_never_reads_the_incomplete_window(tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "t.bin", [np.arange(29)], 29)  # 3 windows of 8, 5 tokens over
    first = [int(sampler(file, "paper", batch_size=1).batch(step)[0][0, 0]) for step in range(7)]
    assert first == [0, 8, 16, 0, 8, 16, 0]


@pytest.mark.parametrize("order", ["paper", "random"])
def test_batch_is_a_pure_function(tokens: TokenFile, order: str) -> None:
    """Any order of calls, any new object, other evaluations in between: the same batch. Shape,
    dtype, shift by one.
    """
    first = sampler(tokens, order, micro_batches=2)
    forwards = [first.batch(step, micro) for step in range(5) for micro in range(2)]
    torch.manual_seed(1)
    np.random.default_rng(1)
    second = sampler(tokens, order, micro_batches=2)
    backwards = [
        second.batch(step, micro) for step in reversed(range(5)) for micro in reversed(range(2))
    ][::-1]
    for (inputs, targets), (again, _) in zip(forwards, backwards, strict=True):
        assert torch.equal(inputs, again)
        assert inputs.shape == targets.shape == (3, T)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous()
        assert targets.is_contiguous()
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_random_order_depends_on_seed_and_step_and_paper_order_not_on_the_seed(
    tokens: TokenFile,
) -> None:
    random = {
        (seed, step): tuple(sampler(tokens, "random", seed=seed).starts(step))
        for seed in range(8)
        for step in range(8)
    }
    assert len(set(random.values())) == 64
    assert sampler(tokens, "paper", seed=1).starts(4) == sampler(tokens, "paper", seed=2).starts(4)


def test_random_order_is_pinned(tokens: TokenFile) -> None:
    """Philox's raw stream, keyed by hand: a later numpy or a refactoring must not reshuffle
    published runs.
    """
    raw = np.random.Philox(key=(5 << 64) + 2).random_raw(3)
    assert (
        sampler(tokens, "random").starts(2) == [int(r) % (COUNT - T) for r in raw] == [253, 401, 26]
    )


def test_random_offsets_are_uniform_and_reach_both_ends(tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "t.bin", [np.arange(27)], 27)  # starts 0 .. 19
    served = sampler(file, "random", batch_size=10)
    starts = [start for step in range(2000) for start in served.starts(step)]
    counts = np.bincount(starts, minlength=20)
    assert len(counts) == 20
    assert stats.chisquare(counts).pvalue > 1e-3
    _, targets = served.batch(int(np.argmax([19 in served.starts(step) for step in range(2000)])))
    assert int(targets.max()) == 26  # the last token is somebody's target


@pytest.mark.parametrize("order", ["paper", "random"])
def test_a_step_reads_the_same_windows_however_it_is_divided(tokens: TokenFile, order: str) -> None:
    """12 windows: as one batch, as 4 micro-batches of 3, over 4 ranks, over 2 ranks with 2
    micro-batches.
    """

    def step(step: int, micro_batches: int, world_size: int, batch_size: int) -> list[int]:
        return [
            start
            for micro in range(micro_batches)
            for rank in range(world_size)
            for start in sampler(
                tokens,
                order,
                micro_batches=micro_batches,
                world_size=world_size,
                rank=rank,
                batch_size=batch_size,
            ).starts(step, micro)
        ]

    for at in (0, 3, 11):
        whole = step(at, 1, 1, 12)
        assert len(whole) == 12
        for division in ((4, 1, 3), (1, 4, 3), (2, 2, 3), (12, 1, 1)):
            assert step(at, *division) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "foo"}, r"data\.order='foo': must be one of paper, random"),
        ({"block_size": 1000}, r"model\.block_size=1000: one window needs 1001 tokens"),
        ({"block_size": 0}, r"model\.block_size=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
    ],
)
def test_refusals(tokens: TokenFile, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(tokens, **{"order": "random", **options})


def test_shortest_file_that_still_serves(tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "t.bin", [np.arange(8)], 8)
    for order in ("paper", "random"):
        inputs, targets = sampler(file, order).batch(99)
        assert inputs.tolist() == [list(range(7))] * 3
        assert targets.tolist() == [list(range(1, 8))] * 3


def test_validation_windows_are_the_first_of_the_file(tokens: TokenFile, tmp_path: Path) -> None:
    windows = validation_windows(tokens, block_size=T, batch_size=4, batches=5)
    assert len(windows) == 5
    flat = TOKENS[: 5 * 4 * 8].reshape(5, 4, 8)
    for (inputs, targets), expected in zip(windows, flat, strict=True):
        assert np.array_equal(inputs, expected[:, :-1])
        assert np.array_equal(targets, expected[:, 1:])
    # The hash covers the tokens used: another tail does not matter, another token does.
    longer = write_tokens(tmp_path / "longer.bin", [TOKENS[:160], [1, 2, 3]], 2000)
    assert (
        validation_windows(longer, block_size=T, batch_size=4, batches=5).hash
        == windows.hash
        == sha256_of_ids(TOKENS[:160])
    )
    changed = write_tokens(tmp_path / "changed.bin", [TOKENS[:159], [1]], 2000)
    assert validation_windows(changed, block_size=T, batch_size=4, batches=5).hash != windows.hash


def sha256_of_ids(ids: np.ndarray) -> str:
    return hashlib.sha256(b"".join(int(token).to_bytes(2, "little") for token in ids)).hexdigest()


def test_validation_takes_what_a_short_file_holds(tokens: TokenFile) -> None:
    # 1,000 tokens are 125 windows of T + 1 = 8.
    for asked, got in (((5, 25), (5, 25)), ((6, 25), (5, 25)), ((9, 100), (1, 100))):
        windows = validation_windows(tokens, block_size=T, batches=asked[0], batch_size=asked[1])
        assert (len(windows), len(windows.batches[0][0])) == got
        assert windows.windows == got[0] * got[1]
        assert windows.hash == sha256_of_ids(TOKENS[: 8 * windows.windows])
    (whole,) = validation_windows(tokens, block_size=T, batches=2, batch_size=200)
    assert whole[0].shape == (125, T)


def test_validation_refuses_what_can_not_be(tokens: TokenFile) -> None:
    with pytest.raises(ValueError, match=r"model\.block_size=1000"):
        validation_windows(tokens, block_size=1000, batch_size=1, batches=1)
    with pytest.raises(ValueError, match=r"eval\.batches=0"):
        validation_windows(tokens, block_size=T, batch_size=1, batches=0)
