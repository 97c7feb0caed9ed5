"""Token files: one header, then the token ids as 16-bit integers, or 32-bit ones where the
vocabulary needs them.

A headerless array of uint16 is the field's habit and the source of two of its classic accidents: a
file cut short by a full disk trains without complaint, and a file made with a larger vocabulary
than the model's dies as a CUDA device-side assert. 64 bytes of header prevent both:

    offset  bytes  field
    0       8      magic b"BASISTOK"
    8       4      format version: 1, or 2 for ids of 32 bits
    12      4      vocabulary size: every id in the file is smaller
    16      8      number of tokens
    24      32     sha256 of the payload
    56      8      zero
    64      2 n    the ids, uint16; 4 n, uint32, for a vocabulary above 65,536 (Llama 3, Qwen)

all little-endian. Opening compares magic, version and count with the file's size, and then the
payload with its sha256, so that nothing is trained on a flipped bit. That reads everything, at
about 1 GB/s, and so it is done once: the file's size, times and inode are noted in a neighbour,
`<name>.verified`, and while they are the same the next opening costs 64 bytes and one `stat`. Where
the folder can't be written, this process alone remembers. (What rots on the disk without a change
of these is found by `verify`, which always reads; `python -m data.prepare` calls it.)

Reads seek and fill an array from a file opened for the call: some 20 microseconds, nothing kept
open (so safe across `fork`), and no memory map whose resident pages grow until they look like a
leak.
"""

import contextlib
import hashlib
import json
import logging
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.storage import replacing, write_atomic

log = logging.getLogger(__name__)

MAGIC = b"BASISTOK"
HEADER = struct.Struct("<8sIIQ32s8x")
DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<u2"), 2: np.dtype("<u4")}
"""By format version."""
LARGEST_VOCABULARY = 1 << 31
Ids = npt.NDArray[np.unsignedinteger[Any]]
CHUNK_TOKENS = 1 << 22  # 8 MiB at a time when a whole file is read
LONG_BYTES = 1 << 30  # a reading that takes longer than a second is announced
NOTE_SUFFIX = ".verified"
SETTLED_NS = 2_000_000_000  # a file changed just now may change again without a new time
_verified: dict[str, list[int | str]] = {}  # path -> what `_fingerprint` said when it was sound


def version_for(vocab_size: int) -> int:
    """The format version of files with ids below `vocab_size`."""
    return 1 if vocab_size <= 1 << 16 else 2


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """How ids below `vocab_size` are stored."""
    return DTYPES[version_for(vocab_size)]


@dataclass(frozen=True)
class TokenFile:
    """A token file that was found intact on opening. Holds no file handle: cheap to copy, pickle
    and fork.

    count: tokens in the file. vocab_size: every id is below it. sha256: of the payload, as the
    header states it (hex).
    """

    path: Path
    count: int
    vocab_size: int
    sha256: str

    @classmethod
    def open(cls, path: str | Path) -> "TokenFile":
        """Read the header, compare it with the file's size and, unless the file is known as it
        is (see the module), with its payload.

        Raises ValueError if the file is not a token file, has another version, is shorter or longer
        than it says, or was damaged; FileNotFoundError if it does not exist.
        """
        path = Path(path)
        with path.open("rb") as file:
            raw = file.read(HEADER.size)
        if len(raw) < HEADER.size or raw[: len(MAGIC)] != MAGIC:
            raise ValueError(
                f"{path}: not a token file (it does not begin with {MAGIC!r} and a header)"
            )
        _, version, vocab_size, count, digest = HEADER.unpack(raw)
        if version not in DTYPES:
            known = " and ".join(map(str, DTYPES))
            raise ValueError(
                f"{path}: token file version {version}, this program reads version {known}: "
                "prepare it again"
            )
        if version != version_for(vocab_size):
            raise ValueError(
                f"{path}: its header says version {version} and a vocabulary of {vocab_size}, "
                "which do not go together; the file is damaged: delete it and prepare it again"
            )
        expected, size = HEADER.size + count * DTYPES[version].itemsize, path.stat().st_size
        if size != expected:
            raise ValueError(
                f"{path}: {size:,} bytes where its header promises {count:,} tokens = {expected:,} "
                "bytes; it was cut short or appended to: delete it and prepare it again"
            )
        tokens = cls(path, count, vocab_size, digest.hex())
        fingerprint = tokens._fingerprint()
        if fingerprint not in (_verified.get(str(path.absolute())), tokens._noted()):
            if size >= LONG_BYTES:
                log.info("%s: reading %.1f GB once, to compare their sha256", path, size / 1e9)
            settled = time.time_ns() - path.stat().st_ctime_ns >= SETTLED_NS
            tokens.verify()
            if settled and tokens._fingerprint() == fingerprint:
                tokens._remember(fingerprint)
        return tokens

    def verify(self) -> None:
        """Read the whole payload and compare its sha256 with the header's, and its ids with the
        vocabulary. Raises ValueError if one bit differs.
        """
        digest, largest = hashlib.sha256(), 0
        for chunk in self.chunks():
            digest.update(chunk.data)
            largest = max(largest, int(chunk.max()))
        if digest.hexdigest() != self.sha256:
            raise ValueError(
                f"{self.path}: its tokens have sha256 {digest.hexdigest()}, its header says "
                f"{self.sha256}; the file is damaged: delete it and prepare it again"
            )
        if largest >= self.vocab_size:
            raise ValueError(
                f"{self.path}: it holds the id {largest}, its header says a vocabulary of "
                f"{self.vocab_size}; the file is damaged: delete it and prepare it again"
            )

    def _fingerprint(self) -> list[int | str]:
        """What changes when the file is written, replaced or copied, and what its header says."""
        found = self.path.stat()
        times = (found.st_mtime_ns, found.st_ctime_ns)
        return [found.st_size, found.st_ino, *times, self.vocab_size, self.sha256]

    def _note(self) -> Path:
        return self.path.with_name(f"{self.path.name}{NOTE_SUFFIX}")

    def _noted(self) -> object:
        """The fingerprint in the file's note; None if there is none that can be read."""
        try:
            noted: object = json.loads(self._note().read_bytes())
        except (OSError, ValueError):
            return None
        return noted

    def _remember(self, fingerprint: list[int | str]) -> None:
        """Note that the file was sound."""
        _verified[str(self.path.absolute())] = fingerprint
        with contextlib.suppress(OSError):  # a folder closed to us, a full disk: read it again then
            write_atomic(self._note(), json.dumps(fingerprint))

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Raise ValueError if the file may hold an id that a model with `model_vocab_size`
        embeddings lacks.
        """
        if model_vocab_size < self.vocab_size:
            raise ValueError(
                f"model.vocab_size={model_vocab_size}: must be at least {self.vocab_size}, the "
                f"vocabulary of {self.path}"
            )

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Tokens [start, start + length) as int64 (length,). Raises IndexError outside the file."""
        return self.read_windows((start,), length)[0]

    def read_windows(self, starts: Sequence[int], length: int) -> npt.NDArray[np.int64]:
        """One row of `length` tokens from each start, as int64 (len(starts), length), opening the
        file once.

        Raises IndexError if a row reaches outside [0, count].
        """
        dtype = dtype_for(self.vocab_size)
        out = np.empty((len(starts), length), dtype=dtype)
        with self.path.open("rb", buffering=0) as file:
            for row, start in enumerate(starts):
                if start < 0 or start + length > self.count:
                    raise IndexError(
                        f"{self.path}: tokens [{start}, {start + length}) of {self.count}"
                    )
                file.seek(HEADER.size + start * dtype.itemsize)
                if file.readinto(out[row]) != length * dtype.itemsize:
                    raise OSError(f"{self.path}: could not read tokens [{start}, {start + length})")
        return out.astype(np.int64)

    def chunks(self, size: int = CHUNK_TOKENS) -> Iterator[Ids]:
        """The whole file in order, as arrays of at most `size` tokens, uint16 or uint32."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(HEADER.size)
            for start in range(0, self.count, size):
                yield np.fromfile(file, dtype_for(self.vocab_size), min(size, self.count - start))


def write_tokens(path: str | Path, chunks: Iterable[npt.ArrayLike], vocab_size: int) -> TokenFile:
    """Write a token file from integer chunks, streaming; the file appears under `path` complete or
    not at all.

    The chunks go to a temporary neighbour, which is synced to the disk and then renamed
    (`os.replace`), so neither a kill nor a full disk leaves a half-written file under the real
    name. Returns the file opened. Raises ValueError if an id lies outside [0, vocab_size), and
    for a vocabulary above 2^31.
    """
    path = Path(path)
    if not 0 < vocab_size <= LARGEST_VOCABULARY:
        raise ValueError(f"vocab_size={vocab_size}: must be between 1 and {LARGEST_VOCABULARY}")
    count, digest = 0, hashlib.sha256()
    with replacing(path) as file:
        file.write(bytes(HEADER.size))  # the count and the hash are known only at the end
        for chunk in chunks:
            payload = _as_payload(chunk, vocab_size)
            file.write(payload)
            digest.update(payload)
            count += len(payload) // dtype_for(vocab_size).itemsize
        file.seek(0)
        file.write(HEADER.pack(MAGIC, version_for(vocab_size), vocab_size, count, digest.digest()))
    return TokenFile(path, count, vocab_size, digest.hexdigest())


def _as_payload(chunk: npt.ArrayLike, vocab_size: int) -> bytes:
    ids = np.asarray(chunk).reshape(-1)
    if ids.size == 0:
        return b""
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids must be integers, not {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the vocabulary [0, {vocab_size})"
        )
    return ids.astype(dtype_for(vocab_size)).tobytes()
