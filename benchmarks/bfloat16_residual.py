"""
Train with train_gpt2.py, but with the residual stream in bfloat16. Takes the flags of
train_gpt2.py.

    python benchmarks/bfloat16_residual.py --data_dir edu_fineweb10B --log_dir log_bfloat16_residual

The embeddings are converted to bfloat16 once, and every block adds to them in bfloat16. That saves
a fifth of the memory traffic of a step on a GPU. bench_recipe.py --bfloat16_residual compares the
validation loss with the usual one.
"""

from bench_step import ToBFloat16

import train_gpt2


class GPT(train_gpt2.GPT):
    """GPT-2 with a residual stream in bfloat16."""

    def __init__(self, config):
        super().__init__(config)
        self.drop = ToBFloat16()  # dropout is 0 in pre-training


def main():
    train_gpt2.GPT = GPT
    train_gpt2.main()


if __name__ == "__main__":
    train_gpt2.run(main)
