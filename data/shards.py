"""Documents to token files, in steps that a kill cannot undo.

Tokenizing OpenWebText takes hours, and whatever takes hours gets interrupted. So tokens are
collected in shards of some 16 million (32 MB): each shard's two files (train, val) are written
under temporary names and renamed, then a manifest that counts them and remembers the source's
position is replaced in one rename. What the manifest does not count never happened: a rerun goes on
from the manifest's position and writes over it. The bytes of the result depend on the documents
alone, not on where shards end or how often the work was interrupted. The manifest carries a
checksum, says which text and tokenizer it belongs to and the sha256 of each shard's tokens, so that
neither a damaged file nor one of another preparation gets into the result. At the end the shards
are joined into `train.bin` and `val.bin`, for which the disk must briefly hold the tokens twice.

Between documents stands the tokenizer's end-of-text token, appended to each as nanoGPT does, or,
where there is none, its separator. A few threads encode at a time (tiktoken releases the
interpreter's lock); their results are used in order.
"""

import os
import shutil
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from data.documents import Document, Position, Source
from data.storage import digest_of, read_json, write_json
from data.tokenizers import Tokenizer
from data.tokens import Ids, TokenFile, write_tokens

SPLITS = ("train", "val")
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 24
GROUP_CHARACTERS = (
    1 << 22
)  # documents are handed to the encoding threads in groups of about this size
GROUP_DOCUMENTS = 256
THREADS = min(8, os.cpu_count() or 1)


@dataclass
class Manifest:
    """What is safely on the disk: shards 0 .. shards - 1, their totals per split, and where the
    source goes on.

    text: digest of what decides the tokens. hashes: of each shard the sha256 of its tokens, per
    split. Manifests of older versions have neither.
    """

    shards: int = 0
    text: str | None = None
    hashes: list[dict[str, str]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    position: Position | None = None
    finished: bool = False

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder of shards; a fresh one if there is none. Raises ValueError
        naming the file if it is damaged.
        """
        path = folder / MANIFEST
        if not path.exists():
            return cls()
        values = read_json(path, _advice(folder))
        if not values.keys() <= {known.name for known in fields(cls)}:
            raise ValueError(f"{path} is damaged (its entries have other names): {_advice(folder)}")
        return cls(**values)

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, asdict(self))


def tokenize(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Write the source's tokens as shards into `folder`, continuing what is there, and return the
    finished manifest.

    max_tokens: stop once that many training tokens are written, the last document cut to hit it
    exactly. Raises ValueError naming the manifest in `folder` if it is damaged or of another text.
    """
    from data.bar import bar

    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest.read(folder)
    text = digest_of(
        {
            "source": source.identity(),
            "held_out": list(source.held_out),
            "tokenizer": tokenizer.name,
            "max_tokens": max_tokens,
        }
    )
    if manifest.text not in (None, text):
        raise ValueError(f"{folder / MANIFEST} is of another text: {_advice(folder)}")
    manifest.text = text
    if manifest.finished:
        return manifest
    pending: dict[str, list[Ids]] = {split: [] for split in SPLITS}
    with (
        bar(
            desc=f"tokenizing {source.name}",
            total=max_tokens,
            initial=manifest.tokens["train"],
            unit="token",
            unit_scale=True,
            disable=None if progress else True,  # None: a bar on a terminal only
        ) as shown,
        ThreadPoolExecutor(THREADS) as threads,
        closing(_groups(source.documents(manifest.position))) as groups,
    ):
        for group in groups:
            for document, ids in zip(
                group, threads.map(tokenizer.encode, [d.text for d in group]), strict=True
            ):
                ids = _joined(ids, document, tokenizer, first=manifest.tokens[document.split] == 0)
                if document.split == "train":
                    if max_tokens is not None:
                        ids = ids[: max_tokens - manifest.tokens["train"]]
                    shown.update(len(ids))
                pending[document.split].append(ids)
                manifest.tokens[document.split] += len(ids)
                manifest.documents[document.split] += 1
                if manifest.tokens["train"] == max_tokens:
                    break
            if manifest.tokens["train"] == max_tokens:
                break
            if sum(len(ids) for pieces in pending.values() for ids in pieces) >= SHARD_TOKENS:
                _flush(pending, manifest, tokenizer.vocab_size, folder, source.position())
    manifest.finished = True
    _flush(pending, manifest, tokenizer.vocab_size, folder, position=None)
    return manifest


def join(manifest: Manifest, shards: Path, folder: Path, vocab_size: int) -> dict[str, TokenFile]:
    """Join the shards, each checked against its sha256, to `folder`/train.bin and val.bin.

    Raises ValueError naming the first shard that is damaged, missing or not the manifest's.
    """

    def pieces(split: str) -> Iterator[Ids]:
        for index in range(manifest.shards):
            path = _shard(shards, index, split)
            try:
                shard = TokenFile.open(path)
            except FileNotFoundError as error:
                raise ValueError(f"{path} is missing: {_advice(shards)}") from error
            except ValueError as error:
                raise ValueError(f"{error}, and with it all of {shards}") from error
            listed = manifest.hashes[index][split] if manifest.hashes else shard.sha256
            if (shard.sha256, shard.vocab_size) != (listed, vocab_size):
                raise ValueError(f"{path} is not the file of {MANIFEST}: {_advice(shards)}")
            yield from shard.chunks()

    return {
        split: write_tokens(folder / f"{split}.bin", pieces(split), vocab_size) for split in SPLITS
    }


def remove(folder: Path) -> None:
    """Delete a folder of shards once their tokens stand in the joined files."""
    shutil.rmtree(folder)


def _joined(ids: Ids, document: Document, tokenizer: Tokenizer, *, first: bool) -> Ids:
    """The ids of a document with what sets it apart from its neighbours."""
    if tokenizer.eot is not None:
        return np.append(ids, ids.dtype.type(tokenizer.eot)) if document.ends else ids
    return ids if first else np.concatenate([tokenizer.encode(tokenizer.separator), ids])


def _groups(documents: Generator[Document, None, None]) -> Generator[list[Document], None, None]:
    """Documents in groups worth handing to threads. Reads no document ahead of the group, so that
    the source's position after a group is exactly behind its last document; closing this closes the
    source.
    """
    group: list[Document] = []
    characters = 0
    with closing(documents):
        for document in documents:
            group.append(document)
            characters += len(document.text)
            if characters >= GROUP_CHARACTERS or len(group) >= GROUP_DOCUMENTS:
                yield group
                group, characters = [], 0
        if group:
            yield group


def _flush(
    pending: dict[str, list[Ids]],
    manifest: Manifest,
    vocab_size: int,
    folder: Path,
    position: Position | None,
) -> None:
    """Write the pending tokens as the next shard, then the manifest that makes it count."""
    hashes = {}
    for split in SPLITS:
        path = _shard(folder, manifest.shards, split)
        hashes[split] = write_tokens(path, pending[split], vocab_size).sha256
        pending[split].clear()
    if len(manifest.hashes) == manifest.shards:  # not where an older version began
        manifest.hashes.append(hashes)
    manifest.shards += 1
    manifest.position = position
    manifest.write(folder)


def _advice(shards: Path) -> str:
    return f"delete {shards} and prepare it again"


def _shard(folder: Path, index: int, split: str) -> Path:
    return folder / f"{index:05d}.{split}.bin"
