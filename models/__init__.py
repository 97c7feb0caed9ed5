"""Models: plain nn.Modules. They know nothing of sketching, checkpointing or Hydra; `basis.convert`
changes them outside.
"""

from models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
