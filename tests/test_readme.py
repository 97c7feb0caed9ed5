"""The README's commands and its example are tried as they stand there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

import basis
import basis.estimators
from harness.config import load, make_estimator

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\| `(python [^`]+)`", README, re.MULTILINE)


def code_block(language: str, containing: str) -> str:
    return next(block for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in block)


def test_the_readme_is_short_and_its_commands_are_found() -> None:
    assert len(README.splitlines()) <= 250
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python train.py") and "--help" not in c])
def test_training_commands_compose_to_a_valid_configuration(command: str) -> None:
    overrides = [word for word in shlex.split(command)[2:] if word != "-m"]
    first_of_each = [re.sub(r"(=[^,\[\]]*),[^\[\]]*$", r"\1", override) for override in overrides]  # a sweep's first cell
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        load(compose("config", overrides=first_of_each))


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("python train.py") or "--help" in c])
def test_other_commands_know_their_options(command: str) -> None:
    words = shlex.split(command)
    options = {word for word in words if word.startswith("--")} - {"--help"}
    program = words[1:3] if words[1] == "-m" else words[1:2]
    if program[-1] == "data.prepare":  # takes overrides
        from data.prepare import load_options

        load_options(words[3:])
        return
    help_text = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert all(option in help_text for option in options)


def test_the_example_estimator_works_as_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "first_rows.py"
    source.write_text(code_block("python", "class FirstRows"))
    monkeypatch.syspath_prepend(tmp_path)
    from first_rows import FirstRows

    monkeypatch.setitem(basis.estimators.ESTIMATORS, "first_rows", FirstRows)
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        values = compose("config")
    values.method = OmegaConf.create(code_block("yaml", "name: first_rows"))
    estimator = make_estimator(load(values).method)
    assert estimator == FirstRows(rows=8)
    values.method.rows = 0
    with pytest.raises(ValueError, match=r"method\.rows=0: must be at least 1"):
        load(values)
    model = nn.Sequential(nn.Linear(4, 3))
    basis.convert(model, FirstRows(rows=2))
    x = torch.randn(6, 4)
    model(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, 3 * x[:2].sum(0).expand(3, 4))


def test_the_library_example_runs() -> None:
    from models import GPT, GPTConfig

    model = GPT(GPTConfig(vocab_size=11, block_size=8))
    exec(code_block("python", "basis.convert(model"), {"model": model})
    assert not list(basis.sketched_layers(model))
