"""Datasets of the Hugging Face hub (OpenWebText, FineWeb-Edu), streamed at a pinned commit.

Nobody should have to fetch 54 GB to train on 10 million tokens, so documents stream, in the order
of the dataset's Parquet files, and reading stops at `data.max_tokens`. `data.path` takes a folder
of the same Parquet files through the same code. The commit is pinned in `conf/data/*.yaml`: a
branch name would let the text change under a published result, and the scripts that these datasets
once needed are gone from `datasets` (no `trust_remote_code` here or anywhere).

Interrupted, the stream goes on where it stood: `datasets` can say which file and row it has reached
and return there without reading the files before it. Validation documents are chosen by the hash of
their text (`sources.split_by_hash`).
"""

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.documents import Document, Position, split_by_hash
from data.files import describe_files, local_files, name_left_out, open_parquet
from data.options import DataOptions

if TYPE_CHECKING:
    from datasets import IterableDataset


class Hub:
    """One split of one dataset of the hub, or a local folder of its Parquet files."""

    def __init__(self, options: DataOptions, path: Path | None, val_fraction: float) -> None:
        assert options.repo is not None  # DataOptions demands it
        self.options = options
        self.path = path
        self.files = [] if path is None else local_files(path, (".parquet",))
        self.val_fraction = val_fraction
        self.name = "-".join(part for part in (options.repo.split("/")[-1], options.subset) if part)
        self.held_out: tuple[str, ...] = (
            f"documents whose text's sha256 falls below {val_fraction:g}",
        )
        self._dataset: IterableDataset | None = None

    def identity(self) -> dict[str, Any]:
        options = self.options
        common = {"val_fraction": self.val_fraction, "column": options.text_column}
        if self.path is not None:
            return {"files": describe_files(self.path, self.files), **common}
        return {
            "repo": options.repo,
            "subset": options.subset,
            "revision": options.revision,
            "split": options.split,
            **common,
        }

    def documents(self, position: Position | None = None) -> Generator[Document, None, None]:
        """See `Source`. Close the generator when stopping early: Arrow's threads must not outlive
        it.

        Raises ConnectionError if the hub can't be reached, ValueError if the text column does not
        exist or holds no text.
        """
        if self.path is not None and position is None:
            name_left_out(self.path, self.files)
        for file in self.files:
            open_parquet(file, self.options.text_column).close()
        dataset = self._dataset = self._load()
        if position is not None:
            dataset.load_state_dict(position)
        column = self.options.text_column
        rows = iter(dataset)
        try:
            for row in rows:
                if column not in row:
                    raise ValueError(
                        f"data.text_column={column!r}: the columns of {self.name} are "
                        f"{', '.join(row)}"
                    )
                text = row[column]
                if text is not None and not isinstance(text, str):
                    raise ValueError(
                        f"data.text_column={column!r}: in {self.name} it holds "
                        f"{type(text).__name__}, not text"
                    )
                if text:
                    yield Document(text, split_by_hash(text, self.val_fraction))
        finally:
            # A half-read Parquet stream that is left to the interpreter's end aborts the process
            # (apache/arrow#45214).
            rows.close()

    def position(self) -> Position:
        assert self._dataset is not None, "no document has been asked for"
        state: Position = self._dataset.state_dict()
        return state

    def _load(self) -> "IterableDataset":
        from datasets import load_dataset

        if self.path is not None:
            names = [str(file) for file in self.files]
            return load_dataset("parquet", data_files=names, split="train", streaming=True)
        options = self.options
        try:
            return load_dataset(
                options.repo,
                options.subset,
                split=options.split,
                streaming=True,
                revision=options.revision,
            )
        except ConnectionError as error:
            raise ConnectionError(
                f"data.repo={options.repo!r} at revision {options.revision} could not be reached "
                f"({error}). data.path= takes a local folder with its Parquet files instead"
            ) from error
