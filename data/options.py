"""What a reader can choose about the data: one plain dataclass, checked where it is declared.

The same class is the schema of `conf/data/*.yaml` (as an OmegaConf structured config, hence plain
types only) and the argument of `data.prepare.prepare`. Checks that need no file run on construction
and name the dotted option; whether a path exists is `prepare`'s business.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.sampler import ORDERS
from data.tokenizers import TOKENIZERS

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("shakespeare", "tinyshakespeare", "hub", "text")
COMMIT = re.compile(r"[0-9a-f]{40}")


def with_tokenizer(data: dict[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The options `data`, with the model's own folder for a tokenizer that none was given for."""
    if data.get("tokenizer") == "hf" and data.get("tokenizer_path") is None:
        return data | {"tokenizer_path": model.get("path")}
    return data


@dataclass(frozen=True)
class DataOptions:
    """The group `data`. Raises ValueError on a value that no preparation could use.

    source: shakespeare, tinyshakespeare, hub (a dataset of the Hugging Face hub), or text (local
    files). path: local files instead of the network (source=text: required). tokenizer: gpt2, char
    or hf; tokenizer_path: of hf the folder with its tokenizer.json. order: in which training reads
    the tokens, paper or random (see data/sampler.py).
    max_tokens: stop after that many training tokens; None means all. val_fraction: share held out
    for validation; None where whole works are (shakespeare). cache_dir: where downloads and token
    files live; a relative one is below the repository's root. repo, subset, revision, split: which
    dataset of the hub, at which commit. text_column: its column (and that of local .jsonl and
    .parquet files) with the text.
    """

    source: str = "shakespeare"
    path: str | None = None
    tokenizer: str = "gpt2"
    order: str = "paper"
    max_tokens: int | None = None
    val_fraction: float | None = None
    cache_dir: str = ".cache"
    repo: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    text_column: str = "text"
    tokenizer_path: str | None = None

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("source", self.source, SOURCES),
            ("tokenizer", self.tokenizer, TOKENIZERS),
            ("order", self.order, ORDERS),
        ):
            if value not in allowed:
                raise ValueError(f"data.{option}={value!r}: must be one of {', '.join(allowed)}")
        if (self.tokenizer_path is None) == (self.tokenizer == "hf"):
            raise ValueError(
                f"data.tokenizer_path={self.tokenizer_path}: is of data.tokenizer='hf', which "
                "needs it: a folder with a tokenizer.json (null: that of model.path)"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(
                f"data.max_tokens={self.max_tokens}: must be at least 1, or null for all"
            )
        self._check_val_fraction()
        self._check_source()

    def _check_val_fraction(self) -> None:
        if self.source == "shakespeare":
            if self.val_fraction is not None:
                raise ValueError(
                    f"data.val_fraction={self.val_fraction}: must be null for "
                    "data.source='shakespeare', which holds out whole works"
                )
        elif self.val_fraction is None or not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"data.val_fraction={self.val_fraction}: must be between 0 and 1")

    def _check_source(self) -> None:
        if self.source == "text" and not self.path:
            raise ValueError(
                "data.path=null: data.source='text' needs data.path, a .txt, .jsonl or .parquet "
                "file or a folder of them"
            )
        if self.source != "hub":
            for option, value in (
                ("repo", self.repo),
                ("subset", self.subset),
                ("revision", self.revision),
            ):
                if value is not None:
                    raise ValueError(
                        f"data.{option}={value!r}: must be null unless data.source='hub', not "
                        f"{self.source!r}"
                    )
            return
        if not self.repo:
            raise ValueError("data.repo=null: data.source='hub' needs a dataset's id, owner/name")
        if self.revision is None or not COMMIT.fullmatch(self.revision):
            raise ValueError(
                f"data.revision={self.revision!r}: must be a commit of {self.repo} (40 hex "
                "digits), as a branch can change between two runs"
            )
        if self.tokenizer == "char":
            raise ValueError(
                "data.tokenizer='char': must be gpt2 for data.source='hub', as a character "
                "vocabulary would need a first pass over the whole dataset"
            )

    def cache_path(self) -> Path:
        """`cache_dir` as an absolute path; a relative one counts from the repository's root,
        wherever the process runs.
        """
        return REPOSITORY / Path(self.cache_dir).expanduser()
