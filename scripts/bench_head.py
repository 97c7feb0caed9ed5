"""The last layer and the loss, forward and backward: PyTorch's ways, the fused step of this
project, and that with a sketch.

The program is bench/bench_head.py; this is the command that starts it.
"""

import sys

from bench.bench_head import main

if __name__ == "__main__":
    sys.exit(main())
