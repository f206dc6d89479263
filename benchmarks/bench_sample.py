"""
Tokens per second of sample.py against transformers' generate with its cache, on the same random GPT-2.

    python benchmarks/bench_sample.py                                   # 124M, float32; 2 minutes on two CPU cores
    python benchmarks/bench_sample.py --device cuda --dtype bfloat16 --batch_sizes 1 4 64
    python benchmarks/bench_sample.py --n_layer 24 --n_head 16 --n_embd 1024     # GPT-2 medium

Both take the likeliest token, the end-of-text token does not stop them, and they take turns. Prints medians over
the rounds, the ratio round by round, and the share of the limit that the memory sets: a step has to read all
weights once and the keys and values of all samples, the time for which follows from the bandwidth measured here
(the sum of a large tensor).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from functools import partial

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import sample  # noqa: E402

HEADER = "| what | here | peer | ratio (range) | of the limit |\n|---|---|---|---|---|"


def wait(device):
    """Let the device finish what it has been given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def bandwidth(device):
    """Bytes a second that a sum reads: the best of ten, over 800 MB."""
    x, seconds = torch.ones(200_000_000, device=device), []
    for _ in range(10):
        start = time.perf_counter()
        x.sum().item()  # waits for the result
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("n_layer", 12), ("n_head", 12), ("n_embd", 768)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of the model ({default})")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4], help="samples side by side (1 4)")
    parser.add_argument("--prompt_tokens", type=int, default=32, help="random tokens before the new ones (32)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens a sample (128)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after one that warms up (5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (auto)")
    parser.add_argument("--dtype", choices=list(sample.DTYPES), default="float32", help="of the weights (float32)")
    args = parser.parse_args()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    device, dtype = sample.pick_device(args.device), sample.DTYPES[args.dtype]
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = {B: sample.GPT(directory, device, dtype) for B in args.batch_sizes}
    for B in args.batch_sizes:
        if B > 1:
            ours[B].pack()
    theirs.to(device, dtype).generation_config.eos_token_id = None
    prompt = torch.randint(config.vocab_size, (1, args.prompt_tokens), device=device)
    pick, ids = partial(sample.choose, temperature=0), prompt[0].tolist()

    def run_ours(B):
        return torch.stack([*sample.generate(ours[B], ids, B, args.max_new_tokens, pick)], dim=1)

    def run_theirs(B):
        idx = prompt.expand(B, -1)
        flags = dict(do_sample=False, max_new_tokens=args.max_new_tokens, pad_token_id=config.eos_token_id)
        return theirs.generate(idx, attention_mask=torch.ones_like(idx), **flags)[:, args.prompt_tokens :]

    rates = {(name, B): [] for B in args.batch_sizes for name in ("ours", "theirs")}
    same, speeds = {B: True for B in args.batch_sizes}, [bandwidth(device)]
    for i in range(args.rounds + 1):
        for B in args.batch_sizes:
            tokens = {}
            for name, run in (("ours", run_ours), ("theirs", run_theirs)):
                wait(device)
                start = time.perf_counter()
                tokens[name] = run(B)
                wait(device)
                if i:
                    rates[name, B].append(B * args.max_new_tokens / (time.perf_counter() - start))
            same[B] &= torch.equal(tokens["ours"], tokens["theirs"])
        speeds.append(bandwidth(device))

    parameters = theirs.num_parameters() - theirs.transformer.wpe.weight.numel()
    mean_length = args.prompt_tokens + args.max_new_tokens / 2
    limit = max(speeds)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {device}, "
        f"{torch.get_num_threads()} threads, {args.prompt_tokens} + {args.max_new_tokens} tokens, "
        f"medians of {args.rounds} rounds, tokens of all samples together\n\n{HEADER}"
    )
    for B in args.batch_sizes:
        mine, other = (statistics.median(rates[name, B]) for name in ("ours", "theirs"))
        ratios = [a / b for a, b in zip(rates["ours", B], rates["theirs", B], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        cached = 2 * B * args.n_layer * args.n_embd * mean_length  # numbers that a step reads from the cache
        share = (parameters + cached) * dtype.itemsize * mine / B / limit
        what = f"sampling, {theirs.num_parameters() / 1e6:.0f}M, B={B}, {args.dtype}"
        print(
            f"| {what} | {mine:,.1f} tokens/s | transformers' generate {other:,.1f} tokens/s | {ratio} | "
            f"{share:.0%} of the memory's {limit / 1e9:.1f} GB/s, ids {'equal' if same[B] else 'DIFFER'} |"
        )


if __name__ == "__main__":
    main()
