"""An MLP on images by exact backpropagation, EMA sketches, BASIS and a tracked subspace: accuracy,
bytes, rank over time.

The program is experiments/ema/mlp_digits.py; this is the command that starts it.
"""

import sys

from experiments.ema.mlp_digits import main

if __name__ == "__main__":
    sys.exit(main())
