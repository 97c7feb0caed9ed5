"""Models: plain nn.Modules. They know nothing of sketching, checkpointing or Hydra; `basis.convert`
changes them outside.
"""

from models.base import LanguageModel
from models.config import ModelConfig
from models.gpt import GPT, GPTConfig
from models.hf import HF
from models.llama import Llama

__all__ = ["GPT", "HF", "GPTConfig", "LanguageModel", "Llama", "ModelConfig", "build"]


def build(config: ModelConfig, *, weights: bool = True) -> LanguageModel:
    """The model of `config`, with weights from PyTorch's default generator; of hf those of its
    folder, unless `weights` is False, as where a state_dict is to be loaded.
    """
    if config.family == "hf":
        return HF(config, weights=weights)
    return {"gpt": GPT, "llama": Llama}[config.family](config)
