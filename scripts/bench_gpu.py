"""The GPU's tables in one command, with torch and numpy alone: a layer, the loss head, and GPT-2's
whole training step.

The program is bench/bench_gpu.py; this is the command that starts it.
"""

import sys

from bench.bench_gpu import main

if __name__ == "__main__":
    sys.exit(main())
