"""What SUS attention adds to the variance of a trained model's gradient, against c and length; and
whether the formula holds.

The program is experiments/sus/variance.py; this is the command that starts it.
"""

import sys

from experiments.sus.variance import main

if __name__ == "__main__":
    sys.exit(main())
