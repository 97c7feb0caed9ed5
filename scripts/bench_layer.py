"""One dense layer, forward and backward: exact, BASIS at several R, and the limit that no estimator
of dW can beat.

The program is bench/bench_layer.py; this is the command that starts it.
"""

import sys

from bench.bench_layer import main

if __name__ == "__main__":
    sys.exit(main())
