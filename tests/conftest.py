"""One thread a process: the tests share the machine with the ranks they start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
# torch asks for the name of every address that it connects to, and waits for servers that do not answer.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

import torch

torch.set_num_threads(1)
