"""
train_gpt2.py's training step of GPT-2 124M beside transformers' GPT2LMHeadModel, and what each trick adds.

    python benchmarks/bench_step.py                                    # two CPU cores: B=4, T=256, float32; 6 minutes
    python benchmarks/bench_step.py --device cuda --micro_batch_size 64 --block_size 1024 --dtype bfloat16

A whole step: forward, backward, clipping at 1, AdamW. Each contestant is a process of its own; they take their
steps in turn, so that a machine that slows down slows all of them. Prints for each the median seconds a step,
tokens/s, the median of its tokens/s over transformers' step by step, the share of the matmul speed measured
between the rounds (6 N + 12 n_layer n_embd T FLOPs a token), peak memory, and the seconds before its first
step was done.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import time
from contextlib import nullcontext

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

# What each contestant is: model, torch.compile, fused AdamW.
CONTESTANTS = {
    "transformers": ("transformers", False, True),
    "transformers compiled": ("transformers", True, True),
    "ours": ("ours", False, True),
    "ours compiled": ("ours", True, True),
    "ours, AdamW not fused": ("ours", False, False),
    "ours, loss in chunks": ("chunks", False, True),
    "ours compiled, chunks": ("chunks", True, True),
}


def make_step(name, args):
    """A function that trains one step of GPT-2 124M on random tokens, and waits for it."""
    import torch
    import torch.nn.functional as F

    import train_gpt2

    kind, compiled, fused = CONTESTANTS[name]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config, device, dtype = train_gpt2.GPTConfig(block_size=args.block_size), args.device, getattr(torch, args.dtype)
    autocast = torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()
    idx = torch.randint(config.vocab_size, (args.micro_batch_size, args.block_size + 1), device=device)
    if kind == "transformers":
        import transformers

        shape = dict(n_positions=args.block_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).to(device)

        def loss_of(model):
            return model(idx[:, :-1], labels=idx[:, :-1]).loss  # it shifts the labels itself
    else:
        model = train_gpt2.GPT(config).to(device)

        def loss_of(model):
            return model(idx[:, :-1], idx[:, 1:])[1]

    if kind == "chunks":  # the head and its loss a part at a time, with torch's own function

        def forward(model, idx, targets):
            x = model.wte(idx) + model.wpe.weight[: idx.shape[1]]
            for block in model.h:
                x = block(x)
            x, options = model.ln_f(x).flatten(0, 1), torch.nn.LinearCrossEntropyOptions()
            return None, F.linear_cross_entropy(
                x, model.wte.weight, targets.flatten(), linear_bias=model.head_bias, options=options
            )

        train_gpt2.GPT.forward = forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    run = torch.compile(model) if compiled else model

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = loss_of(run)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()  # waits for the device

    return step


def compete(pipe, name, args):
    """A contestant's process: takes a step for every message, answers with (seconds, peak memory in bytes)."""
    import torch

    start = time.perf_counter()
    step = make_step(name, args)
    step()
    pipe.send(time.perf_counter() - start)
    while pipe.recv():
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        pipe.send((seconds, torch.cuda.max_memory_allocated() if args.device == "cuda" else resident))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--micro_batch_size", type=int, default=4, help="sequences a step (4)")
    parser.add_argument("--block_size", type=int, default=256, help="tokens a sequence (256)")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each (7)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matmuls (float32)")
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), help="these beside transformers (all)")
    args = parser.parse_args()
    names = [name for name in CONTESTANTS if not args.only or name in ("transformers", *args.only)]
    context, pipes, first, seconds, memory = multiprocessing.get_context("spawn"), {}, {}, {}, {}
    for name in names:  # one after the other: they compile and warm up alone
        pipes[name], theirs = context.Pipe()
        context.Process(target=compete, args=(theirs, name, args), daemon=True).start()
        theirs.close()
        try:
            first[name], seconds[name] = pipes[name].recv(), []
        except EOFError:
            print(f"{name}: failed, see above", file=sys.stderr)
            del pipes[name]

    import torch

    import train_gpt2

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    peaks = []
    for _ in range(args.steps):
        peaks.append(train_gpt2.matmul_peak(device, dtype))
        for name, pipe in pipes.items():
            pipe.send(True)
            taken, memory[name] = pipe.recv()
            seconds[name].append(taken)
    for pipe in pipes.values():
        pipe.send(False)

    tokens = args.micro_batch_size * args.block_size
    flops = 6 * 124_439_808 + 12 * 12 * 768 * args.block_size  # a token
    what = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {what}, B={args.micro_batch_size}, T={args.block_size}, {args.dtype}")
    print(f"medians of {args.steps} steps; matmul peak {statistics.median(peaks) / 1e12:.3g} TFLOP/s\n")
    print("| step | seconds | tokens/s | of transformers' | of the matmul peak | peak memory, GB | first step, s |")
    print("|---|---|---|---|---|---|---|")
    for name in pipes:
        ratio = statistics.median(b / a for a, b in zip(seconds[name], seconds["transformers"], strict=True))
        share = statistics.median(tokens * flops / s / p for s, p in zip(seconds[name], peaks, strict=True))
        median = statistics.median(seconds[name])
        figures = f"{median:.3f} | {tokens / median:,.0f} | {ratio:.2f} | {share:.0%} | {memory[name] / 1e9:.2f}"
        print(f"| {name} | {figures} | {first[name]:.0f} |")


if __name__ == "__main__":
    main()
