"""What tests of prepared folders share: stories, GPT-2's tokenizer, and the tokens of a folder."""

import os
from functools import cache
from pathlib import Path

import numpy as np

from data.options import DataOptions
from data.prepare import Prepared
from data.tokenizers import Tokenizer, load_tokenizer

CACHE_DIR = os.environ.get("BASIS_CACHE_DIR", ".cache")
REAL_CACHE = DataOptions(cache_dir=CACHE_DIR).cache_path()
SENTENCE = "the quick brown fox jumps over the lazy dog while 42 bakers knead \n\n their dough"
WORDS = SENTENCE.split(" ")


def story(index: int) -> str:
    rng = np.random.default_rng(index)
    return (
        " ".join(WORDS[word] for word in rng.integers(0, len(WORDS), int(rng.integers(5, 60))))
        + f" #{index}"
    )


@cache
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2", REAL_CACHE)


def share_tokenizer(cache_dir: Path) -> None:
    """GPT-2's files, fetched once for all tests, in another cache folder."""
    assert gpt2().name == "gpt2"
    (cache_dir / "tokenizers").symlink_to(REAL_CACHE / "tokenizers")


def ids(prepared: Prepared, split: str) -> list[int]:
    return getattr(prepared, split).read(0, getattr(prepared, split).count).tolist()
