"""What a source of text is, and the two rules by which text is held out for validation.

A source yields `Document`s, each already assigned to "train" or "val", in an order that never
changes, and can go on from a remembered position, so that an interrupted preparation continues. It
says what it is (`identity`) without touching the network, so that prepared token files are found
again on a machine that has no other copy.
"""

import abc
import hashlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

Position = dict[str, Any]
"""Where a source stands, as JSON values."""


@dataclass(frozen=True)
class Document:
    """A piece of text for one split. ends: an end-of-text token belongs after it (False for a text
    cut in running prose).
    """

    text: str
    split: str
    ends: bool = True


class Source(Protocol):
    """name: for people and folder names. held_out: titles of the works kept for validation, or one
    line on the rule.
    """

    name: str
    held_out: tuple[str, ...]

    def identity(self) -> dict[str, Any]:
        """What distinguishes this source's documents from any other's, as JSON values. Touches no
        network.
        """
        ...

    def documents(self, position: Position | None = None) -> Generator[Document, None, None]:
        """Documents in their fixed order, from the beginning or from `position`. Close it when
        stopping early.
        """
        ...

    def position(self) -> Position:
        """Where to continue after the document yielded last."""
        ...


class Counted(abc.ABC):
    """A source cheap enough to read again from its start: its position is the number of documents
    yielded.
    """

    _yielded = 0

    @abc.abstractmethod
    def _all(self) -> Iterator[Document]:
        """All documents, from the first."""

    def documents(self, position: Position | None = None) -> Generator[Document, None, None]:
        self._yielded = done = 0 if position is None else int(position["documents"])
        for index, document in enumerate(self._all()):
            if index >= done:
                self._yielded = index + 1
                yield document

    def position(self) -> Position:
        return {"documents": self._yielded}


def split_by_characters(text: str, val_fraction: float, *, ends: bool) -> Iterator[Document]:
    """The text's first 1 - val_fraction of characters for training, the rest for validation; the
    latter comes first.
    """
    cut = int(len(text) * (1.0 - val_fraction))
    for part, split in ((text[cut:], "val"), (text[:cut], "train")):
        if part:
            yield Document(part, split, ends)


def split_by_hash(text: str, val_fraction: float) -> str:
    """ "val" for about `val_fraction` of all texts, decided by the text alone.

    So the split needs no count of the documents, survives any interruption, keeps exact duplicates
    on one side, and more training tokens only ever append to the validation file. (nanoGPT's split
    of OpenWebText shuffles the whole dataset and can't be reproduced while streaming.)
    """
    leading = int.from_bytes(
        hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big"
    )
    return "val" if leading < val_fraction * 2.0**64 else "train"
