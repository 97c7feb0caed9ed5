"""Does `basis.apply` keep the loss of every causal language model of transformers?

The program is experiments/every_family.py; this is the command that starts it.
"""

import sys

from experiments.every_family import main

if __name__ == "__main__":
    sys.exit(main())
