"""Say how far runs are: finished, diverged, failed and why, interrupted, running, waiting.

    python scripts/status.py runs                    # all runs in or below a folder
    python scripts/status.py runs/a runs/b

`train.py -m` prints the same table of its cells when it ends. `runs=FOLDER`, as for eval.py, is
understood too. What the words mean: harness/folder/status.py. Exit code 1 if a folder does not
exist.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import terminal
from harness.folder import status


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of the folders in `argv`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", help="folders of runs, or of sweeps")
    arguments = parser.parse_args(argv)
    try:
        rows = status.of_folders(Path(name.removeprefix("runs=")) for name in arguments.folders)
        print(status.table(rows), flush=True)
    except (ValueError, OSError) as error:
        print(f"status.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    terminal.attach()
    sys.exit(main())
