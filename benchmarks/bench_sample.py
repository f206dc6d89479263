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

import argparse
import statistics
import tempfile
import time
from functools import partial

import torch
from common import HEADER, machine_name, row, synchronize

import sample


def measure_bandwidth(device):
    """Return how many bytes per second the sum of a large tensor reads, the best of ten tries."""
    x = torch.ones(200_000_000, device=device)  # 800 MB
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        x.sum().item()  # waits for the result
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds)


class Sampler:
    """Greedy sampling with sample.py."""

    def __init__(self, directory, device, dtype):
        self.model = sample.GPT.from_pretrained(directory, device, dtype)

    def run(self, prompt_tokens, num_samples, max_new_tokens):
        """Return the new tokens (num_samples, max_new_tokens)."""
        greedy = partial(sample.sample_token, temperature=0)
        steps = sample.generate(self.model, prompt_tokens, num_samples, max_new_tokens, greedy)
        return torch.stack(list(steps), dim=1)


class TransformersSampler:
    """Greedy sampling with transformers' generate."""

    def __init__(self, model):
        self.model = model
        self.model.generation_config.eos_token_id = None  # never stop early

    def run(self, prompt_tokens, num_samples, max_new_tokens):
        """Return the new tokens (num_samples, max_new_tokens)."""
        prompt = torch.tensor([prompt_tokens], device=self.model.device)
        idx = prompt.expand(num_samples, -1)
        output = self.model.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
        )
        return output[:, len(prompt_tokens) :]


def get_args():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n_layer", type=int, default=12, help="number of layers (default: 12)")
    parser.add_argument("--n_head", type=int, default=12, help="number of heads (default: 12)")
    parser.add_argument("--n_embd", type=int, default=768, help="channels (default: 768)")
    parser.add_argument(
        "--batch_sizes",
        type=int,
        nargs="+",
        default=[1, 4],
        help="numbers of samples in parallel to measure (default: 1 4)",
    )
    parser.add_argument("--prompt_tokens", type=int, default=32, help="length of the random prompt (default: 32)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="new tokens per sample (default: 128)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one to warm up (default: 5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument(
        "--dtype",
        choices=list(sample.DTYPES),
        default="float32",
        help="dtype of both models (default: float32)",
    )
    return parser.parse_args()


def main():
    args = get_args()
    import transformers  # imported here because it is slow

    transformers.utils.logging.disable_progress_bar()
    torch.backends.cuda.enable_cudnn_sdp(False)  # as sample.py does
    device = sample.pick_device(args.device)
    dtype = sample.DTYPES[args.dtype]

    # Both models have the same random weights.
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    peer_model = transformers.GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        peer_model.save_pretrained(directory)
        samplers = {"sample.py": Sampler(directory, device, dtype)}
    samplers["transformers"] = TransformersSampler(peer_model.to(device, dtype))
    prompt_tokens = torch.randint(config.vocab_size, (args.prompt_tokens,)).tolist()

    # Rounds: every contestant once for each batch size. Round 0 warms up.
    rates = {(name, B): [] for B in args.batch_sizes for name in samplers}
    is_equal = dict.fromkeys(args.batch_sizes, True)
    bandwidth = measure_bandwidth(device)
    for i in range(args.rounds + 1):
        for B in args.batch_sizes:
            tokens = {}
            for name, sampler in samplers.items():
                synchronize(device.type)
                start = time.perf_counter()
                tokens[name] = sampler.run(prompt_tokens, B, args.max_new_tokens)
                synchronize(device.type)
                seconds = time.perf_counter() - start
                if i > 0:
                    rates[name, B].append(B * args.max_new_tokens / seconds)
            if not torch.equal(tokens["sample.py"], tokens["transformers"]):
                is_equal[B] = False
        bandwidth = max(bandwidth, measure_bandwidth(device))

    # The table.
    num_parameters = peer_model.num_parameters()
    read_per_step = num_parameters - peer_model.transformer.wpe.weight.numel()
    mean_length = args.prompt_tokens + args.max_new_tokens / 2
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {machine_name(device.type)}, "
        f"{args.prompt_tokens} + {args.max_new_tokens} tokens, "
        f"medians of {args.rounds} rounds, tokens of all samples together\n\n{HEADER}"
    )
    for B in args.batch_sizes:
        ours = statistics.median(rates["sample.py", B])
        peers = statistics.median(rates["transformers", B])
        ratios = [a / b for a, b in zip(rates["sample.py", B], rates["transformers", B], strict=True)]
        cached = 2 * B * args.n_layer * args.n_embd * mean_length  # keys and values read per step
        bytes_per_step = (read_per_step + cached) * dtype.itemsize
        fraction = bytes_per_step * (ours / B) / bandwidth
        task = f"sampling, {num_parameters / 1e6:.0f}M, B={B}, {args.dtype}"
        peer = f"transformers' generate: {peers:,.1f} tokens/s"
        equality = "tokens equal" if is_equal[B] else "tokens DIFFER"
        limit = f"{fraction:.0%} of the memory's {bandwidth / 1e9:.1f} GB/s, {equality}"
        print(row(task, f"{ours:,.1f} tokens/s", peer, ratios, limit))


if __name__ == "__main__":
    main()
