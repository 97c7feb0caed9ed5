"""What every program that measures does with its table: print it, and write it if asked to."""

from __future__ import annotations

import argparse
from pathlib import Path

from report.tables import Table


def csv_option(parser: argparse.ArgumentParser) -> None:
    """Add --csv, a path for `show`."""
    parser.add_argument(
        "--csv", type=Path, help="also write the table there, and the same as .md next to it"
    )


def show(table: Table, csv: Path | None) -> None:
    """Print the table as Markdown; unless `csv` is None, write it there, and as .md next to it."""
    print(table.markdown())
    if csv:
        table.write(csv)
