"""Your own text: .txt, .jsonl and .parquet files, one or a folder of them.

A .txt file is one document, read whole, and its last characters are held out; rows of .jsonl and
.parquet files stream, each a document, held out by the hash of its text. For corpora of many
gigabytes use rows: a .txt must fit in memory.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.documents import Counted, Document, split_by_characters, split_by_hash

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
PARQUET_ROWS = 1000  # rows decoded at a time


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

    def identity(self) -> dict[str, Any]:
        return {
            "files": describe_files(self.path, self.files),
            "val_fraction": self.val_fraction,
            "column": self.text_column,
        }

    def _all(self) -> Iterator[Document]:
        for file in self.files:
            if file.suffix == ".txt":
                try:
                    text = file.read_bytes().decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"data.path: {file} is not UTF-8 text ({error})") from error
                yield from split_by_characters(text, self.val_fraction, ends=True)
            else:
                rows = self._jsonl(file) if file.suffix == ".jsonl" else self._parquet(file)
                for text in rows:
                    if text:
                        yield Document(text, split_by_hash(text, self.val_fraction))

    def _jsonl(self, file: Path) -> Iterator[str]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:  # not JSON, or not UTF-8
                        raise ValueError(
                            f"data.path: {file} line {number} is not JSON ({error})"
                        ) from error
                    if not isinstance(row, dict) or not isinstance(row.get(self.text_column), str):
                        raise ValueError(
                            f"data.text_column={self.text_column!r}: {file} line {number} has no "
                            "string of that name"
                            + (
                                f", only {', '.join(row)}"
                                if isinstance(row, dict) and self.text_column not in row
                                else ""
                            )
                        )
                    yield row[self.text_column]

    def _parquet(self, file: Path) -> Iterator[str]:
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"data.path: {file} is not a Parquet file ({error})") from error
        with table:
            if self.text_column not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise ValueError(
                    f"data.text_column={self.text_column!r}: {file} has only the columns {names}"
                )
            kind = table.schema_arrow.field(self.text_column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise ValueError(
                    f"data.text_column={self.text_column!r}: in {file} it holds {kind}, not text"
                )
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[self.text_column]):
                yield from batch.column(0).to_pylist()


def local_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """`path` itself, or the files below it with one of the suffixes, sorted. Raises ValueError if
    there is none.
    """
    if not path.exists():
        raise ValueError(f"data.path={str(path)!r}: no such file or folder")
    files = (
        sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
        if path.is_dir()
        else [path]
    )
    if not files or files[0].suffix not in suffixes:
        raise ValueError(
            f"data.path={str(path)!r}: must be or hold files ending in {', '.join(suffixes)}"
        )
    return files


def describe_files(root: Path, files: list[Path]) -> list[list[Any]]:
    """[relative name, bytes, time of change] of each: enough to notice another corpus without
    reading gigabytes.
    """
    described = []
    for file in files:
        name = file.name if file == root else file.relative_to(root).as_posix()
        described.append([name, file.stat().st_size, file.stat().st_mtime_ns])
    return described
