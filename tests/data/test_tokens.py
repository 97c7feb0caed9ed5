"""Token files: what is written is read, nothing half-written appears, and damage of every kind is
found.
"""

import errno
import hashlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import TokenFile, tokens, write_tokens

IDS = np.arange(1000) * 37 % 500


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return write_tokens(tmp_path / "t.bin", [IDS[:1], IDS[1:400], [], IDS[400:].tolist()], 500)


def test_format_is_the_documented_one(file: TokenFile) -> None:
    raw = file.path.read_bytes()
    payload = struct.pack("<1000H", *IDS.tolist())
    assert (
        raw
        == b"BASISTOK"
        + struct.pack("<IIQ", 1, 500, 1000)
        + hashlib.sha256(payload).digest()
        + bytes(8)
        + payload
    )
    assert TokenFile.open(file.path) == file
    assert (file.count, file.vocab_size, file.sha256) == (
        1000,
        500,
        hashlib.sha256(payload).hexdigest(),
    )


@settings(max_examples=50, deadline=None)
@given(chunks=st.lists(st.lists(st.integers(0, 65535), max_size=30), max_size=5), data=st.data())
def test_every_slice_reads_back(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[list[int]], data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "slices.bin"
    flat = [token for chunk in chunks for token in chunk]
    file = write_tokens(path, chunks, 65536)
    start = data.draw(st.integers(0, len(flat)))
    length = data.draw(st.integers(0, len(flat) - start))
    read = file.read(start, length)
    assert read.dtype == np.int64
    assert read.tolist() == flat[start : start + length]
    assert np.concatenate([np.empty(0, np.uint16), *file.chunks(size=7)]).tolist() == flat
    file.verify()


def test_windows_and_bounds(file: TokenFile) -> None:
    assert np.array_equal(
        file.read_windows([990, 0, 5], 10), np.stack([IDS[990:], IDS[:10], IDS[5:15]])
    )
    for start, length in ((-1, 2), (999, 2), (1001, 0)):
        with pytest.raises(IndexError, match="of 1000"):
            file.read(start, length)
    assert pickle.loads(pickle.dumps(file)).read(3, 4).tolist() == IDS[3:7].tolist()


@pytest.mark.parametrize(
    ("chunk", "vocab_size", "message"),
    [
        ([1, 500], 500, r"token id 500 is outside the vocabulary \[0, 500\)"),
        ([-1], 500, "token id -1"),
        ([0.5], 500, "must be integers"),
        ([1], 2**31 + 1, "between 1 and 2147483648"),
        ([], 0, "between 1 and 2147483648"),
    ],
)
def test_refused_ids_leave_no_file(
    tmp_path: Path, chunk: list[float], vocab_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_tokens(tmp_path / "t.bin", [[3, 4], chunk], vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_leaves_the_old_file(file: TokenFile) -> None:
    def broken():
        yield [1, 2, 3]
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="on fire"):
        write_tokens(file.path, broken(), 500)
    TokenFile.open(file.path).verify()
    assert [path.name for path in file.path.parent.iterdir()] == ["t.bin"]


def flip(path: Path, byte: int) -> None:
    """Flip the lowest bit of a byte in place."""
    with path.open("r+b") as raw:
        raw.seek(byte)
        old = raw.read(1)[0]
        raw.seek(byte)
        raw.write(bytes([old ^ 1]))


def test_a_flipped_bit_is_found_on_opening(file: TokenFile) -> None:
    file.verify()
    flip(file.path, 64 + 777)
    for check in (lambda: TokenFile.open(file.path), file.verify):
        with pytest.raises(ValueError, match=r"t\.bin: its tokens have sha256 .* damaged: delete"):
            check()


def test_a_vocabulary_that_the_ids_exceed_is_found_on_opening(file: TokenFile) -> None:
    flip(file.path, 13)  # 500 - 256
    with pytest.raises(ValueError, match="holds the id 499, its header says a vocabulary of 244"):
        TokenFile.open(file.path)


@pytest.mark.parametrize("writable", [True, False])
def test_the_payload_is_read_once_until_the_file_changes(
    file: TokenFile, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    read = []
    real = TokenFile.verify
    monkeypatch.setattr(TokenFile, "verify", lambda self: read.append(self.path) or real(self))
    monkeypatch.setattr(tokens, "SETTLED_NS", 0)
    if not writable:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(tokens, "write_atomic", full)
    for _ in range(3):
        assert TokenFile.open(file.path) == file
    assert len(read) == 1
    monkeypatch.setattr(tokens, "_verified", {})  # as in another process
    TokenFile.open(file.path)
    assert len(read) == (1 if writable else 2)
    content = file.path.read_bytes()
    file.path.unlink()
    file.path.write_bytes(content)  # a copy, with a time of its own
    times = file.path.stat()
    os.utime(file.path, ns=(times.st_atime_ns, times.st_mtime_ns - 1))
    before = len(read)
    TokenFile.open(file.path)
    assert len(read) == before + 1
    mtime = file.path.stat().st_mtime_ns
    flip(file.path, 100)
    os.utime(file.path, ns=(mtime, mtime))  # size, inode and this time as before
    with pytest.raises(ValueError, match="damaged"):
        TokenFile.open(file.path)


def test_a_note_that_is_damaged_or_of_another_file_is_not_believed(
    file: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "SETTLED_NS", 0)
    TokenFile.open(file.path)
    monkeypatch.setattr(tokens, "_verified", {})
    note = file.path.with_name("t.bin.verified")
    sound = note.read_text()
    flip(file.path, 100)
    for content in (sound, "", sound[:-1], "[]", "{}", "\xff"):
        note.write_text(content)
        with pytest.raises(ValueError, match="damaged"):
            TokenFile.open(file.path)


def test_a_file_changed_just_now_is_not_remembered(file: TokenFile) -> None:
    """Two changes within one tick of the file system's clock leave one time."""
    TokenFile.open(file.path)
    assert [path.name for path in file.path.parent.iterdir()] == ["t.bin"]
    assert str(file.path) not in tokens._verified


def test_a_long_reading_is_announced(
    file: TokenFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokens, "LONG_BYTES", 1000)
    with caplog.at_level("INFO", "data"):
        TokenFile.open(file.path)
    assert f"{file.path}: reading 0.0 GB once" in caplog.text


@pytest.mark.parametrize("size", [0, 10, 63, 64, 65, 2062, 2063, 2065])
def test_wrong_size_is_refused_on_opening(file: TokenFile, size: int) -> None:
    os.truncate(file.path, size)
    with pytest.raises(
        ValueError, match="not a token file" if size < 64 else "cut short or appended"
    ):
        TokenFile.open(file.path)


def test_foreign_file_and_other_version_are_refused(file: TokenFile) -> None:
    raw = bytearray(file.path.read_bytes())
    raw[8] = 2
    file.path.write_bytes(raw)
    with pytest.raises(ValueError, match="version 2"):
        TokenFile.open(file.path)
    raw[0] ^= 1
    file.path.write_bytes(raw)
    with pytest.raises(ValueError, match="not a token file"):
        TokenFile.open(file.path)


def test_vocabulary_must_fit_the_model(file: TokenFile) -> None:
    file.check_vocabulary(500)
    file.check_vocabulary(512)  # padded
    with pytest.raises(ValueError, match=r"model\.vocab_size=499: must be at least 500"):
        file.check_vocabulary(499)


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    ids = [0, 65_535, 65_536, 128_255]
    written = write_tokens(tmp_path / "t.bin", [ids[:2], ids[2:]], 128_256)
    raw = written.path.read_bytes()
    assert raw[8:12] == (2).to_bytes(4, "little")
    assert raw[64:] == b"".join(i.to_bytes(4, "little") for i in ids)
    found = TokenFile.open(written.path)
    found.verify()
    assert found.read(1, 3).tolist() == ids[1:]
    assert [i for chunk in found.chunks(3) for i in chunk.tolist()] == ids
    # A header whose version and vocabulary do not go together is damage.
    written.path.write_bytes(raw[:8] + (1).to_bytes(4, "little") + raw[12:])
    with pytest.raises(ValueError, match="do not go together"):
        TokenFile.open(written.path)
