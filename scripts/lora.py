"""Does LoRA train as well on a fifth of what it keeps? Bytes and losses, with and without.

The program is experiments/lora.py; this is the command that starts it.
"""

import sys

from experiments.lora import main

if __name__ == "__main__":
    sys.exit(main())
