"""README and docs/: their commands, examples, links and numbers are tried as they stand there."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from composed import composed
from tiny import overrides, run_command

import basis
from data.prepare import load_options
from experiments.arena import headline
from harness.compose import load

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in
         [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}  # fmt: skip
COMMANDS = [
    pytest.param(command, id=f"{page}: {command[:60]}")
    for page, text in PAGES.items()
    for command in dict.fromkeys(
        re.findall(r"`(python [^`]+)`", text) + re.findall(r"^ {4}(python .+)$", text, re.MULTILINE)
    )
    if "first_rows" not in command  # of the method that the page adds: tried below
]


def code_block(page: str, language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)
    return next(block for block in blocks if containing in block)


def folder_of_a_model(folder: Path) -> Path:
    """What is read of a model before its weights are."""
    pytest.importorskip("transformers")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def without_sweep(override: str) -> str:
    """A sweep's first cell: "seed=0,1,2" -> "seed=0"."""
    return re.sub(r"(=[^,\[\]]*),[^\[\]]*$", r"\1", override)


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 40
    assert all(PAGES.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes_or_knows_its_options(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if "my-llama" in command:
        command = command.replace("my-llama", str(folder_of_a_model(tmp_path)))
    if "hydra/launcher=ray" in command:
        pytest.importorskip("hydra_plugins.hydra_ray_launcher")  # has an environment of its own
    words = shlex.split(command)[1:]
    if words[0] in ("train.py", "eval.py"):
        given = [without_sweep(word) for word in words[1:] if word not in ("-m", "--help")]
        values = composed(*given, name="config" if words[0] == "train.py" else "eval")
        if words[0] == "train.py":
            load(values)
        return
    if words[:2] == ["-m", "data.prepare"]:
        load_options(words[2:])
        return
    name = words[1] if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert ended.value.code == 0
    help_text = capsys.readouterr().out
    assert all(word in help_text for word in words if word.startswith("--"))


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {name for text in PAGES.values() for name in re.findall(r"\bmake ([a-z-]+)`", text)}
    assert named >= {"demo", "test", "lint", "results"}
    assert named <= set(targets)


def test_the_api_reference_is_current() -> None:
    from scripts import api

    assert PAGES["docs/api.md"] == api.page(), "run: python -m scripts.api"
    for name in basis.__all__:
        assert f"## basis.{name}\n" in PAGES["docs/api.md"]


def test_what_an_index_shows_links_to_no_file() -> None:
    text = PAGES["docs/package.md"]
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert set(re.findall(r"basis\.(\w+)\(", text)) <= set(basis.__all__)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    text = re.sub(r"`[^`]*`", "", PAGES[page])
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if not link.startswith("http")
               and not (ROOT / page).parent.joinpath(link).exists()]  # fmt: skip
    assert not missing


def test_the_readme_says_the_numbers_of_the_arena() -> None:
    """Each "mean ± half width" of the README's table stands in the ranking it was taken from."""
    report = json.loads((ROOT / headline.RANKING).read_text())
    ranked = {
        f"{row['above']['mean']:+.3f} ± {row['above']['half_width']:.3f}"
        for row in report["tables"]["arena"]["rows"]
        if row["above"] and row["above"]["half_width"] is not None
    }
    table = PAGES["README.md"].partition("| loss above exact")[2].partition("\n\n")[0]
    said = set(re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3}", table))
    assert len(said) == 8
    assert said <= ranked


def test_the_readme_figure_is_drawn_from_the_ranking(tmp_path: Path) -> None:
    report = json.loads((ROOT / headline.RANKING).read_text())
    found = headline.points(report)
    assert [round(1 / row["share"]) for row in found["quantized"]] == [24, 8, 4]
    assert all("center=True" not in row["method"] for row in found["basis"])
    assert headline.main(["--out", str(tmp_path / "figure.svg")]) == 0
    drawn = (tmp_path / "figure.svg").read_text()
    assert drawn == (ROOT / headline.FIGURE).read_text()
    with pytest.raises(ValueError, match="arena=true"):
        headline.points({"tables": {}})


@pytest.mark.parametrize(
    ("page", "containing"),
    [
        ("README.md", "train_step"),
        ("docs/package.md", "train_step"),
        ("docs/library.md", "basis.BalancedSketch"),
    ],
)
def test_the_library_examples_run(page: str, containing: str) -> None:
    import torch

    from models import GPT, GPTConfig

    model = GPT(GPTConfig(vocab_size=11, block_size=8))
    plain = {name: type(module) for name, module in model.named_modules()}
    tokens = torch.randint(0, 11, (2, 9))
    changed: list[int] = []

    def train_step(model: GPT, batch: Any) -> None:
        changed.append(len(list(basis.sketched_layers(model))))
        model(batch[:, :-1], batch[:, 1:]).backward()

    exec(
        code_block(page, "python", containing),
        {"model": model, "batches": [tokens], "train_step": train_step},
    )
    if containing == "train_step":
        assert changed[0] > 0
        assert {name: type(module) for name, module in model.named_modules()} == plain
    else:
        assert list(basis.sketched_layers(model))


def test_the_accumulation_example_is_one_batch() -> None:
    import torch

    torch.manual_seed(0)
    body, head = torch.nn.Embedding(11, 4), torch.nn.Linear(4, 11)
    tokens, targets = torch.randint(0, 11, (2, 4, 6))
    targets[0, :5] = targets[2, 1] = -100
    parts = list(zip(tokens, targets, strict=True))
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], 0.0)
    names = {"basis": basis, "micro_batches": parts, "body": body, "head": head}
    exec(code_block("docs/library.md", "python", "micro_batches"), names | {"optimizer": optimizer})
    loss = torch.nn.functional.cross_entropy(head(body(tokens)).flatten(0, 1), targets.flatten())
    wanted = torch.autograd.grad(loss, list(head.parameters()))
    torch.testing.assert_close(tuple(p.grad for p in head.parameters()), wanted)


def after(text: str, line: str, new: str) -> str:
    assert text.count(line) == 1
    return text.replace(line, line + new)


@pytest.mark.slow
def test_the_example_method_works_as_written(data: Path, tmp_path: Path) -> None:
    """In a copy of the project: what the page says, letter by letter, then its tests and a run."""
    page = "docs/adding_a_method.md"
    copy = tmp_path / "house"
    ignored = shutil.ignore_patterns("__pycache__", "results", "runs", ".*")
    shutil.copytree(ROOT, copy, ignore=ignored)
    method = code_block(page, "python", "class FirstRows")
    (copy / "basis/estimators/first_rows.py").write_text(method)
    (copy / "conf/method/first_rows.yaml").write_text(code_block(page, "yaml", "name: first_rows"))
    lines = {part.strip("`") for part in re.findall(r"`[^`]*first_rows[^`]*,`", PAGES[page])}
    entry, case = '"first_rows": FirstRows,', 'basis.estimators.ESTIMATORS["first_rows"](6),'
    assert lines == {entry, case}
    registry = copy / "basis/estimators/__init__.py"
    tests = copy / "tests/basis/test_estimators.py"
    text = after(
        registry.read_text(),
        "from basis.estimators.exact import Exact\n",
        "from basis.estimators.first_rows import FirstRows\n",
    )
    registry.write_text(after(text, '    "exact": Exact,\n', f"    {entry}\n"))
    tests.write_text(after(tests.read_text(), "METHODS = [\n", f"    {case}\n"))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return run_command([sys.executable, *words], copy, PYTHONPATH=str(copy))

    chosen = ["tests/basis/test_estimators.py", "-k", "FirstRows or first_rows"]
    tested = run("-m", "pytest", "-n0", *chosen)
    assert tested.returncode == 0, tested.stdout
    assert int(re.findall(r"(\d+) passed", tested.stdout)[0]) >= 7, tested.stdout
    train = ["train.py", *overrides(data), "method=first_rows", "steps=2", "optim.warmup_steps=0"]
    done = run(*train, "method.budget=1/8", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout
    assert "0.1250" in done.stdout  # of the inputs
    refused = run(*train, "method.rows=0", f"hydra.run.dir={tmp_path / 'refused'}")
    assert "method.rows=0: must be at least 1" in refused.stdout
    words = ["--dry-run", "--methods", "first_rows", "--budgets", "1/8", "--"]
    arena = run("scripts/arena.py", *words, *overrides(data), "optim.warmup_steps=0")
    assert "first_rows 1/8: best rate of" in arena.stdout, arena.stdout
