"""How near to the limit is what a method keeps of X? Distortion against the Gaussian
rate-distortion bound, layer by layer.

The program is experiments/rate_distortion/run.py; this is the command that starts it.
"""

import sys

from experiments.rate_distortion.run import main

if __name__ == "__main__":
    sys.exit(main())
