"""Text to batches: sources, tokenizers, token files on disk, and the order in which training reads
them.

    text --sources--> documents --tokenizers--> train.bin / val.bin --sampler--> batch(step)

This package's front door is its core, which needs torch and numpy alone: a `TokenFile` and the
`Sampler` that turns it into batches. Everything that touches a network, a hub or a tokenizer stands
behind `data.prepare` (`from data.prepare import DataOptions, prepare`, or `python -m data.prepare
data=shakespeare` on the command line) and imports its libraries when it is called, so a machine
that has only torch can still train on token files made elsewhere.
"""

from data.sampler import Sampler, ValidationWindows, validation_windows
from data.tokens import TokenFile, write_tokens

__all__ = ["Sampler", "TokenFile", "ValidationWindows", "validation_windows", "write_tokens"]
