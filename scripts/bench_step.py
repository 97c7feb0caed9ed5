"""A whole training step: time, tokens per second, kept bytes and peak for each method and
activations, in turns.

The program is bench/bench_step.py; this is the command that starts it.
"""

import sys

from bench.bench_step import main

if __name__ == "__main__":
    sys.exit(main())
