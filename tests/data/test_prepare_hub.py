"""Prepared folders of the hub's kind, Parquet through `datasets`: the formula's tokens, appended
to, unharmed by kills.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from prepared_texts import gpt2, ids, share_tokenizer, story

from data import shards
from data.documents import split_by_hash
from data.hub import Hub
from data.options import REPOSITORY, DataOptions
from data.prepare import load_options, prepare, prepared_folder
from data.sources import make_source


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 files of 400 rows each, in small row groups, written by `datasets` itself; every 100th text
    is empty.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    folder = tmp_path_factory.mktemp("parquet")
    for number in range(3):
        rows = range(number * 400, (number + 1) * 400)
        texts = ["" if row % 100 == 7 else story(row) for row in rows]
        path = folder / f"train-{number:05d}-of-00003.parquet"
        Dataset.from_dict({"text": texts, "id": list(rows)}).to_parquet(str(path), batch_size=150)
    return folder


def hub_options(parquet: Path, cache_dir: Path) -> DataOptions:
    options = load_options(
        [
            "data=fineweb_edu",
            f"data.path={parquet}",
            "data.val_fraction=0.1",
            "data.max_tokens=null",
        ]
    )
    return replace(options, cache_dir=str(cache_dir))


@pytest.fixture
def hub(parquet: Path, tmp_path: Path) -> DataOptions:
    share_tokenizer(tmp_path)
    return hub_options(parquet, tmp_path)


@cache
def expected_ids(split: str, val_fraction: float) -> list[int]:
    tokenizer = gpt2()
    texts = [story(row) for row in range(1200) if row % 100 != 7]
    chosen = [text for text in texts if split_by_hash(text, val_fraction) == split]
    return [token for text in chosen for token in [*tokenizer.encode(text).tolist(), 50256]]


def test_hub_tokens_are_those_of_the_formula(
    hub: DataOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(shards, "GROUP_DOCUMENTS", 37)
    prepared = prepare(hub, progress=False)
    for split in ("train", "val"):
        assert ids(prepared, split) == expected_ids(split, 0.1)
    assert prepared.metadata["train"]["documents"] + prepared.metadata["val"]["documents"] == 1188


def test_more_training_tokens_only_append(hub: DataOptions) -> None:
    hub = replace(hub, max_tokens=12_345)
    prepared = prepare(hub, progress=False)
    assert ids(prepared, "train") == expected_ids("train", 0.1)[:12_345]
    validation = ids(prepared, "val")
    assert len(validation) > 0
    assert validation == expected_ids("val", 0.1)[: len(validation)]


@pytest.mark.parametrize("documents", [1, 399, 400, 401, 700])
def test_the_stream_continues_at_its_position(hub: DataOptions, documents: int) -> None:
    whole = list(make_source(hub).documents())
    first = make_source(hub)
    running = first.documents()
    head = list(islice(running, documents))
    position = json.loads(json.dumps(first.position()))
    running.close()
    assert head + list(make_source(hub).documents(position)) == whole


MOMENTS = ["mid-file", "before the manifest", "joining"]
# One process imports everything once; a fork of it is killed at each moment, in a cache folder of
# its own.
KILLER = """
import os, signal
from dataclasses import replace
from functools import cache
from data import shards
from data.prepare import *
shards.SHARD_TOKENS, shards.GROUP_DOCUMENTS = 3000, 37
real_write, real_manifest = shards.write_tokens, shards.Manifest.write

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def prepare_until(moment, options):
    written = 0

    def write_tokens(path, chunks, vocab_size):
        def half_of_it():
            for chunk in chunks:
                yield chunk[: len(chunk) // 2]
                die()

        nonlocal written
        written += 1
        joining = moment == "joining" and path.name == "val.bin"
        here = (moment == "mid-file" and written == 7) or joining
        return real_write(path, half_of_it() if here else chunks, vocab_size)

    def write(self, folder):
        if moment == "before the manifest" and self.shards == 4:
            die()
        real_manifest(self, folder)

    shards.write_tokens, shards.Manifest.write = write_tokens, write
    prepare(options, progress=False)

for moment in MOMENTS:
    child = os.fork()
    if child == 0:
        prepare_until(moment, replace(OPTIONS, cache_dir=os.path.join(OPTIONS.cache_dir, moment)))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def killed(parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    """Options below whose cache folder, one per moment, lies a preparation that was killed then."""
    root = tmp_path_factory.mktemp("killed")
    for moment in MOMENTS:
        (root / moment).mkdir()
        share_tokenizer(root / moment)
    options = hub_options(parquet, root)
    program = KILLER.replace("MOMENTS", repr(MOMENTS)).replace("OPTIONS", repr(options))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(MOMENTS)
    return options


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.slow
def test_killed_and_run_again_the_files_are_the_same(
    killed: DataOptions, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    options = replace(killed, cache_dir=str(Path(killed.cache_dir) / moment))
    folder = prepared_folder(options, make_source(options))
    assert not (folder / "metadata.json").exists()
    manifest = shards.Manifest.read(folder / "shards")
    assert manifest.shards >= 3
    unlisted = folder / "shards" / f"{manifest.shards:05d}.val.bin"
    assert unlisted.exists() if moment == "before the manifest" else any(folder.rglob("*.tmp"))
    # The rerun must continue, not begin again: it asks the source for what follows the manifest's
    # position.
    asked: list[Any] = []
    real: Callable[..., Iterator[Any]] = Hub.documents
    monkeypatch.setattr(
        Hub, "documents", lambda self, position=None: asked.append(position) or real(self, position)
    )
    prepared = prepare(options, progress=False)
    assert asked == ([] if moment == "joining" else [manifest.position])
    for split in ("train", "val"):
        assert ids(prepared, split) == expected_ids(split, 0.1)
        getattr(prepared, split).verify()
    assert sorted(path.name for path in prepared.folder.iterdir()) == [
        "metadata.json",
        "train.bin",
        "val.bin",
    ]


def test_hub_without_network_or_column_is_told_in_words(hub: DataOptions) -> None:
    """conftest.py sets HF_HUB_OFFLINE, so this does not try."""
    hub = replace(hub, text_column="body")
    with pytest.raises(
        ValueError,
        match=r"data\.text_column='body': .* has only the columns text, id",
    ):
        prepare(hub, progress=False)
    hub = replace(hub, path=None)
    with pytest.raises(
        ConnectionError,
        match=r"data\.repo='HuggingFaceFW/fineweb-edu' at revision 87f0.*data\.path=",
    ):
        prepare(hub, progress=False)


@pytest.mark.slow
def test_command_prints_counts_and_hashes_and_ends_cleanly(hub: DataOptions) -> None:
    """Stopped early by data.max_tokens: a Parquet stream left half-read would abort the interpreter
    on its way out.
    """
    overrides = [
        "data=fineweb_edu",
        f"data.path={hub.path}",
        "data.val_fraction=0.1",
        "data.max_tokens=5_000",
    ]
    overrides += [f"data.cache_dir={hub.cache_dir}"]
    command = [sys.executable, "-m", "data.prepare", *overrides]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    prepared = prepare(load_options(overrides))
    assert f"folder      {prepared.folder}\n" in done.stdout
    for split in ("train", "val"):
        file = getattr(prepared, split)
        assert f"{file.count:,} tokens" in done.stdout
        assert file.sha256 in done.stdout
    assert prepared.train.count == 5000
    assert done.stderr == ""  # no bar where there is no terminal
