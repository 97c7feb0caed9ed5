"""A physics-informed network by exact backpropagation, EMA sketches, BASIS, a tracked subspace: L2
error, bytes, rank over time.

The program is experiments/ema/pinn.py; this is the command that starts it.
"""

import sys

from experiments.ema.pinn import main

if __name__ == "__main__":
    sys.exit(main())
