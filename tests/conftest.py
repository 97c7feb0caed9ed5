"""What all tests share: two threads, as in the commands that are tested, and no network for libraries that would try."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# The tests compare runs of this process with runs of its children to the last bit: all need the same number of threads.
os.environ["OMP_NUM_THREADS"] = "2"
os.environ["MKL_NUM_THREADS"] = "2"
