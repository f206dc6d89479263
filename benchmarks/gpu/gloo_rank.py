"""
Run train_gpt2.py as one of several ranks that share a GPU, with gloo in place of nccl, which refuses that.

check.py starts it. The environment has the variables of torchrun, except MASTER_PORT. The argument is a JSON file, a
list of runs {"port": ..., "flags": [...]}, one after the other.
"""

import json
import os
import sys

import gpu_common  # noqa: F401 (makes the scripts importable)
import torch
import torch.distributed as dist

import train_gpt2

init_process_group = dist.init_process_group


def init_gloo(backend, **options):
    """Stand in for init_process_group."""
    init_process_group("gloo", **options)


def main():
    dist.init_process_group = init_gloo
    with open(sys.argv[1], encoding="utf-8") as file:
        runs = json.load(file)
    for run in runs:
        os.environ["MASTER_PORT"] = str(run["port"])
        torch.compiler.reset()
        sys.argv = ["train_gpt2.py", *run["flags"]]
        train_gpt2.main()


if __name__ == "__main__":
    main()
