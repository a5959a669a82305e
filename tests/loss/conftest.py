"""One thread: the cases are tiny, and other suites want the cores."""

import torch

torch.set_num_threads(1)
