"""Prepared data: a folder with train.bin, val.bin and a metadata.json that says what they are, made
once and found again.

    <data.cache_dir>/tokens/<source>-<tokenizer>-<hash>/

The hash covers what decides the tokens (source, its revision or files, the split, the tokenizer,
`data.max_tokens`) and nothing else, so a change of order or of cache folder reuses them.
`metadata.json` is written last: a folder that has one is complete and is opened at once, without a
tokenizer, a network or the original text; one without is continued. One process at a time works on
a folder, the others wait for it.

On the command line, ahead of training (train.py does the same on first use):

    python -m data.prepare data=openwebtext data.max_tokens=1000000
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.documents import Source
from data.fetch import locked, write_bytes
from data.options import DataOptions
from data.shards import SPLITS, join, remove, tokenize
from data.sources import make_source
from data.tokenizers import CharTokenizer, Tokenizer, load_tokenizer
from data.tokens import TokenFile

FORMAT = 1  # raise it when the same options would give other tokens
METADATA = "metadata.json"


@dataclass(frozen=True)
class Prepared:
    """A complete folder. metadata: source, tokenizer, vocabulary size, counts, hashes and held-out
    works.
    """

    folder: Path
    train: TokenFile
    val: TokenFile
    metadata: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Prepared":
        """Open a complete folder and compare its files with its metadata (cheaply;
        `TokenFile.verify` reads everything).

        Raises ValueError if a file is missing, cut short or not the one that the metadata
        describes.
        """
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        files = {}
        for split in SPLITS:
            path = folder / f"{split}.bin"
            if not path.exists():
                raise ValueError(f"{path} is missing: delete {folder} and prepare it again")
            files[split] = TokenFile.open(path)
            if files[split].sha256 != metadata[split]["sha256"]:
                raise ValueError(
                    f"{path} is not the file that {METADATA} describes: delete {folder} and prepare "
                    "it again"
                )
        return cls(folder, files["train"], files["val"], metadata)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded when first asked for: training and evaluating need none."""
        return load_tokenizer(
            self.metadata["tokenizer"], self.folder.parents[1], folder=self.folder
        )


def prepare(options: DataOptions, *, progress: bool = True) -> Prepared:
    """Open the prepared folder of these options, making it first if it is not there (see the
    module).

    progress: show a bar on stderr. Raises ValueError for options that can't be served (before
    anything is written, as far as they can be checked without reading the text) and ConnectionError
    if something could not be fetched.
    """
    source = make_source(options)
    folder = prepared_folder(options, source)
    if not (folder / METADATA).exists():
        with locked(folder):
            if not (folder / METADATA).exists():
                _build(options, source, folder, progress)
    return Prepared.open(folder)


def prepared_folder(options: DataOptions, source: Source) -> Path:
    """Where these options' tokens live."""
    identity = {
        "format": FORMAT,
        "source": options.source,
        **source.identity(),
        "tokenizer": options.tokenizer,
        "max_tokens": options.max_tokens,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return options.cache_path() / "tokens" / f"{source.name}-{options.tokenizer}-{digest[:12]}"


def _build(options: DataOptions, source: Source, folder: Path, progress: bool) -> None:
    for leftover in folder.glob("*.tmp"):  # of a process that was killed; nobody else is here now
        leftover.unlink()
    tokenizer = _tokenizer(options, source, folder)
    shards = folder / "shards"
    manifest = tokenize(source, tokenizer, shards, max_tokens=options.max_tokens, progress=progress)
    for split, advice in (("train", "lower it"), ("val", "raise it or data.max_tokens")):
        if sum(manifest.tokens.values()) == 0:
            remove(shards)
            raise ValueError(f"data.path={options.path!r}: holds no text")
        if manifest.tokens[split] == 0:
            remove(shards)
            raise ValueError(
                f"data.val_fraction={options.val_fraction}: no token for {split}; {advice}"
            )
    files = join(manifest, shards, folder, tokenizer.vocab_size)
    metadata = {
        "format": FORMAT,
        "source": options.source,
        "identity": source.identity(),
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "max_tokens": options.max_tokens,
        "held_out": list(source.held_out),
    }
    for split in SPLITS:
        metadata[split] = {
            "tokens": files[split].count,
            "documents": manifest.documents[split],
            "sha256": files[split].sha256,
        }
    write_bytes(folder / METADATA, json.dumps(metadata, indent=2).encode())
    remove(shards)


def _tokenizer(options: DataOptions, source: Source, folder: Path) -> Tokenizer:
    """The tokenizer to encode with; a character vocabulary is collected from the corpus and saved
    into the folder.
    """
    if options.tokenizer != "char":
        return load_tokenizer(options.tokenizer, options.cache_path())
    characters = {CharTokenizer.separator}
    for document in source.documents():
        characters.update(document.text)
    tokenizer = CharTokenizer(characters)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    return tokenizer


def load_options(overrides: Sequence[str]) -> DataOptions:
    """The `data` group under Hydra overrides, as train.py would see it. Raises ValueError in one
    line that names the option.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    import conf

    values = conf.compose(overrides)
    try:
        # Merged one level down, so that an error names data.max_tokens and not max_tokens.
        schema = OmegaConf.create({"data": OmegaConf.structured(DataOptions)})
        given = {"data": OmegaConf.to_container(values.data, resolve=True)}
        options = OmegaConf.to_object(OmegaConf.merge(schema, given).data)
    except OmegaConfBaseException as error:
        raise ValueError(conf.explain(error, overrides)) from error
    assert isinstance(options, DataOptions)
    return options


def main(overrides: Sequence[str]) -> int:
    """The command line. Prints folder, counts and hashes; 1 after a mistake of the user's or a
    failed download.
    """
    import logging

    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return 0
    ours = logging.getLogger("data")  # and not the root: the libraries speak for themselves
    ours.setLevel(logging.INFO)
    ours.handlers = [logging.StreamHandler()]
    try:
        prepared = prepare(load_options(overrides))
        for file in (prepared.train, prepared.val):
            file.verify()
    except (ValueError, OSError) as error:
        print(f"data.prepare: {error}", file=sys.stderr)
        return 1
    metadata = prepared.metadata
    print(f"folder      {prepared.folder}")
    print(f"tokenizer   {metadata['tokenizer']}, vocabulary {metadata['vocab_size']:,}")
    for split in SPLITS:
        part = metadata[split]
        print(
            f"{split:10}  {part['tokens']:,} tokens of {part['documents']:,} documents, sha256 "
            f"{part['sha256']}"
        )
    print(f"held out    {', '.join(metadata['held_out'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
