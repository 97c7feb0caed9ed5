"""What all tests share: two threads, as in the commands that are tested, and no network for libraries that would try."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))
