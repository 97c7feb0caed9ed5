"""The API reference, docs/api.md, written from the docstrings of the library.

python -m scripts.api            writes it
python -m scripts.api --check    says whether it is current, by its exit code
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import basis
import basis.diagnostics.adaptive_rank
import basis.diagnostics.budget
import basis.diagnostics.monitor
import basis.lean.boundary
import basis.linear

PAGE = Path(__file__).resolve().parents[1] / "docs/api.md"
DEEPER = (
    "basis.linear.SketchedLinear",
    "basis.linear.basis_linear",
    "basis.estimator.Estimator",
    "basis.embedding.tied_embedding",
    "basis.lean.boundary.Boundary",
    "basis.diagnostics.budget.within_budget",
    "basis.diagnostics.monitor.Monitor",
    "basis.diagnostics.adaptive_rank.AdaptiveRank",
)
HEADER = """# API reference

Written from the docstrings by `python -m scripts.api`. How the pieces fit: [the
library](library.md).
"""
SHAPES = """
Shape letters: B rows (tokens), N in_features, M out_features, R rank, V vocabulary.
"""


def annotated(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def shown(parameter: inspect.Parameter) -> str:
    text = str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
    if parameter.annotation is not parameter.empty:
        text += f": {annotated(parameter.annotation)}"
    return text if parameter.default is parameter.empty else f"{text} = {parameter.default!r}"


def signature_of(name: str, thing: Any) -> str:
    """As one would call it, a line for each parameter if one line is too short."""
    signature = inspect.signature(thing)
    parts: list[str] = []
    for parameter in [p for p in signature.parameters.values() if p.name != "self"]:
        starred = any(part.startswith("*") for part in parts)
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
        parts.append(shown(parameter))
    returned = signature.return_annotation
    arrow = (
        ""
        if returned is signature.empty or inspect.isclass(thing)
        else f" -> {annotated(returned)}"
    )
    line = f"{name}({', '.join(parts)}){arrow}"
    if len(line) <= 96:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){arrow}"])


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods that a class itself has a docstring for."""
    for name, value in vars(kind).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield name, getattr(kind, name)


def entry(path: str, thing: Any) -> Iterator[str]:
    """Signature and docstring; one level down, where classes are for those who build on them, those
    of methods too.
    """
    name = path.rpartition(".")[2]
    yield f"## {path}"
    yield f"```python\n{signature_of(name, thing)}\n```"
    yield inspect.getdoc(thing) or ""
    if inspect.isclass(thing) and path in DEEPER:
        for method, function in members(thing):
            yield f"### {name}.{method}"
            yield f"```python\n{signature_of(method, function)}\n```"
            yield inspect.getdoc(function) or ""


def found_at(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules[module], name)


def page() -> str:
    """The reference as text."""
    paths = [f"basis.{name}" for name in basis.__all__]
    functions = [path for path in paths if not inspect.isclass(found_at(path))]
    classes = [path for path in paths if inspect.isclass(found_at(path))]
    parts = [HEADER.strip(), SHAPES.strip()]
    for path in (*functions, *classes, *DEEPER):
        parts.extend(part for part in entry(path, found_at(path)) if part)
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is old")
    options = parser.parse_args(arguments)
    current = page()
    if options.check:
        return int(PAGE.read_text() != current)
    PAGE.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
