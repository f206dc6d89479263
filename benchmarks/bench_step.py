"""
Compare a training step of train_gpt2.py's GPT-2 124M with transformers' GPT2LMHeadModel.

    python benchmarks/bench_step.py                   # two CPU cores, float32; 3 minutes
    python benchmarks/bench_step.py --dtype bfloat16
    python benchmarks/bench_step.py --dtype bfloat16 --only "ours" "ours, plain loss"
    python benchmarks/bench_step.py --device cuda --dtype bfloat16 --micro_batch_size 32 \\
        --block_size 1024 --grad_accum_steps 16 --only "transformers compiled" "ours compiled"

A step is forward and backward of each micro-batch, clipping, and fused AdamW, on random tokens.
transformers computes its own loss. The contestants take turns in one process, so that a machine
that slows down slows all of them. Prints tokens/s, the ratio to the peer round by round if the peer
is measured too, the fraction of the matmul speed measured between the rounds (6 N + 12 n_layer
n_embd T FLOPs per token), the seconds of the first step with compilation, and on a GPU the peak
memory. Compilation is never taken from torch.compile's caches. A name with a comma is a variant
that changes one thing: "float32" computes without autocast, "plain loss" computes the loss of all
rows at once, "plain attention" stores all scores, "flash attention" takes FlashAttention where
cuDNN's attention is the default, "bfloat16 residual" keeps the residual stream in bfloat16, and
"tuned" lets the compiler try more variants of each kernel. --profile prints to stderr what the time
of the last contestant goes into.
"""

import gc
import math
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from common import HEADER, environment, make_parser, matmul_peak, row, synchronize
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import train_gpt2


# -------------------------------------------------------------------------------------- variants
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


@dataclass
class Variant:
    """One way to compute the step."""

    peer: str | None = None  # the contestant that it is compared with
    is_ours: bool = True  # else transformers
    compile: bool = False
    options: dict = field(default_factory=dict)  # of torch.compile
    float32: bool = False  # no autocast
    bfloat16_residual: bool = False
    replaced: tuple = ()  # (module, name of a function, function in its place)
    attention: list = field(default_factory=list)  # allowed kernels; empty: PyTorch's choice


# Two models of equal structure are one program for torch.compile, unless their options differ: the
# second one would run the code of the first one, with the attention kernel of the first one.
OWN_CODE = {"fx_graph_cache": False}
PLAIN_LOSS = (train_gpt2, "cross_entropy", plain_cross_entropy)
PLAIN_ATTENTION = (F, "scaled_dot_product_attention", plain_attention)
VARIANTS = {
    "transformers": Variant(is_ours=False),
    "transformers compiled": Variant("transformers", is_ours=False, compile=True),
    "ours": Variant("transformers"),
    "ours compiled": Variant("transformers compiled", compile=True),
    "ours, float32": Variant("ours", float32=True),
    "ours, plain loss": Variant("ours", replaced=PLAIN_LOSS),
    "ours, plain attention": Variant("ours", replaced=PLAIN_ATTENTION),
    "ours, bfloat16 residual": Variant("ours", bfloat16_residual=True),
    "ours compiled, bfloat16 residual": Variant("ours compiled", compile=True, bfloat16_residual=True),
    "ours compiled, flash attention": Variant(
        "ours compiled", compile=True, options=OWN_CODE, attention=[SDPBackend.FLASH_ATTENTION]
    ),
    "ours compiled, tuned": Variant("ours compiled", compile=True, options={"coordinate_descent_tuning": True}),
}


class Contestant:
    """A model with its optimizer, and one way to compute its step."""

    def __init__(self, variant, args):
        self.variant = variant
        self.args = args
        self.autocast = nullcontext()
        if args.dtype != "float32" and not variant.float32:
            self.autocast = torch.autocast(args.device, getattr(torch, args.dtype))
        torch.manual_seed(0)
        shape = (args.micro_batch_size, args.block_size + 1)
        self.tokens = torch.randint(50257, shape, device=args.device)
        self.model = self.make_ours() if variant.is_ours else self.make_theirs()
        self.model.to(args.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.run = self.model
        if variant.compile:
            self.run = torch.compile(self.model, options=variant.options or None)

    def make_ours(self):
        """Return train_gpt2.py's model."""
        model = train_gpt2.GPT(make_config(self.args))
        if self.variant.bfloat16_residual:
            model.drop = ToBFloat16()
        return model

    def make_theirs(self):
        """Return transformers' model of the same shape."""
        import transformers  # imported here because it is slow

        config = transformers.GPT2Config(
            n_layer=self.args.n_layer,
            n_head=self.args.n_head,
            n_embd=self.args.n_embd,
            n_positions=self.args.block_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return transformers.GPT2LMHeadModel(config)

    def loss(self):
        """Compute the loss of a micro-batch."""
        x, y = self.tokens[:, :-1], self.tokens[:, 1:]
        kernels = nullcontext()
        if self.variant.attention:
            kernels = sdpa_kernel(self.variant.attention)
        with self.autocast, kernels:
            if self.variant.is_ours:
                return self.run(x, y)[1]
            return self.run(x, labels=x).loss  # it shifts the labels itself

    def step(self):
        """Make an optimizer step. Returns (seconds, loss before the step)."""
        # a replaced function is put back after the step
        if self.variant.replaced:
            module, name, function = self.variant.replaced
            original = getattr(module, name)
            setattr(module, name, function)
        start = time.perf_counter()
        # accumulate the gradients of all micro-batches
        for _ in range(self.args.grad_accum_steps):
            loss = self.loss()
            (loss / self.args.grad_accum_steps).backward()
        # clip and update
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.args.device)
        seconds = time.perf_counter() - start
        if self.variant.replaced:
            setattr(module, name, original)
        return seconds, loss.item()


def make_config(args):
    """Return train_gpt2.py's configuration of the model."""
    return train_gpt2.GPTConfig(
        n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, block_size=args.block_size
    )


# ------------------------------------------------------------------------------------ measuring
def prepare(names, args):
    """Make all contestants and their first steps, which compile.

    Returns ({name: contestant}, {name: text about its first step and memory},
    {name: reason of a failure}).
    """
    contestants, notes, failed = {}, {}, {}
    for name in names:
        print(f"preparing {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            contestant = Contestant(VARIANTS[name], args)
            contestant.step()
        except Exception as error:  # whatever it is, the others can still be measured
            failed[name] = f"{type(error).__name__}: {error}"
            gc.collect()
            continue
        contestants[name] = contestant
        notes[name] = f"first step {time.perf_counter() - start:.0f} s"
        if args.device == "cuda":
            notes[name] += f", {(torch.cuda.max_memory_allocated() - before) / 1e9:.1f} GB"
    return contestants, notes, failed


def print_profile(contestant):
    """Print the kernels that take the most time in a step to stderr."""
    activity, order = ProfilerActivity.CPU, "self_cpu_time_total"
    if contestant.args.device == "cuda":
        activity, order = ProfilerActivity.CUDA, "self_device_time_total"
    with profile(activities=[activity]) as profiler:
        contestant.step()
    table = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=100)
    print(table, file=sys.stderr)


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    dtypes = ["float32", "bfloat16", "float16"]
    names = list(VARIANTS)
    add("--n_layer", type=int, default=12, help="number of blocks")
    add("--n_head", type=int, default=12, help="attention heads per block")
    add("--n_embd", type=int, default=768, help="channels")
    add("--micro_batch_size", type=int, default=4, help="sequences per forward pass")
    add("--block_size", type=int, default=256, help="tokens per sequence")
    add("--grad_accum_steps", type=int, default=1, help="micro-batches per step")
    add("--steps", type=int, default=7, help="timed steps per contestant")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="device")
    add("--dtype", choices=dtypes, default="float32", help="dtype of autocast")
    add("--only", nargs="+", choices=names, default=names[:4], metavar="NAME", help=f"of {names}")
    add("--profile", action="store_true", help="print the kernels of the last contestant to stderr")
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_float32_matmul_precision("high")
    # the caches do not distinguish attention kernels
    torch.compiler.config.force_disable_caches = True
    names = [name for name in VARIANTS if name in args.only]
    contestants, notes, failed = prepare(names, args)

    # the contestants take turns, and the matmul peak is measured before each round
    seconds = {name: [] for name in contestants}
    peaks = []
    for _ in range(args.steps):
        peaks.append(matmul_peak(args.device, getattr(torch, args.dtype)))
        for name, contestant in contestants.items():
            seconds[name].append(contestant.step()[0])
    if args.profile:
        print_profile(list(contestants.values())[-1])

    # a row for each contestant
    tokens = args.grad_accum_steps * args.micro_batch_size * args.block_size
    with torch.device("meta"):
        num_params = train_gpt2.GPT(make_config(args)).num_params
    flops = 6 * num_params + 12 * args.n_layer * args.n_embd * args.block_size  # per token
    peak = statistics.median(peaks)
    print(environment(args.device))
    print(f"medians of {args.steps} steps of {tokens:,} tokens, ", end="")
    print(f"matmul peak {peak / 1e12:.3g} TFLOP/s\n\n{HEADER}")
    size = f"{num_params / 1e6:.0f}M, B={args.micro_batch_size}, T={args.block_size}, {args.dtype}"
    speed = {name: tokens / statistics.median(each) for name, each in seconds.items()}
    for name in names:
        task = f"training step, {size}: {name}"
        if name in failed:
            reason = " ".join(str(failed[name]).split()).replace("|", "/")
            print(row(task, f"failed: {reason[:200]}"))
            continue
        peer, ratios = VARIANTS[name].peer, []
        if peer in speed:
            ratios = [b / a for a, b in zip(seconds[name], seconds[peer], strict=True)]
            peer = f"{peer}: {speed[peer]:,.0f} tokens/s"
        else:
            peer = ""
        limit = f"{speed[name] * flops / peak:.0%} of the matmul peak, {notes[name]}"
        print(row(task, f"{speed[name]:,.0f} tokens/s", peer, ratios, limit))


if __name__ == "__main__":
    main()
