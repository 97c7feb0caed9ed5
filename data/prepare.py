"""Prepared data: a folder with train.bin, val.bin and a metadata.json that says what they are, made
once and found again.

    <data.cache_dir>/tokens/<source>-<tokenizer>-<hash>/

The hash covers what decides the tokens (source, its revision or files, the split, the tokenizer,
`data.max_tokens`) and nothing else, so a change of order or of cache folder reuses them.
`metadata.json` is written last: a folder that has one is complete and is opened at once, without a
tokenizer, a network or the original text; one without is continued, and one whose token files were
deleted is made again. One process at a time works on a folder, the others wait for it.

Nothing damaged is used. The metadata carry a checksum of themselves, name what the folder's hash
was made of (so they are refused in another's place), and hold the sha256 of each other file. Those
of the token files are compared on opening (data/tokens.py says how seldom), that of a character
vocabulary when it is loaded.

On the command line, ahead of training (train.py does the same on first use):

    python -m data.prepare data=openwebtext data.max_tokens=1000000
"""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.documents import Source
from data.fetch import locked
from data.files import Text
from data.hf_tokenizer import HFTokenizer
from data.options import DataOptions, with_tokenizer
from data.shards import SPLITS, join, remove, tokenize
from data.sources import MissingText, make_source
from data.storage import digest_of, read_json, sha256_of, write_json
from data.tokenizers import CHAR_FILE, CharTokenizer, Tokenizer, load_tokenizer
from data.tokens import TokenFile

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same options would give other tokens
METADATA = "metadata.json"
TOKENIZER_SHA256 = "tokenizer_sha256"
TOKENS = "tokens"  # folder below data.cache_dir
ENTRIES = {"format", "source", "identity", "tokenizer", "vocab_size", "max_tokens", *SPLITS}
NAME_BYTES = 120  # of a source's name in the name of its prepared folder


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
        """Open a complete folder and compare its files with its metadata.

        Raises ValueError naming the file if one is missing, damaged or not the one that the
        metadata describes.
        """
        advice = f"delete {folder} and prepare it again"
        metadata = read_json(folder / METADATA, advice)
        if missing := sorted(ENTRIES - metadata.keys()):
            raise ValueError(f"{folder / METADATA} is damaged (no {missing[0]}): {advice}")
        files = {}
        for split in SPLITS:
            path = folder / f"{split}.bin"
            if not path.exists():
                raise ValueError(f"{path} is missing: {advice}")
            found = files[split] = TokenFile.open(path)
            described = (metadata[split]["sha256"], metadata["vocab_size"])
            if (found.sha256, found.vocab_size) != described:
                raise ValueError(f"{path} is not the file that {METADATA} describes: {advice}")
        return cls(folder, files["train"], files["val"], metadata)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded when first asked for: training and evaluating need none. Raises ValueError if its
        vocabulary is damaged.
        """
        path, sha256 = self.folder / CHAR_FILE, self.metadata.get("characters_sha256")
        if sha256 is not None and path.exists() and sha256_of(path) != sha256:
            raise ValueError(f"{path} is damaged: delete {self.folder} and prepare it again")
        loaded = load_tokenizer(
            self.metadata["tokenizer"], self.folder.parents[1], folder=self.folder
        )
        if isinstance(loaded, HFTokenizer) and loaded.sha256 != self.metadata[TOKENIZER_SHA256]:
            raise ValueError(f"{self.folder}: its tokenizer.json is damaged; prepare it again")
        return loaded


def prepare(options: DataOptions, *, progress: bool = True, known: str | None = None) -> Prepared:
    """Open the prepared folder of these options, making it first if it is not there (see the
    module).

    progress: show a bar on stderr. known: sha256 of the training tokens of a run that continues; if
    nothing is at `data.path` any more, the folder in the cache that holds them is opened instead.
    Raises ValueError for options that can't be served (before anything is written, as far as they
    can be checked without reading the text) or a damaged file, and ConnectionError if something
    could not be fetched.
    """
    try:
        source = make_source(options)
    except MissingText:
        found = None if known is None else find_prepared(options, known)
        if found is None:
            raise
        return found
    folder = prepared_folder(options, source)
    if not _complete(folder):
        with locked(folder):
            if not _complete(folder):
                _build(options, source, folder, progress)
    prepared = Prepared.open(folder)
    m = prepared.metadata
    made_of = {"format": m["format"], "source": m["source"], **m["identity"]}
    made_of |= {"tokenizer": m["tokenizer"], "max_tokens": m["max_tokens"]}
    made_of |= {name: m[name] for name in (TOKENIZER_SHA256,) if name in m}
    if not folder.name.endswith(_suffix(made_of)):
        raise ValueError(
            f"{folder / METADATA} is of another text: delete {folder} and prepare it again"
        )
    return prepared


def _complete(folder: Path) -> bool:
    return all((folder / name).exists() for name in (METADATA, *(f"{s}.bin" for s in SPLITS)))


def find_prepared(options: DataOptions, train_sha256: str) -> Prepared | None:
    """The complete folder in the cache of `options` that holds these training tokens, or None.

    It is found by its metadata, so the text itself is not needed: a run can be looked at from
    another folder, and after its text has moved. Tokenizer, source and share held out must be those
    of `options`.
    """
    for file in sorted((options.cache_path() / TOKENS).glob(f"*/{METADATA}")):
        try:
            metadata = read_json(file, "prepare it again")
            if (
                metadata["train"]["sha256"] != train_sha256
                or metadata["tokenizer"] != options.tokenizer
                or metadata["source"] != options.source
                or metadata["identity"].get("val_fraction") != options.val_fraction
            ):
                continue
        except (KeyError, ValueError) as error:  # of whatever text: the next may be the right one
            log.warning("passed over: %s", error)
            continue
        return Prepared.open(file.parent)
    return None


def prepared_folder(options: DataOptions, source: Source) -> Path:
    """Where these options' tokens live."""
    made_of = {"format": FORMAT, "source": options.source, **source.identity()}
    made_of |= {"tokenizer": options.tokenizer, "max_tokens": options.max_tokens}
    if options.tokenizer_path is not None:
        made_of[TOKENIZER_SHA256] = HFTokenizer(Path(options.tokenizer_path)).sha256
    # A file system counts the bytes of a name, and the folder's lock has a longer one still.
    readable = os.fsencode(source.name)[:NAME_BYTES].decode("utf-8", "ignore")
    return options.cache_path() / TOKENS / f"{readable}-{options.tokenizer}{_suffix(made_of)}"


def _suffix(made_of: dict[str, Any]) -> str:
    """The end of a prepared folder's name, by what decides its tokens."""
    return f"-{digest_of(made_of)[:12]}"


def _build(options: DataOptions, source: Source, folder: Path, progress: bool) -> None:
    for leftover in folder.glob("*.tmp"):  # of a process that was killed; nobody else is here now
        leftover.unlink()
    tokenizer = _tokenizer(options, source, folder, progress)
    shards, cut = folder / "shards", folder / "shards_of_cut_rows"
    manifest = tokenize(source, tokenizer, shards, max_tokens=options.max_tokens, progress=progress)
    if sum(manifest.tokens.values()) == 0:
        remove(shards)
        raise ValueError(f"data.path={options.path!r}: holds no text")
    if isinstance(source, Text) and not all(manifest.tokens.values()):
        # In a folder of its own: an interrupted preparation must not mix the two rules.
        log.info("%s: too few rows to hold some out; the last part of each is", source.path)
        source.cut_rows()
        manifest = tokenize(
            source, tokenizer, cut, max_tokens=options.max_tokens, progress=progress
        )
        remove(shards)
        shards = cut
    for split, advice in (("train", "lower it"), ("val", "raise it or data.max_tokens")):
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
    if isinstance(tokenizer, CharTokenizer):
        metadata["characters_sha256"] = sha256_of(folder / CHAR_FILE)
    if isinstance(tokenizer, HFTokenizer):
        metadata[TOKENIZER_SHA256] = tokenizer.sha256
    write_json(folder / METADATA, metadata)
    remove(shards)


def _tokenizer(options: DataOptions, source: Source, folder: Path, progress: bool) -> Tokenizer:
    """The tokenizer to encode with; hf's files are copied into the folder, a character vocabulary
    is collected from the corpus, with a bar if `progress`, and saved there.
    """
    from data.bar import bar

    if options.tokenizer_path is not None:
        of_folder = HFTokenizer(Path(options.tokenizer_path))
        folder.mkdir(parents=True, exist_ok=True)
        of_folder.save(folder)
        return of_folder
    if options.tokenizer != "char":
        return load_tokenizer(options.tokenizer, options.cache_path())
    characters = {CharTokenizer.separator}
    with bar(
        desc=f"collecting characters of {source.name}",
        unit="char",
        unit_scale=True,
        disable=None if progress else True,  # None: a bar on a terminal only
    ) as shown:
        for document in source.documents():
            characters.update(document.text)
            shown.update(len(document.text))
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
        # OmegaConf takes a frozen dataclass for values that must not be set; here it is the type.
        OmegaConf.set_readonly(schema.data, None)
        data: Any = OmegaConf.to_container(values.data, resolve=True)
        given = {"data": with_tokenizer(data, values.model)}
        options = OmegaConf.to_object(OmegaConf.merge(schema, given).data)
    except OmegaConfBaseException as error:
        raise ValueError(conf.explain(error, overrides)) from error
    assert isinstance(options, DataOptions)
    return options


def main(overrides: Sequence[str]) -> int:
    """The command line. Prints folder, counts and hashes; 1 after a mistake of the user's or a
    failed download.
    """
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
