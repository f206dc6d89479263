"""
gpt.py's training step against the same model with one small matmul a head and a stored mask, the lecture's way.

    python benchmarks/bench_gpt.py                     # the "full" preset; about 5 minutes on two CPU cores
    python benchmarks/bench_gpt.py --preset cpu --steps 50

Prints the median seconds of each and the ratio of their speeds, taken step by step in turn. The lecture also
drops attention weights, which gpt.py does not: it is timed with and without that.
"""

import argparse
import os
import statistics
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import gpt  # noqa: E402

HEADER = "| what | here | peer | ratio (range) | of the limit |\n|---|---|---|---|---|"


class Head(nn.Module):
    """One head of attention with its own three projections and its own mask."""

    def __init__(self, config, weight_dropout):
        super().__init__()
        head_size = config.n_embd // config.n_head
        self.key = nn.Linear(config.n_embd, head_size, bias=False)
        self.query = nn.Linear(config.n_embd, head_size, bias=False)
        self.value = nn.Linear(config.n_embd, head_size, bias=False)
        self.register_buffer("mask", torch.ones(config.block_size, config.block_size).tril())
        self.dropout = nn.Dropout(weight_dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, hs)
        T = x.shape[1]
        k, q, v = self.key(x), self.query(x), self.value(x)  # each (B, T, hs)
        scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, T, T)
        scores = scores.masked_fill(self.mask[:T, :T] == 0, float("-inf"))
        return self.dropout(F.softmax(scores, dim=-1)) @ v


class OneByOne(nn.Module):
    """What gpt.MultiHeadAttention computes, head after head."""

    def __init__(self, config, weight_dropout):
        super().__init__()
        self.heads = nn.ModuleList(Head(config, weight_dropout) for _ in range(config.n_head))
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        return self.dropout(self.c_proj(torch.cat([head(x) for head in self.heads], dim=-1)))


def make_step(config, batch_size, device, weight_dropout):
    """A function that trains one step of gpt.GPT: as it is (weight_dropout None), or with the lecture's attention."""
    model = gpt.GPT(config)
    for block in model.h if weight_dropout is not None else []:
        block.attn = OneByOne(config, weight_dropout)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=weight_dropout is None)
    x = torch.randint(config.vocab_size, (batch_size, config.block_size), device=device)

    def step():
        _, loss = model(x, x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()  # waits for the device

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=list(gpt.PRESETS), default="full", help="gpt.py's preset (full)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (auto)")
    args = parser.parse_args()
    device = gpt.pick_device(args.device)
    torch.set_float32_matmul_precision("high")
    preset = gpt.PRESETS[args.preset]
    config = argparse.Namespace(**preset, vocab_size=65, d_ff=0, activation="relu")
    variants = {"gpt.py": None, "head by head": 0.0, "head by head, dropping weights": config.dropout}
    steps = {name: make_step(config, preset["batch_size"], device, dropout) for name, dropout in variants.items()}
    seconds = {name: [] for name in steps}
    for i in range(args.steps + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i:  # the first step of each warms up
                seconds[name].append(time.perf_counter() - start)
    print(f"torch {torch.__version__}, {device}, medians of {args.steps} steps\n\n{HEADER}")
    ours = seconds.pop("gpt.py")
    for name, theirs in seconds.items():
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        here, peer = f"{statistics.median(ours):.3f} s", f"{name} {statistics.median(theirs):.3f} s"
        print(f"| gpt.py's step, preset {args.preset} | {here} | {peer} | {ratio} | |")


if __name__ == "__main__":
    main()
