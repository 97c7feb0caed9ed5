"""Which source the options name, and what each of them holds out for validation.

data.source      module               held out
shakespeare      data/shakespeare.py  whole works
tinyshakespeare  data/shakespeare.py  the last 10 % of the characters
hub              data/hub.py          documents, by the hash of their text
text             data/files.py        the last part of a .txt, rows of .jsonl and .parquet by the hash of their text
"""

from pathlib import Path

from data.documents import Source
from data.files import Text
from data.hub import Hub
from data.options import DataOptions
from data.shakespeare import Shakespeare, TinyShakespeare


def make_source(options: DataOptions) -> Source:
    """The source that the options name. Raises ValueError if `data.path` does not hold what it
    should.
    """
    path = None if options.path is None else Path(options.path).expanduser().absolute()
    if path is not None and not path.exists():
        raise ValueError(f"data.path={options.path!r}: no such file or folder")
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
