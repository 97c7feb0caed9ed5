"""The README's commands and its example are tried as they stand there."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from tiny import overrides, run_command

import basis
from harness.config import load

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\| `(python [^`]+)`", README, re.MULTILINE)


def code_block(language: str, containing: str) -> str:
    return next(
        block
        for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
        if containing in block
    )


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("python train.py") and "--help" not in c]
)
def test_training_commands_compose_to_a_valid_configuration(command: str) -> None:
    overrides = [word for word in shlex.split(command)[2:] if word != "-m"]
    first_of_each = [
        re.sub(r"(=[^,\[\]]*),[^\[\]]*$", r"\1", override) for override in overrides
    ]  # a sweep's first cell
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        load(compose("config", overrides=first_of_each))


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if not c.startswith("python train.py") or "--help" in c]
)
def test_other_commands_know_their_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)
    options = {word for word in words if word.startswith("--")} - {"--help"}
    program = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
    if program == "data.prepare":  # takes overrides
        from data.prepare import load_options

        load_options(words[3:])
    elif program == "eval":
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
            compose("eval", overrides=words[2:])
    elif program == "train":  # Hydra answers --help, and leaves the process
        done = run_command([sys.executable, *words[1:]], ROOT)
        assert done.returncode == 0, done.stdout
        assert "== Config ==" in done.stdout
    else:
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(program).main(["--help"])
        assert ended.value.code == 0
        help_text = capsys.readouterr().out
        assert all(option in help_text for option in options)


def after(text: str, line: str, new: str) -> str:
    assert text.count(line) == 1
    return text.replace(line, line + new)


@pytest.mark.slow
def test_the_example_estimator_works_as_written(data: Path, tmp_path: Path) -> None:
    """In a copy of the house: what the README says, letter by letter, then its tests, a run and the
    arena's plan.
    """
    copy = tmp_path / "house"
    ignored = shutil.ignore_patterns("__pycache__", "results", "runs", ".*")
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / "basis/estimators/first_rows.py").write_text(code_block("python", "class FirstRows"))
    (copy / "conf/method/first_rows.yaml").write_text(code_block("yaml", "name: first_rows"))
    lines = {part.strip("`") for part in re.findall(r"`[^`]*first_rows[^`]*,`", README)}
    assert lines == {'"first_rows": FirstRows,', 'basis.estimators.ESTIMATORS["first_rows"](6),'}
    registry, tests = copy / "basis/estimators/__init__.py", copy / "tests/basis/test_estimators.py"
    text = after(
        registry.read_text(),
        "from basis.estimators.exact import Exact\n",
        "from basis.estimators.first_rows import FirstRows\n",
    )
    registry.write_text(after(text, '    "exact": Exact,\n', '    "first_rows": FirstRows,\n'))
    tests.write_text(
        after(
            tests.read_text(),
            "METHODS = [\n",
            '    basis.estimators.ESTIMATORS["first_rows"](6),\n',
        )
    )

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return run_command([sys.executable, *words], copy, PYTHONPATH=str(copy))

    tested = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/basis/test_estimators.py",
        "-k",
        "FirstRows or first_rows",
    )
    assert tested.returncode == 0, tested.stdout
    assert tested.stdout.startswith("." * 7), (
        tested.stdout
    )  # the options agree, and what every method must do
    train = ["train.py", *overrides(data), "method=first_rows", "steps=2", "optim.warmup_steps=0"]
    done = run(*train, "method.budget=1/8", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout
    assert "0.1250" in done.stdout  # of the inputs
    refused = run(*train, "method.rows=0", f"hydra.run.dir={tmp_path / 'refused'}")
    assert "method.rows=0: must be at least 1" in refused.stdout
    plan = [
        "--dry-run",
        "--methods",
        "first_rows",
        "--budgets",
        "1/8",
        "--",
        *overrides(data),
        "optim.warmup_steps=0",
    ]
    arena = run("scripts/arena.py", *plan)
    assert "first_rows 1/8: best rate of" in arena.stdout, arena.stdout


def test_the_library_example_runs() -> None:
    from models import GPT, GPTConfig

    model = GPT(GPTConfig(vocab_size=11, block_size=8))
    exec(code_block("python", "basis.convert(model"), {"model": model})
    assert not list(basis.sketched_layers(model))
