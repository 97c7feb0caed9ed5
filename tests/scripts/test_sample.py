"""Text generation from a run folder."""

from pathlib import Path

import pytest
from tiny import train_here

from scripts.sample import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    train_here(folder, folder / "run", "steps=300", "optim=adamw", "micro_batch_size=8")
    return folder / "run"


def test_continues_the_prompt_and_repeats_with_the_seed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main([str(run), "--prompt", "to be", "--tokens", "40", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("to be")
    assert len(texts[0]) == len("to be") + 40 + 1
    assert set(texts[0]) <= set("abcdefghijklmnopqrstuvwxyz \n")


def test_mistakes_are_said_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
    assert main([str(run), "--prompt", ""]) == 1
    assert "--prompt is empty" in capsys.readouterr().err
