"""One causal attention, forward and backward, against its length: PyTorch's own, and SUS by
reference and by kept entries.

The program is experiments/sus/speed.py; this is the command that starts it.
"""

import sys

from experiments.sus.speed import main

if __name__ == "__main__":
    sys.exit(main())
