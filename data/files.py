"""Your own text: .txt, .jsonl and .parquet files, one or a folder of them.

A .txt file is one document, read whole, and its last characters are held out; rows of .jsonl and
.parquet files stream, each a document, held out by the hash of its text. For corpora of many
gigabytes use rows: a .txt must fit in memory.

Where the hash leaves nothing for one of the two splits, because there are few rows, the last part
of each row is held out instead.

Nothing is passed over in silence. Files of a folder that have another suffix are named as left out,
and rows without text (null or empty) are counted.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.documents import Counted, Document, split_by_characters, split_by_hash

if TYPE_CHECKING:
    import pyarrow.parquet

log = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
PARQUET_ROWS = 1000  # rows decoded at a time
NAMED = 10  # files that a message names before it says how many more there are


class Text(Counted):
    """Local files: `path` is one .txt, .jsonl or .parquet file, or a folder that is searched for
    them, in sorted order.
    """

    def __init__(self, path: Path, val_fraction: float, text_column: str) -> None:
        self.path = path
        self.val_fraction = val_fraction
        self.text_column = text_column
        self.name = f"text-{path.stem}"
        self.held_out: tuple[str, ...] = (
            f"the last {val_fraction:g} of each .txt file; rows whose text's sha256 falls below "
            f"{val_fraction:g}",
        )
        self.files = local_files(path, TEXT_SUFFIXES)
        self._said = False
        self._cut_rows = False

    def cut_rows(self) -> None:
        """Hold out the last part of each row, as of a .txt file, instead of whole rows by their
        hash: for so few rows, or copies of one, that the hash leaves a split empty.
        """
        self._cut_rows = True
        self.held_out = (f"the last {self.val_fraction:g} of each file or row",)

    def identity(self) -> dict[str, Any]:
        return {
            "files": describe_files(self.path, self.files),
            "val_fraction": self.val_fraction,
            "column": self.text_column,
        }

    def _all(self) -> Iterator[Document]:
        said, self._said = self._said, True  # a character vocabulary takes a pass of its own
        if not said:
            name_left_out(self.path, self.files)
        for file in self.files:
            kind = file.suffix.lower()
            if kind == ".txt":
                try:
                    whole = file.read_bytes().decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"data.path: {file} is not UTF-8 text ({error})") from error
                yield from split_by_characters(whole, self.val_fraction, ends=True)
                continue
            rows = empty = 0
            for text in self._jsonl(file) if kind == ".jsonl" else self._parquet(file):
                rows += 1
                if not text:
                    empty += 1
                elif self._cut_rows:
                    yield from split_by_characters(text, self.val_fraction, ends=True)
                else:
                    yield Document(text, split_by_hash(text, self.val_fraction))
            if empty and not said:
                log.warning("%s: %d of %d rows hold no text and are left out", file, empty, rows)

    def _jsonl(self, file: Path) -> Iterator[str | None]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:  # not JSON, or not UTF-8
                    raise ValueError(
                        f"data.path: {file} line {number} is not JSON ({error})"
                    ) from error
                except RecursionError:
                    raise ValueError(
                        f"data.path: {file} line {number} is nested too deep to be read"
                    ) from None
                column = f"data.text_column={self.text_column!r}"
                if not isinstance(row, dict):
                    raise ValueError(f"{column}: {file} line {number} is no JSON object")
                if self.text_column not in row:
                    names = ", ".join(row) or "nothing"
                    raise ValueError(f"{column}: {file} line {number} has only {names}")
                text = row[self.text_column]
                if text is not None and not isinstance(text, str):
                    raise ValueError(
                        f"{column}: in {file} line {number} it holds {_json_kind(text)}, not text"
                    )
                yield text

    def _parquet(self, file: Path) -> Iterator[str | None]:
        with open_parquet(file, self.text_column) as table:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[self.text_column]):
                yield from batch.column(0).to_pylist()


def _json_kind(value: object) -> str:
    """What JSON calls a value that is not text."""
    kinds = {bool: "a boolean", list: "an array", dict: "an object"}
    return kinds.get(type(value), "a number")


def open_parquet(file: Path, text_column: str) -> "pyarrow.parquet.ParquetFile":
    """A Parquet file whose column `text_column` holds text.

    Raises ValueError naming data.path if it is no Parquet file, naming data.text_column if it has
    no such column or one of another type.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data.path: {file} is not a Parquet file ({error})") from error
    schema, column = table.schema_arrow, f"data.text_column={text_column!r}"
    said = None
    if text_column not in schema.names:
        said = f"{column}: {file} has only the columns {', '.join(schema.names)}"
    elif not _is_text(schema.field(text_column).type):
        said = f"{column}: in {file} it holds {schema.field(text_column).type}, not text"
    if said is not None:
        table.close()
        raise ValueError(said)
    return table


def _is_text(kind: Any) -> bool:
    """Whether an Arrow type is text, in any of its layouts: plain, large, view, or a dictionary of
    these (categories of pandas).
    """
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def local_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """`path` itself, or the files below it with one of the suffixes, capitals or not, sorted.

    Raises ValueError naming data.path if there is none.
    """
    if not path.exists():
        raise ValueError(f"data.path={str(path)!r}: no such file or folder")
    found = _below(path) if path.is_dir() else [path]
    files = [file for file in found if file.suffix.lower() in suffixes]
    if not files:
        raise ValueError(
            f"data.path={str(path)!r}: must be or hold files ending in {', '.join(suffixes)}"
        )
    return files


def name_left_out(path: Path, files: list[Path]) -> None:
    """Say which files of a folder are not read, if there are any."""
    if path.is_dir() and (others := sorted(set(_below(path)) - set(files))):
        names = [file.relative_to(path).as_posix() for file in others[:NAMED]]
        names += [f"{len(others) - NAMED} more"] if len(others) > NAMED else []
        kinds = ", ".join(sorted({file.suffix.lower() for file in files}))
        log.warning("%s: read are files ending in %s; left out: %s", path, kinds, ", ".join(names))


def _below(folder: Path) -> list[Path]:
    """All that is below a folder and no folder itself, sorted; links to folders are followed.

    Each folder is read once, under its own name if that lies below `folder` too. Raises OSError for
    a folder that can't be read.
    """
    found: list[Path] = []
    links, seen = [folder], set()
    while links:
        top = links.pop(0)
        for name, folders, files in os.walk(top, onerror=_raise):
            here = Path(name)
            if (real := here.resolve()) in seen:
                folders.clear()
                continue
            seen.add(real)
            links += sorted(here / inner for inner in folders if (here / inner).is_symlink())
            found += [here / file for file in files]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def describe_files(root: Path, files: list[Path]) -> list[list[Any]]:
    """[relative name, bytes, time of change] of each: enough to notice another corpus without
    reading gigabytes.
    """
    described = []
    for file in files:
        name = file.name if file == root else file.relative_to(root).as_posix()
        described.append([name, file.stat().st_size, file.stat().st_mtime_ns])
    return described
