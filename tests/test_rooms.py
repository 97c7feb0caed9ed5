"""Which room may import which: the map of the house, read from the imports of every file.

    train.py eval.py scripts/ > experiments/ > bench/ > report/ > harness/ > models/ data/
                              > basis/ conf/

A room imports from rooms to its right only. bench/ stands between experiments/ and report/: its
programs print tables of report/, and experiments take its clock and its plan of a step's bytes.
"""

import ast
import functools
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "basis": 0,
    "conf": 0,
    "data": 1,
    "models": 1,
    "harness": 2,
    "report": 3,
    "bench": 4,
    "experiments": 5,
    "scripts": 6,
    "train": 6,
    "eval": 6,
}
EDGES = {"hydra", "omegaconf", "wandb", "datasets", "conf"}
"""What a lower room may import in a function at most, so that it works without these packages."""


def files(room: str) -> list[Path]:
    single = ROOT / f"{room}.py"
    return [single] if single.exists() else sorted((ROOT / room).rglob("*.py"))


def imports(tree: ast.AST, *, module_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports. module_level: only those that importing the file imports,
    so neither in functions nor under TYPE_CHECKING.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the room"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif module_level and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            continue
        else:
            yield from imports(node, module_level=module_level)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def names(path: Path, *, module_level: bool = False) -> set[str]:
    return set(imports(parsed(path), module_level=module_level))


def upward(room: str, imported: set[str]) -> list[str]:
    """Those imports of a file in `room` that are not of a lower floor or of the room itself."""
    others = [name for name in imported if name.split(".")[0] in FLOORS.keys() - {room}]
    return sorted(name for name in others if FLOORS[name.split(".")[0]] >= FLOORS[room])


def test_every_folder_with_code_is_on_the_map() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert found | {"train", "eval"} == set(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_imports_go_down(room: str) -> None:
    wrong = {str(path.relative_to(ROOT)): upward(room, names(path)) for path in files(room)}
    assert {path: found for path, found in wrong.items() if found} == {}


def test_an_arrow_that_is_turned_is_found() -> None:
    tree = ast.parse("def f():\n    from experiments.arena import plan\nimport report.tables")
    assert upward("report", set(imports(tree))) == ["experiments.arena.plan"]
    assert upward("data", {"models.gpt"}) == ["models.gpt"]  # the same floor
    assert upward("bench", {"report.tables", "bench.step", "numpy.random"}) == []
    assert set(imports(tree, module_level=True)) == {"report.tables"}


def test_no_study_imports_another() -> None:
    """experiments/sections.py alone knows several: it is the list that eval.py hands in."""
    for path in files("experiments"):
        if path.parent == ROOT / "experiments":
            continue
        study = path.relative_to(ROOT / "experiments").parts[0]
        of_studies = [name for name in names(path) if name.startswith("experiments.")]
        assert all(name.split(".")[1] == study for name in of_studies), (path, of_studies)


def test_a_wheel_has_all_of_the_library() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    folders = {path.parent.relative_to(ROOT) for path in files("basis")}
    assert sorted(packages) == sorted(".".join(folder.parts) for folder in folders)


def test_the_library_needs_torch_alone() -> None:
    """Triton is there where kernels run: the files in basis/ops/triton need it, and no other file
    needs them.
    """
    allowed = {"torch", "basis", *sys.stdlib_module_names}
    for path in files("basis"):
        imported = names(path, module_level=True)
        kernels = {"triton"} if path.parent == ROOT / "basis/ops/triton" else set()
        found = {name.split(".")[0] for name in imported}
        assert found <= allowed | kernels, (path, found - allowed)
        assert kernels or not any("ops.triton" in name for name in imported), path


@pytest.mark.parametrize("room", ["basis", "models", "data"])
def test_lower_rooms_import_no_package_of_the_edges(room: str) -> None:
    for path in files(room):
        found = {name.split(".")[0] for name in names(path, module_level=True)}
        assert not found & EDGES, path


def test_nothing_imports_the_compiler_before_it_is_asked_for() -> None:
    for room in FLOORS:
        for path in files(room):
            found = names(path, module_level=True)
            assert not any(name.startswith("torch._dynamo") for name in found), path


def code_lines(path: Path) -> int:
    """Lines with code on them: no blank lines, comments or docstrings."""
    tree = parsed(path)
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and is_text(n.value)]
    prose = {line for n in texts for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)}
    lines = enumerate(path.read_text().splitlines(), start=1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in prose
        for number, line in lines
    )


def is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def test_no_room_outgrows_the_house() -> None:
    """Each folder is a room: a study, the estimators, the mechanism on top of basis/."""
    lines: Counter[Path] = Counter()
    for path in (path for floor in FLOORS for path in files(floor)):
        lines[path.parent.relative_to(ROOT)] += code_lines(path)
    assert {str(room): n for room, n in lines.items() if n > lines.total() / 4} == {}
    assert lines[Path("basis/estimators")] > 0  # folders in folders are counted
    for room in (ROOT / "harness", ROOT / "harness/folder"):
        assert len([path for path in room.glob("*.py") if path.name != "__init__.py"]) <= 30


def test_a_module_is_read_in_one_sitting() -> None:
    lengths = {path: len(path.read_text().splitlines()) for r in FLOORS for path in files(r)}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 350} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "basis/ops").rglob("*.py")), ids=lambda p: p.stem)
def test_the_mathematics_of_basis_knows_no_layer_and_no_method(path: Path) -> None:
    own = {name for name in names(path) if name.split(".")[0] == "basis"}
    assert {name for name in own if not name.startswith("basis.ops.")} == set()
