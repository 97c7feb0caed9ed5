"""Plan a run that does not fit this machine: bytes by category and peak for each method and
activations, on fake tensors.

The program is bench/plan_memory.py; this is the command that starts it.
"""

import sys

from bench.plan_memory import main

if __name__ == "__main__":
    sys.exit(main())
