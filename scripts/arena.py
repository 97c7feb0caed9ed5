"""One command: the same GPT by every method at the same kept bytes, beside fair baselines, with
tuned rates and seeds.

The program is experiments/arena/run.py; this is the command that starts it.
"""

import sys

from experiments.arena.run import main

if __name__ == "__main__":
    sys.exit(main())
