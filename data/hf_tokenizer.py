"""`data.tokenizer=hf`: a tokenizer.json, as models of transformers bring it, read by the library
`tokenizers`. Any kind: byte-pair, WordPiece, Unigram.

    <data.tokenizer_path>/tokenizer.json          the tokenizer
    <data.tokenizer_path>/tokenizer_config.json   may name the token that ends a text (eos_token)

Text is encoded as ordinary text: special tokens that it mentions are spelt out, and none is added
in front of it. The eos token ends a document, where the file knows one; else a newline parts two.
Nothing is cut or padded, whatever the file says. A tokenizer that can't spell a character maps it
to an unknown token, and the text is lost; that is refused, with the place in the text.

Long files reach a tokenizer in pieces. One that puts a blank before a text, as Llama 2's does, puts
it before each piece.

Both files are copied into the prepared folder, whose name depends on their hash: another tokenizer
in the same place is another folder, and decoding needs the prepared folder alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.storage import write_atomic
from data.tokens import Ids, dtype_for

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"


class HFTokenizer:
    """The tokenizer of a folder. sha256: of what decides its ids. Raises ValueError naming
    data.tokenizer_path.
    """

    name = "hf"

    def __init__(self, folder: Path) -> None:
        what = f"data.tokenizer_path={folder}"
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise ValueError(
                "data.tokenizer='hf': needs the package tokenizers; "
                "pip install basis-sketch[integrations]"
            ) from None
        path = folder.expanduser() / FILE
        if not path.is_file():
            raise ValueError(f"{what}: holds no {FILE}")
        self._content = path.read_bytes()
        try:
            self._inner = Tokenizer.from_str(self._content.decode())
            unknown = json.loads(self._content)["model"].get("unk_token")
        except Exception as error:  # noqa: BLE001  the library raises nothing narrower
            raise ValueError(f"{what}: {FILE} can't be read ({error})") from None
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        self.vocab_size: int = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1
        self._unknown = None if unknown is None else self._inner.token_to_id(unknown)
        self._end = _end_of_text(path.with_name(CONFIG))
        self.eot: int | None = None if self._end is None else self._inner.token_to_id(self._end)
        if self._end is not None and self.eot is None:
            raise ValueError(f"{what}: eos_token={self._end!r} of {CONFIG} is not in {FILE}")
        self.separator = "\n" if self.eot is None else ""
        ends = str(self._end).encode()
        self.sha256 = hashlib.sha256(self._content + b"\0" + ends).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the files beside the tokens, so that `HFTokenizer(folder)` is this tokenizer."""
        write_atomic(folder / FILE, self._content)
        write_atomic(folder / CONFIG, json.dumps({"eos_token": self._end}))

    def encode(self, text: str) -> Ids:
        found = self._inner.encode(text, add_special_tokens=False)
        if self._unknown is not None and self._unknown in found.ids:
            start, end = found.offsets[found.ids.index(self._unknown)]
            before = text[max(start - 20, 0) : start]
            raise ValueError(
                f"data.tokenizer='hf': {text[start:end]!r}, after {before!r}, is not in its "
                "vocabulary"
            )
        return np.asarray(found.ids, dtype=dtype_for(self.vocab_size))

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._inner.decode(list(ids), skip_special_tokens=False)
        return text


def _end_of_text(path: Path) -> str | None:
    """The token that ends a text, as tokenizer_config.json names it."""
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text()).get("eos_token")
    except (AttributeError, ValueError):
        raise ValueError(f"data.tokenizer_path={path.parent}: {CONFIG} is no JSON object") from None
    return token.get("content") if isinstance(token, dict) else token
