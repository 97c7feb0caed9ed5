"""Are the monitor's readings true? A small GPT is trained exactly, and beside each reading stands
the true value.

The program is experiments/monitor/check.py; this is the command that starts it.
"""

import sys

from experiments.monitor.check import main

if __name__ == "__main__":
    sys.exit(main())
