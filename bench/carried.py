"""What a GPU session carries to a machine without a network: the wheels that train.py and the tests
need beyond torch and numpy, the tokens, and the commit.

    wheels/     pure Python, but for PyYAML; unpacked beside the project and not installed
    cache/      prepared tokens, as data.cache_dir has them
    commit      of the clone that made it

Nothing here needs more than the standard library, so that it can come before everything else.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS, CACHE, COMMIT = "wheels", "cache", "commit"
PACKAGES = (
    *("hydra-core", "omegaconf", "PyYAML", "packaging", "tqdm", "filelock"),
    *("pytest", "pluggy", "iniconfig", "Pygments", "pytest-xdist", "execnet"),
)
SOURCES = ("antlr4-python3-runtime",)
"""Packages without a wheel in the index: they are built."""
MOST_BYTES = 60 * 2**20  # what a lender carries along may be limited


def pinned(names: tuple[str, ...]) -> list[str]:
    """`name==version` of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    versions = {line.partition("==")[0].lower(): line for line in lines if "==" in line}
    return [versions[name.lower()] for name in names]


def prepare(folder: Path, data: list[str], python: str) -> int:
    """Fill `folder`; returns the exit code. data: options of data.prepare. python: version of the
    GPU's interpreter, as "3.12".
    """
    folder = folder.resolve()
    wheels = folder / WHEELS
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    place = ["--no-deps", "--python-version", python, "--platform", "manylinux2014_x86_64"]
    run = [*pip, "download", *place, "--only-binary=:all:", "--dest", str(wheels)]
    subprocess.run([*run, *pinned(PACKAGES)], check=True)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), *pinned(SOURCES)], check=True
    )
    cache = folder / CACHE
    subprocess.run(
        [sys.executable, "-m", "data.prepare", *data, f"data.cache_dir={cache}"],
        cwd=ROOT,
        check=True,
    )
    shutil.rmtree(cache / "sources", ignore_errors=True)  # the text, which tokens stand for
    (folder / COMMIT).write_text(f"{commit(folder)}\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")
    if size > MOST_BYTES:
        print(f"more than {MOST_BYTES >> 20} MiB: give data.max_tokens", file=sys.stderr)
        return 1
    return 0


def unpack(wheels: Path, site: Path) -> Path | None:
    """A folder for PYTHONPATH with the wheels that this Python lacks, or None if there are none."""
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        try:
            importlib.metadata.version(name)
            continue  # the machine's own goes with what else it has
        except importlib.metadata.PackageNotFoundError:
            pass
        site.mkdir(parents=True, exist_ok=True)
        if not (site / f"{name}-{version}.dist-info").exists():
            with zipfile.ZipFile(wheel) as file:
                file.extractall(site)
    return site if site.exists() else None


def commit(folder: Path) -> str:
    """Of this clone; where it has no git, that of the clone which prepared `folder`."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        written = folder / COMMIT
        return f"{written.read_text().strip()} (prepared)" if written.exists() else "unknown"
