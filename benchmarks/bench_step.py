"""
Compare a training step of train_gpt2.py's GPT-2 124M with transformers' GPT2LMHeadModel.

    python benchmarks/bench_step.py                            # two CPU cores: B=4, T=256, float32; 3 minutes
    python benchmarks/bench_step.py --dtype bfloat16           # the same under bfloat16 autocast
    python benchmarks/bench_step.py --only "ours" "ours, float32"
    python benchmarks/bench_step.py --device cuda --dtype bfloat16 --micro_batch_size 32 --block_size 1024

A step is forward and backward of each micro-batch, clipping, and fused AdamW, on random tokens. transformers computes
its own loss. The contestants take turns in one process, so that a machine that slows down slows all of them. Prints
tokens/s, the ratio to the peer round by round, the fraction of the matmul speed measured between the rounds (6 N + 12
n_layer n_embd T FLOPs per token), and on a GPU the peak memory. The variants behind a comma change one thing: "float32"
computes without autocast, "plain loss" computes the loss of all rows at once, "plain attention" stores all scores,
"bfloat16 residual" keeps the residual stream in bfloat16.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from common import HEADER, failed_row, machine_name, matmul_peak, row, synchronize

import train_gpt2

PEERS = {  # what each contestant is compared with
    "transformers": None,
    "transformers compiled": "transformers",
    "ours": "transformers",
    "ours compiled": "transformers compiled",
    "ours, float32": "ours",
    "ours, plain loss": "ours",
    "ours, plain attention": "ours",
    "ours, bfloat16 residual": "ours",
    "ours compiled, bfloat16 residual": "ours compiled",
}


def plain_cross_entropy(logits, targets):
    """Compute the loss of all rows at once."""
    return F.cross_entropy(logits.float(), targets)


def plain_attention(q, k, v, dropout_p, is_causal):
    """Compute F.scaled_dot_product_attention with all scores in memory."""
    T, hs = q.shape[2:]
    is_future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / math.sqrt(hs)).masked_fill(is_future, -math.inf)  # (B, nh, T, T)
    return scores.softmax(dim=-1) @ v


class ToBFloat16(torch.nn.Module):
    """Convert the embeddings to bfloat16, so that the residual stream stays in bfloat16."""

    def forward(self, x):
        return x.bfloat16()


class Contestant:
    """A model with its optimizer, and one way to compute its step."""

    def __init__(self, name, args):
        self.name = name
        self.args = args
        kind, _, self.variant = name.partition(", ")
        dtype = getattr(torch, "float32" if self.variant == "float32" else args.dtype)
        self.autocast = torch.autocast(args.device, dtype) if dtype != torch.float32 else nullcontext()
        torch.manual_seed(0)
        self.tokens = torch.randint(50257, (args.micro_batch_size, args.block_size + 1), device=args.device)
        self.is_ours = kind.startswith("ours")
        self.model = self.make_ours() if self.is_ours else self.make_theirs()
        self.model.to(args.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.run = torch.compile(self.model) if kind.endswith("compiled") else self.model

    def make_ours(self):
        shape = {name: getattr(self.args, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
        model = train_gpt2.GPT(train_gpt2.GPTConfig(**shape))
        if self.variant == "bfloat16 residual":
            model.drop = ToBFloat16()
        return model

    def make_theirs(self):
        import transformers  # imported here because it is slow

        args = self.args
        config = transformers.GPT2Config(
            n_layer=args.n_layer,
            n_head=args.n_head,
            n_embd=args.n_embd,
            n_positions=args.block_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return transformers.GPT2LMHeadModel(config)

    def loss(self):
        """Compute the loss of a micro-batch."""
        x, y = self.tokens[:, :-1], self.tokens[:, 1:]
        if self.is_ours:
            return self.run(x, y)[1]
        return self.run(x, labels=x).loss  # it shifts the labels itself

    def step(self):
        """Make an optimizer step. Returns the seconds it took."""
        originals = train_gpt2.cross_entropy, F.scaled_dot_product_attention
        if self.variant == "plain loss":
            train_gpt2.cross_entropy = plain_cross_entropy
        if self.variant == "plain attention":
            F.scaled_dot_product_attention = plain_attention
        start = time.perf_counter()
        for _ in range(self.args.grad_accum_steps):
            with self.autocast:
                loss = self.loss() / self.args.grad_accum_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.args.device)
        seconds = time.perf_counter() - start
        train_gpt2.cross_entropy, F.scaled_dot_product_attention = originals
        self.last_loss = loss.item()
        return seconds


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--n_layer", type=int, default=12, help="number of blocks (default: 12)")
    add("--n_head", type=int, default=12, help="attention heads per block (default: 12)")
    add("--n_embd", type=int, default=768, help="channels (default: 768)")
    add("--micro_batch_size", type=int, default=4, help="sequences per forward pass (default: 4)")
    add("--block_size", type=int, default=256, help="tokens per sequence (default: 256)")
    add("--grad_accum_steps", type=int, default=1, help="micro-batches per step (default: 1)")
    add("--steps", type=int, default=7, help="timed steps per contestant (default: 7)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="device (default: cpu)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="autocast (default: float32)")
    usual = ["ours", "ours compiled"]
    add("--only", nargs="+", choices=list(PEERS), default=usual, metavar="CONTESTANT", help=f"(default: {usual})")
    return parser.parse_args()


def prepare(names, args):
    """Return ({name: contestant after its first step}, {name: seconds of it}, {name: reason of a failure})."""
    contestants, first, failed = {}, {}, {}
    for name in names:
        print(f"preparing {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            contestant = Contestant(name, args)
            contestant.step()
        except Exception as error:  # whatever it is, the others can still be measured
            failed[name] = f"{type(error).__name__}: {error}"
            gc.collect()
            continue
        contestants[name] = contestant
        first[name] = time.perf_counter() - start
    return contestants, first, failed


def main():
    args = parse_args()
    torch.set_float32_matmul_precision("high")
    wanted = {*args.only, *(PEERS[name] for name in args.only)}
    names = [name for name in PEERS if name in wanted]
    contestants, first, failed = prepare(names, args)

    # the contestants take turns, and the matmul peak is measured before each round
    seconds = {name: [] for name in contestants}
    peaks = []
    for _ in range(args.steps):
        peaks.append(matmul_peak(args.device, getattr(torch, args.dtype)))
        for name, contestant in contestants.items():
            seconds[name].append(contestant.step())

    # print a row for each contestant and its peer
    tokens = args.grad_accum_steps * args.micro_batch_size * args.block_size
    config = train_gpt2.GPTConfig(
        n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, block_size=args.block_size
    )
    with torch.device("meta"):
        num_params = train_gpt2.GPT(config).num_params
    flops = 6 * num_params + 12 * args.n_layer * args.n_embd * args.block_size  # per token
    peak = statistics.median(peaks)
    print(f"torch {torch.__version__}, {machine_name(args.device)}, {time.strftime('%Y-%m-%d')}")
    print(f"medians of {args.steps} steps of {tokens:,} tokens, matmul peak {peak / 1e12:.3g} TFLOP/s\n\n{HEADER}")
    speed, fraction = {}, {}
    for name, each in seconds.items():
        speed[name] = tokens / statistics.median(each)
        fraction[name] = speed[name] * flops / peak
    size = f"{num_params / 1e6:.0f}M, B={args.micro_batch_size}, T={args.block_size}, {args.dtype}"
    for name in names:
        task = f"training step, {size}: {name}"
        peer = PEERS[name]
        if name in failed:
            print(failed_row(task, failed[name]))
        elif peer in speed:
            ratios = [b / a for a, b in zip(seconds[name], seconds[peer], strict=True)]
            limit = (
                f"{fraction[name]:.0%} of the matmul peak (peer {fraction[peer]:.0%}), first step {first[name]:.0f} s"
            )
            print(row(task, f"{speed[name]:,.0f} tokens/s", f"{peer}: {speed[peer]:,.0f} tokens/s", ratios, limit))
        elif peer is not None:
            print(row(task, f"{speed[name]:,.0f} tokens/s", f"none: {peer} failed", [1.0], f"{fraction[name]:.0%}"))


if __name__ == "__main__":
    main()
