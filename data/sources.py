"""Which source the options name, and what each of them holds out for validation.

data.source      module               held out
shakespeare      data/shakespeare.py  whole works
tinyshakespeare  data/shakespeare.py  the last 10 % of the characters
hub              data/hub.py          documents, by the hash of their text
text             data/files.py        the last part of each .txt; rows by the hash of their text
"""

from pathlib import Path

from data.documents import Source
from data.files import Text
from data.hub import Hub
from data.options import DataOptions
from data.shakespeare import Shakespeare, TinyShakespeare


class MissingText(ValueError):
    """data.path names nothing that can be read here."""


def make_source(options: DataOptions) -> Source:
    """The source that the options name. Raises MissingText if there is nothing at `data.path`,
    ValueError if it does not hold what it should.
    """
    path = None if options.path is None else _existing(options.path)
    cache_dir, val_fraction = options.cache_path(), options.val_fraction
    if options.source == "shakespeare":
        return Shakespeare(path, cache_dir)
    assert val_fraction is not None  # DataOptions lets only shakespeare go without
    if options.source == "tinyshakespeare":
        return TinyShakespeare(path, cache_dir, val_fraction)
    if options.source == "hub":
        return Hub(options, path, val_fraction)
    assert path is not None  # DataOptions again
    return Text(path, val_fraction, options.text_column)


def _existing(given: str) -> Path:
    """data.path as an absolute path that exists."""
    try:
        path = Path(given).expanduser().absolute()
        found = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a folder closed to us, no home
        reason = error.strerror if isinstance(error, OSError) else error
        raise MissingText(f"data.path={given!r}: {reason}") from error
    if not found:
        raise MissingText(f"data.path={given!r}: no such file or folder")
    return path
