"""
Compare the tokens per second of sample.py and of transformers' generate, on the same random GPT-2.

    python benchmarks/bench_sample.py                       # 124M, float32; 2 minutes on two cores
    python benchmarks/bench_sample.py --dtype bfloat16
    python benchmarks/bench_sample.py --device cuda --dtype bfloat16 --batch_sizes 1 4 64
    python benchmarks/bench_sample.py --n_layer 24 --n_head 16 --n_embd 1024     # GPT-2 medium

Both use a key/value cache, always take the most likely token, and ignore the end-of-text token.
They take turns, so that other programs on the machine slow both of them down. Printed are medians
over the rounds, the ratio of each round, and the fraction of the limit that memory sets: a step has
to read all weights, and the keys and values of all samples. The memory bandwidth is measured here,
as the speed of the sum of a large tensor.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial

import torch
from common import HEADER, environment, make_parser, row, synchronize

import sample


def measure_bandwidth(device):
    """Return how many bytes per second the sum of a large tensor reads, the best of three tries."""
    x = torch.ones(200_000_000, device=device)  # 800 MB
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        x.sum().item()  # waits for the result
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds)


def sample_here(model, prompt_tokens, B, max_new_tokens):
    """Return the new tokens (B, max_new_tokens) of sample.py."""
    greedy = partial(sample.sample_token, temperature=0)
    steps = sample.generate(model, prompt_tokens, B, max_new_tokens, greedy)
    return torch.stack(list(steps), dim=1)


def sample_by_transformers(model, prompt_tokens, B, max_new_tokens):
    """Return the new tokens (B, max_new_tokens) of transformers' generate."""
    idx = torch.tensor([prompt_tokens] * B, device=model.device)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": 0}
    output = model.generate(idx, attention_mask=torch.ones_like(idx), **options)
    return output[:, len(prompt_tokens) :]


def parse_args():
    """Parse the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--n_layer", type=int, default=12, help="number of layers")
    add("--n_head", type=int, default=12, help="number of heads")
    add("--n_embd", type=int, default=768, help="number of channels")
    add("--batch_sizes", type=int, nargs="+", default=[1, 4], help="numbers of samples in parallel to measure")
    add("--prompt_tokens", type=int, default=32, help="length of the random prompt")
    add("--max_new_tokens", type=int, default=128, help="new tokens per sample")
    add("--rounds", type=int, default=5, help="timed rounds, after one to warm up")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="dtype of both models")
    return parser.parse_args()


def main():
    args = parse_args()
    import transformers  # imported here because it is slow

    transformers.utils.logging.disable_progress_bar()
    torch.backends.cuda.enable_cudnn_sdp(False)  # as sample.py does
    device = sample.pick_device(args.device)
    dtype = getattr(torch, args.dtype)

    # both models have the same random weights
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    peer = transformers.GPT2LMHeadModel(config).eval()
    peer.generation_config.eos_token_id = None  # never stop early
    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(directory)
        model, _, _ = sample.load_model(directory, device, dtype)
    samplers = {
        "sample.py": partial(sample_here, model),
        "transformers": partial(sample_by_transformers, peer.to(device, dtype)),
    }
    prompt_tokens = torch.randint(config.vocab_size, (args.prompt_tokens,)).tolist()

    # rounds: each sampler once for each batch size; round 0 warms up
    rates = defaultdict(list)  # (name, batch size): tokens per second of each round
    is_equal = dict.fromkeys(args.batch_sizes, True)
    bandwidth = measure_bandwidth(device)
    for i in range(args.rounds + 1):
        for B in args.batch_sizes:
            tokens = {}
            for name, sampler in samplers.items():
                synchronize(device.type)
                start = time.perf_counter()
                tokens[name] = sampler(prompt_tokens, B, args.max_new_tokens)
                synchronize(device.type)
                if i > 0:
                    rates[name, B].append(B * args.max_new_tokens / (time.perf_counter() - start))
            is_equal[B] &= torch.equal(tokens["sample.py"], tokens["transformers"])
        bandwidth = max(bandwidth, measure_bandwidth(device))

    # the table
    num_parameters = peer.num_parameters()
    read_per_step = num_parameters - peer.transformer.wpe.weight.numel()
    mean_length = args.prompt_tokens + args.max_new_tokens / 2
    print(f"{environment(device.type)}, {args.prompt_tokens} + {args.max_new_tokens} tokens, {args.rounds} rounds")
    print(f"\n{HEADER}")
    for B in args.batch_sizes:
        ours = statistics.median(rates["sample.py", B])
        peers = statistics.median(rates["transformers", B])
        ratios = [a / b for a, b in zip(rates["sample.py", B], rates["transformers", B], strict=True)]
        cached = 2 * B * args.n_layer * args.n_embd * mean_length  # keys and values read per step
        bytes_per_step = (read_per_step + cached) * dtype.itemsize
        fraction = bytes_per_step * (ours / B) / bandwidth
        task = f"sampling, {num_parameters / 1e6:.0f}M, B={B}, {args.dtype}"
        equality = "tokens equal" if is_equal[B] else "tokens DIFFER"
        limit = f"{fraction:.0%} of the memory's {bandwidth / 1e9:.1f} GB/s, {equality}"
        print(row(task, f"{ours:,.1f} tokens/s", f"transformers' generate: {peers:,.1f} tokens/s", ratios, limit))


if __name__ == "__main__":
    main()
