"""What the harness costs: train.py against a bare PyTorch loop of the same model, method, data and
optimiser.

The program is bench/bench_loop.py; this is the command that starts it.
"""

import sys

from bench.bench_loop import main

if __name__ == "__main__":
    sys.exit(main())
