"""Models: plain nn.Modules. They know nothing of sketching, checkpointing or Hydra; `basis.convert`
changes them outside.
"""

from models.base import LanguageModel
from models.config import ModelConfig
from models.gpt import GPT, GPTConfig
from models.llama import Llama

__all__ = ["GPT", "GPTConfig", "LanguageModel", "Llama", "ModelConfig", "build"]


def build(config: ModelConfig) -> LanguageModel:
    """The model of `config`, with weights from PyTorch's default generator."""
    return {"gpt": GPT, "llama": Llama}[config.family](config)
