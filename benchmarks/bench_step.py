"""
train_gpt2.py's training step of GPT-2 124M beside transformers' GPT2LMHeadModel, and what each trick adds.

    python benchmarks/bench_step.py                                    # two CPU cores: B=4, T=256, float32; 3 minutes
    python benchmarks/bench_step.py --only "ours, AdamW not fused"     # a trick turned off
    python benchmarks/bench_step.py --device cuda --micro_batch_size 64 --block_size 1024 --dtype bfloat16

A whole step: forward and backward of each micro-batch, clipping at 1, AdamW; transformers computes its own loss.
Each contestant is a process of its own; they take their steps in turn, so that a machine that slows down slows all
of them. The peer of one with a trick turned off is ours with all tricks. Prints for each the median tokens/s, the
ratio to its peer's round by round, the share of the matmul speed measured between the rounds (6 N + 12 n_layer
n_embd T FLOPs a token), peak memory, and the seconds before its first step was done, each beside the peer's. A
contestant that fails, or that memory is too small for, is a row that says so.
"""

import argparse
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from contextlib import nullcontext, suppress

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_gpt2  # noqa: E402

HEADER = "| what | here | peer | ratio (range) | of the limit |\n|---|---|---|---|---|"
TRICKS = ("AdamW not fused", "vocabulary not padded", "attention by hand", "loss in chunks", "no TF32")
TRICKS += ("memory given back",)  # by the C library: it and its opposite concern CPUs alone
PEERS = {  # of each contestant
    "transformers": [],
    "transformers compiled": ["transformers"],
    "transformers, memory kept": ["transformers"],
    "ours": ["transformers"],
    "ours compiled": ["transformers", "transformers compiled"],
} | {f"{ours}, {trick}": [ours] for ours in ("ours", "ours compiled") for trick in TRICKS}


def attention_by_hand(q, k, v, dropout_p, is_causal):
    """What F.scaled_dot_product_attention computes for train_gpt2.py, with all scores in memory."""
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)  # (T, T)
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(future, -math.inf)  # (B, nh, T, T)
    return scores.softmax(dim=-1) @ v


def forward_in_chunks(model, idx, targets):
    """train_gpt2.GPT.forward with the head and its loss a part at a time, by torch's own function."""
    x = model.wte(idx) + model.wpe.weight[: idx.shape[1]]
    for block in model.h:
        x = block(x)
    x, options = model.ln_f(x).flatten(0, 1), torch.nn.LinearCrossEntropyOptions()
    head = dict(linear_bias=model.head_bias, options=options)
    return None, F.linear_cross_entropy(x, model.wte.weight, targets.flatten(), **head)


def config_of(args):
    """The shape of all contestants."""
    shape = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    return train_gpt2.GPTConfig(block_size=args.block_size, **shape)


def make_step(name, args):
    """(step, park): one trains the model a step and waits for it, the other moves it to a device between steps."""
    kind, _, trick = name.partition(", ")
    torch.manual_seed(0)
    keeps = trick == "memory kept" or kind.startswith("ours") and trick != "memory given back"
    if keeps and args.device == "cpu":
        train_gpt2.keep_freed_memory()
    torch.set_float32_matmul_precision("highest" if trick == "no TF32" else "high")
    config, device, dtype = config_of(args), args.device, getattr(torch, args.dtype)
    autocast = torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()
    idx = torch.randint(config.vocab_size, (args.micro_batch_size, args.block_size + 1))
    x, y = idx[:, :-1], idx[:, 1:]
    if args.data_dir:
        meta = train_gpt2.read_meta(args.data_dir)
        windows = train_gpt2.Windows(args.data_dir, "train", meta, args.block_size, 1337, True)
        x, y = windows.batch(range(args.micro_batch_size))
    x, y = x.to(device), y.to(device)
    if kind.startswith("transformers"):
        import transformers

        shape = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, n_positions=args.block_size)
        theirs = transformers.GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = transformers.GPT2LMHeadModel(theirs).to(device)

        def loss_of(model):
            return model(x, labels=x).loss  # it shifts the labels itself
    else:
        model = train_gpt2.GPT(config)
        if trick == "vocabulary not padded":
            model.wte = torch.nn.Embedding.from_pretrained(model.wte.weight[: config.vocab_size].detach(), freeze=False)
            model.head_bias = model.head_bias[: config.vocab_size]
        elif trick == "attention by hand":
            F.scaled_dot_product_attention = attention_by_hand
        elif trick == "loss in chunks":
            train_gpt2.GPT.forward = forward_in_chunks
        model.to(device)

        def loss_of(model):
            return model(x, y)[1]

    fused = trick != "AdamW not fused"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    run = torch.compile(model) if kind.endswith("compiled") else model

    def step(micro_steps):
        for _ in range(micro_steps):
            with autocast:
                loss = loss_of(run) / micro_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    def park(device):
        for p in model.parameters():
            p.data = p.data.to(device)
        for state in optimizer.state.values():
            state.update({key: value.to(device) for key, value in state.items() if value.dim()})
        torch.cuda.empty_cache()

    return step, park


def compete(pipe, name, args):
    """A contestant's process: a step for every message; answers (seconds, peak memory in bytes, what went wrong)."""
    try:
        start = time.perf_counter()
        step, park = make_step(name, args)
        step(args.grad_accum_steps)
        while True:
            seconds = time.perf_counter() - start
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            park("cpu")  # what waits leaves a GPU's memory to the others
            pipe.send((seconds, torch.cuda.max_memory_allocated() if args.device == "cuda" else resident, None))
            if not pipe.recv():
                break
            park(args.device)
            if args.device == "cuda":
                step(1)  # gets its memory again
            start = time.perf_counter()
            step(args.grad_accum_steps)
    except Exception as error:  # whatever it is, the others go on
        pipe.send((0, 0, f"{type(error).__name__}: {error}".splitlines()[0].replace("|", "/")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("n_layer", 12), ("n_head", 12), ("n_embd", 768)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of the model ({default})")
    parser.add_argument("--micro_batch_size", type=int, default=4, help="sequences at a time (4)")
    parser.add_argument("--block_size", type=int, default=256, help="tokens a sequence (256)")
    parser.add_argument("--grad_accum_steps", type=int, default=1, help="micro-batches a step (1)")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each (7)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matmuls (float32)")
    parser.add_argument("--data_dir", help="directory of token shards to train on (random tokens)")
    only = "these and their first peers (on a CPU ours and ours compiled, on a GPU all that the dtype has)"
    parser.add_argument("--only", nargs="+", choices=list(PEERS), metavar="CONTESTANT", help=only)
    args = parser.parse_args()
    skipped = ["memory", *(["no TF32"] if args.dtype == "bfloat16" else [])]  # TF32 concerns float32 alone
    usual = [name for name in PEERS if not any(trick in name for trick in skipped)]
    usual = usual if args.device == "cuda" else ["ours", "ours compiled"]
    chosen = args.only or usual
    names = [name for name in PEERS if name in chosen or any(name in PEERS[other][:1] for other in chosen)]
    context, processes, pipes, first, memory, failed = multiprocessing.get_context("spawn"), {}, {}, {}, {}, {}

    def answer(name):
        """The seconds that a contestant says it took, beside its memory, or why it failed."""
        try:
            taken, memory[name], why = pipes[name].recv()
        except (EOFError, OSError):
            taken, why = 0, "its process was killed"
        if why:
            failed[name] = why
            processes[name].join()  # its memory is free for the next one
        return taken

    for name in names:  # one after the other: they compile and warm up alone
        print(f"starting {name}", file=sys.stderr, flush=True)
        pipes[name], theirs = context.Pipe()
        processes[name] = context.Process(target=compete, args=(theirs, name, args), daemon=True)
        processes[name].start()
        theirs.close()
        first[name] = answer(name)

    torch.set_float32_matmul_precision("high")  # as the contestants have it
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    peaks, seconds = [], {name: [] for name in names}
    for _ in range(args.steps):
        peaks.append(train_gpt2.matmul_peak(device, dtype))
        torch.cuda.empty_cache()
        for name in [name for name in names if name not in failed]:
            with suppress(OSError):  # where it was killed meanwhile
                pipes[name].send(True)
            seconds[name].append(answer(name))
    for name in set(names) - set(failed):
        pipes[name].send(False)

    tokens = args.grad_accum_steps * args.micro_batch_size * args.block_size
    with torch.device("meta"):
        N = train_gpt2.GPT(config_of(args)).num_params
    flops = 6 * N + 12 * args.n_layer * args.n_embd * args.block_size  # a token
    what = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {what}, medians of {args.steps} steps of {tokens:,} tokens")
    print(f"matmul peak {statistics.median(peaks) / 1e12:.3g} TFLOP/s\n\n{HEADER}")
    speed = {name: f"{tokens / statistics.median(seconds[name]):,.0f} tokens/s" for name in names if name not in failed}
    shares = {name: [tokens * flops / s / p for s, p in zip(seconds[name], peaks, strict=True)] for name in speed}
    share = {name: f"{statistics.median(each):.0%}" for name, each in shares.items()}
    sizes = f"{N / 1e6:.0f}M, B={args.micro_batch_size}, T={args.block_size}, {args.dtype}"
    for name in names:
        label = f"training step, {sizes}: {name}"
        if name in failed:
            print(f"| {label} | failed: {failed[name]} | | | |")
            continue
        for peer in [peer for peer in PEERS[name] if peer in speed]:
            ratios = [b / a for a, b in zip(seconds[name], seconds[peer], strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            limit = f"{share[name]} of the matmul peak beside {share[peer]}, {memory[name] / 1e9:.2f} GB beside "
            limit += f"{memory[peer] / 1e9:.2f}, first step after {first[name]:.0f} s beside {first[peer]:.0f}"
            print(f"| {label} | {speed[name]} | {peer} {speed[peer]} | {ratio} | {limit} |")
        if PEERS[name] and not any(peer in speed for peer in PEERS[name]):
            limit = f"{share[name]} of the matmul peak, {memory[name] / 1e9:.2f} GB"
            print(f"| {label} | {speed[name]} | none: {PEERS[name][0]} failed | | {limit} |")


if __name__ == "__main__":
    main()
