"""No damaged file of the token cache is used: it is named, or made again with the same tokens."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prepared_texts import ids, story

from data import prepare as prepare_module
from data import shards
from data.options import DataOptions
from data.prepare import Prepared, prepare

Kept = tuple[list[int], list[int], str]


def stories(folder: Path, first: int) -> DataOptions:
    """The options of 60 short documents, counted from `first`, by characters."""
    file = folder / f"stories{first}.jsonl"
    rows = (json.dumps({"text": story(index)}) + "\n" for index in range(first, first + 60))
    if not file.exists():  # its time belongs to what the folder of tokens is named by
        file.write_text("".join(rows))
    return DataOptions(
        source="text",
        path=str(file),
        tokenizer="char",
        order="random",
        val_fraction=0.2,
        cache_dir=str(folder / "cache"),
    )


def content(prepared: Prepared) -> Kept:
    """All that is read from a prepared folder."""
    train, val = (ids(prepared, split) for split in ("train", "val"))
    return train, val, prepared.tokenizer.decode(val)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Kept]:
    """A folder with two texts, each with a complete folder below cache/ and with one that was
    interrupted before its shards were joined below cut/; and what the first should say.
    """
    root = tmp_path_factory.mktemp("caches")
    small = pytest.MonkeyPatch()
    small.setattr(shards, "SHARD_TOKENS", 2000)
    small.setattr(shards, "GROUP_DOCUMENTS", 5)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    said = [content(prepare(stories(root, first), progress=False)) for first in (0, 100)]
    small.setattr(prepare_module, "join", killed)
    for first in (0, 100):
        with pytest.raises(KeyboardInterrupt):
            prepare(replace(stories(root, first), cache_dir=str(root / "cut")), progress=False)
    small.undo()
    assert said[0] != said[1]
    return root, said[0]


def flip(path: Path, other: Path, place: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(place * len(raw))] ^= 1
    path.write_bytes(raw)


def truncate(path: Path, other: Path, place: float) -> None:
    path.write_bytes(path.read_bytes()[: int(place * path.stat().st_size)])


def delete(path: Path, other: Path, place: float) -> None:
    path.unlink()


def swap(path: Path, other: Path, place: float) -> None:
    shutil.copy(other, path)


DAMAGES: list[tuple[Callable[[Path, Path, float], None], float]] = [
    *((flip, place / 16) for place in range(16)),
    *((truncate, place) for place in (0.0, 0.3, 0.99)),
    (delete, 0.0),
    (swap, 0.0),
]
COMPLETE = ["metadata.json", "train.bin", "val.bin", "characters.json"]
CUT = ["shards/manifest.json", *(f"shards/0000{n}.{s}.bin" for n in (0, 1) for s in shards.SPLITS)]


def of_both(root: Path, cache: str) -> tuple[Path, Path]:
    """The folders of the two texts."""
    first, second = sorted((root / cache / "tokens").glob("*/"))
    return (first, second) if "stories0" in first.name else (second, first)


@pytest.mark.parametrize("name", [*COMPLETE, *CUT])
def test_a_damaged_file_is_named_or_made_again(
    caches: tuple[Path, Kept], tmp_path: Path, name: str
) -> None:
    root, expected = caches
    cache = "cut" if name in CUT else "cache"
    named: list[tuple[str, object, float]] = []
    options = stories(root, 0)
    for number, (damage, place) in enumerate(DAMAGES):
        copy = tmp_path / str(number)
        shutil.copytree(root / cache, copy)
        first, second = of_both(tmp_path, str(number))
        damage(first / name, second / name, place)
        try:
            got = content(prepare(replace(options, cache_dir=str(copy)), progress=False))
        except ValueError as error:
            named.append((str(error), damage, place))
        else:
            assert got == expected, (damage, place)
        shutil.rmtree(copy)
    assert len(named) > len(DAMAGES) / 2
    assert [said for said in named if name.rpartition("/")[2] not in said[0]] == []


def test_a_folder_swapped_with_another_texts_is_refused(
    caches: tuple[Path, Kept], tmp_path: Path
) -> None:
    root, expected = caches
    options = stories(root, 0)
    for cache, named in (("cache", "metadata.json"), ("cut", "manifest.json")):
        copy = tmp_path / cache
        shutil.copytree(root / cache, copy)
        first, second = of_both(tmp_path, cache)
        shutil.rmtree(first)
        second.rename(first)
        options = replace(options, cache_dir=str(copy))
        with pytest.raises(ValueError, match=rf"{named} is of another text: delete"):
            prepare(options, progress=False)
        shutil.rmtree(first)
        assert content(prepare(options, progress=False)) == expected


def test_folders_of_versions_without_checksums_are_opened(
    caches: tuple[Path, Kept], tmp_path: Path
) -> None:
    root, expected = caches
    options = stories(root, 0)
    for cache, file, newer in (
        ("cache", "metadata.json", ["checksum", "characters_sha256"]),
        ("cut", "shards/manifest.json", ["checksum", "text", "hashes"]),
    ):
        shutil.copytree(root / cache, tmp_path / cache)
        path = of_both(tmp_path, cache)[0] / file
        values = json.loads(path.read_bytes())
        path.write_text(json.dumps({k: v for k, v in values.items() if k not in newer}))
        options = replace(options, cache_dir=str(tmp_path / cache))
        assert content(prepare(options, progress=False)) == expected
