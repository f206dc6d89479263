"""
Train with train_gpt2.py, but with the residual stream in bfloat16. Takes the flags of train_gpt2.py.

    python benchmarks/gpu/bfloat16_residual.py --data_dir edu_fineweb10B --log_dir log_bfloat16_residual

The embeddings are converted to bfloat16 once, and every block adds to them in bfloat16. That saves a fifth of the
memory traffic of a step on a GPU. recipe.py compares the validation loss with that of the usual run.
"""

import gpu_common  # noqa: F401 (makes the scripts importable)
from bench_step import ToBFloat16

import train_gpt2

init = train_gpt2.GPT.__init__


def init_with_conversion(self, config):
    """Stand in for GPT.__init__."""
    init(self, config)
    self.drop = ToBFloat16()  # dropout is 0 in pre-training


def main():
    train_gpt2.GPT.__init__ = init_with_conversion
    train_gpt2.run_rank()


if __name__ == "__main__":
    train_gpt2.run_script(main)
