"""What a run needs around its loop: typed configuration, a run directory, checkpoints, metrics,
memory, a tracker.

Nothing here knows how a gradient is estimated, and neither `basis/` nor `models/` imports anything
from here. Each module is one service that `train.py` calls by name, so that the loop itself stays
readable on one screen. Importing the package imports nothing: the modules bring in torch, hydra or
wandb themselves, where they need them.
"""
