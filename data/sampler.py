"""Which tokens a step trains on, as a pure function of (seed, step, micro-batch, rank).

There is no iterator and no state: `batch(step)` computes its offsets from the numbers in its key
and reads them from the token file. So a resumed run needs one integer to see exactly the batches it
would have seen, two runs that differ in their method see the same text, and evaluating in between
disturbs nothing.

Number the samples of a step 0 .. S - 1, S = micro_batches * world_size * batch_size, sample (micro,
rank, row) being `(micro * world_size + rank) * batch_size + row`. The text of sample s at a step
depends on s alone, so the same S samples make up the step whether one process accumulates four
micro-batches or four ranks take one each.

- `paper`: consecutive, non-overlapping windows of T + 1 tokens read in order, as the code published
  with BASIS does. Sample s of step t is window `(t * S + s) mod W` of the file's W = count // (T +
  1) whole windows; the last, incomplete window is never read. The seed plays no part.
- `random`: nanoGPT's order, every window starting at a uniformly random token. The offsets are the
  raw 64-bit output of a counter-based generator (Philox, keyed by seed and step) modulo the number
  of possible starts; numpy guarantees that raw stream for all its versions, as it does not for
  `Generator.integers`. The modulo's bias is below count / 2^64.

A batch of one window costs about 50 microseconds, which a training step does not notice.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.tokens import TokenFile, dtype_for

ORDERS = ("paper", "random")
KEY_HALF = 1 << 64  # Philox takes a 128-bit key: the seed in the high half, the step in the low one


class Sampler:
    """Training batches of `batch_size` windows from one token file.

    order: "paper" or "random" (see the module). micro_batches, world_size: how many batches of this
    size make one step over all ranks; `rank` is this process's place among them. Raises ValueError
    (naming `data.order`, `model.block_size` ...) for values that cannot be served.
    """

    def __init__(
        self,
        tokens: TokenFile,
        *,
        block_size: int,
        batch_size: int,
        order: str,
        seed: int,
        micro_batches: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"data.order={order!r}: must be one of {', '.join(ORDERS)}")
        for name, value in (
            ("batch_size", batch_size),
            ("micro_batches", micro_batches),
            ("world_size", world_size),
        ):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: must be in [0, world_size={world_size})")
        _check_block_size(tokens, block_size)
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.order = order
        self.seed = seed
        self.micro_batches = micro_batches
        self.rank = rank
        self.world_size = world_size

    @property
    def samples_per_step(self) -> int:
        """Windows that one step reads over all micro-batches and ranks."""
        return self.micro_batches * self.world_size * self.batch_size

    def batch(self, step: int, micro_batch: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one micro-batch: two int64 CPU tensors (batch_size, block_size),
        targets one token later.

        A pure function of (seed, step, micro_batch, rank); `paper` order ignores the seed.
        """
        return _split(self.windows(step, micro_batch))

    def windows(self, step: int, micro_batch: int = 0) -> npt.NDArray[np.int64]:
        """The text of `batch`: int64 (batch_size, block_size + 1)."""
        if step < 0 or not 0 <= micro_batch < self.micro_batches:
            raise IndexError(f"step {step}, micro-batch {micro_batch} of {self.micro_batches}")
        return self.tokens.read_windows(self.starts(step, micro_batch), self.block_size + 1)

    def starts(self, step: int, micro_batch: int = 0) -> list[int]:
        """Where in the file the windows of `batch` start: batch_size token indices."""
        first = (micro_batch * self.world_size + self.rank) * self.batch_size
        if self.order == "paper":
            length = self.block_size + 1
            windows = self.tokens.count // length
            base = step * self.samples_per_step + first
            return [(base + row) % windows * length for row in range(self.batch_size)]
        raw = np.random.Philox(key=self.seed % KEY_HALF * KEY_HALF + step).random_raw(
            self.samples_per_step
        )
        possible = np.uint64(self.tokens.count - self.block_size)
        chosen: list[int] = (raw[first : first + self.batch_size] % possible).tolist()
        return chosen


@dataclass(frozen=True)
class ValidationWindows:
    """The fixed text of every evaluation: `batches` of (inputs, targets), each int64 (batch_size,
    block_size).

    hash: sha256 (hex) of the tokens used, as stored in the file. Equal hashes mean comparable
    losses.
    """

    batches: tuple[tuple[Tensor, Tensor], ...]
    hash: str

    @property
    def windows(self) -> int:
        """Windows in all batches together."""
        return sum(len(inputs) for inputs, _ in self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def validation_windows(
    tokens: TokenFile, *, block_size: int, batch_size: int, batches: int
) -> ValidationWindows:
    """The first batches * batch_size windows of block_size + 1 tokens, consecutive and without
    overlap, or as many whole batches of them as the file holds.

    If it holds less than one batch, all its windows are one batch. They are kept in memory (8 bytes
    a token, twice), so that an evaluation reads no file. Raises ValueError if the file is shorter
    than a window.
    """
    _check_block_size(tokens, block_size)
    if batches < 1 or batch_size < 1:
        raise ValueError(
            f"eval.batches={batches}, batch size {batch_size}: both must be at least 1"
        )
    length = block_size + 1
    available = tokens.count // length
    batch_size = min(batch_size, available)
    batches = min(batches, available // batch_size)
    needed = batches * batch_size
    flat = tokens.read(0, needed * length)
    windows = flat.reshape(batches, batch_size, length)
    digest = hashlib.sha256(flat.astype(dtype_for(tokens.vocab_size)).tobytes()).hexdigest()
    return ValidationWindows(tuple(_split(window) for window in windows), digest)


def _split(windows: np.ndarray) -> tuple[Tensor, Tensor]:
    """(B, T + 1) tokens -> inputs (B, T) and targets (B, T)."""
    both = torch.from_numpy(windows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _check_block_size(tokens: TokenFile, block_size: int) -> None:
    if block_size < 1:
        raise ValueError(f"model.block_size={block_size}: must be at least 1")
    if tokens.count < block_size + 1:
        raise ValueError(
            f"model.block_size={block_size}: one window needs {block_size + 1} tokens and "
            f"{tokens.path} holds {tokens.count:,}"
        )
