"""Rebuild the tables and figures of results/ from what is kept there, and compare.

The program is report/kept.py; this is the command that starts it.
"""

import sys

from report.kept import main

if __name__ == "__main__":
    sys.exit(main())
