"""
Compare hellaswag.py with the plain method: one example at a time, four padded rows, all logits.

    python benchmarks/bench_hellaswag.py                    # 124M, float32; 3 minutes on two cores
    python benchmarks/bench_hellaswag.py --dtype bfloat16
    python benchmarks/bench_hellaswag.py --examples 500     # 12 minutes
    python benchmarks/bench_hellaswag.py --device cuda --examples 10042 --parts 10

The examples are cut from --source: contexts of 10, 20, ... or 90 GPT-2 tokens and four endings of 5
to 60 tokens, one of which is the true continuation. There are only nine lengths of contexts because
in the validation set about a hundred contexts have the same length. The model has random weights.
The plain method runs transformers' GPT2LMHeadModel, in the same dtype on the same device. The two
methods take turns with parts of the examples. Printed are the examples per second of all parts
together, the ratio of each part, the ratio that the numbers of multiplications predict, and how
well losses and predictions agree.
"""

import argparse
import math
import random
import statistics
import tempfile
import time

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from common import HEADER, machine_name, row

import hellaswag


def read_source(path):
    """Return the text of a UTF-8 file, or of the first 200 rows of a parquet file."""
    if path.endswith(".parquet"):
        column = pq.ParquetFile(path).read_row_group(0, columns=["text"]).column(0)
        return " ".join(column.to_pylist()[:200])
    with open(path, encoding="utf-8") as file:
        return file.read()


def make_examples(text, tokenizer, n):
    """Return n hellaswag.Example, cut from a text at random."""
    rng = random.Random(0)
    tokens = tokenizer.encode_ordinary(text)
    examples = []
    for i in range(n):
        start = rng.randrange(len(tokens) - 200)
        length = rng.randrange(10, 91, 10)
        label = rng.randrange(4)
        context = tokenizer.decode(tokens[start : start + length]).strip()
        endings = []
        for j in range(4):
            begin = start + length if j == label else rng.randrange(len(tokens) - 60)
            endings.append(tokenizer.decode(tokens[begin : begin + rng.randint(5, 60)]).strip())
        raw = {"ind": i, "label": label, "ctx": context or "A", "endings": endings}
        examples.append(hellaswag.tokenize(raw, tokenizer))
    return examples


@torch.inference_mode()
def score_plainly(model, examples):
    """Return the total and mean losses of each example, as build-nanogpt computes them."""
    results = []
    for example in examples:
        n = len(example.context)
        tokens = torch.zeros(4, hellaswag.row_length(example), dtype=torch.int64)
        mask = torch.zeros(4, hellaswag.row_length(example))  # 1 at the tokens of endings
        for i, ending in enumerate(example.endings):
            tokens[i, : n + len(ending)] = torch.tensor(example.context + ending)
            mask[i, n : n + len(ending)] = 1
        tokens = tokens.to(model.device)
        mask = mask[:, 1:].to(model.device)
        logits = model(tokens).logits[:, :-1].flatten(0, 1).float()  # (4 (T - 1), V)
        losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        totals = (losses.view(4, -1) * mask).sum(dim=1)
        means = totals / mask.sum(dim=1)
        results.append((totals.tolist(), means.tolist()))
    return results


def score_here(model, examples, batch_size):
    """Return the total and mean losses of each example by hellaswag.py."""
    results = [None] * len(examples)
    for i, totals, means in hellaswag.evaluate(model, examples, batch_size):
        results[i] = (totals, means)
    return results


def count_multiplications(examples, num_body, num_head):
    """Return the multiplications by weights of the plain method and of hellaswag.py, without padding.

    num_body and num_head are the numbers of weights in the blocks and in the output head.
    """
    plain = 0
    here = 0
    for example in examples:
        plain += 4 * hellaswag.row_length(example) * (num_body + num_head)
        num_ending_tokens = sum(len(ending) for ending in example.endings)
        here += (len(example.context) + num_ending_tokens - 4) * num_body
        here += num_ending_tokens * num_head
    return plain, here


def compare(name, plain, here):
    """Print how well two lists of four losses per example agree. Returns the number of equal predictions."""
    num_equal = 0
    largest = 0.0
    for a, b in zip(plain, here, strict=True):
        num_equal += a.index(min(a)) == b.index(min(b))
        largest = max(largest, *(abs(x - y) for x, y in zip(a, b, strict=True)))
    print(f"{name} losses: largest difference {largest:.1e} nats, {num_equal} of {len(plain)} predictions equal")
    return num_equal


def get_args():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--source",
        default="input.txt",
        help="UTF-8 text or parquet file that the examples are cut from (default: input.txt)",
    )
    parser.add_argument("--examples", type=int, default=100, help="number of examples (default: 100)")
    parser.add_argument("--parts", type=int, help="number of turns (default: one for 25 examples)")
    parser.add_argument("--batch_size", type=int, help="as in hellaswag.py (default: 8 on a CPU, otherwise 32)")
    parser.add_argument("--n_layer", type=int, default=12, help="number of layers (default: 12)")
    parser.add_argument("--n_head", type=int, default=12, help="number of heads (default: 12)")
    parser.add_argument("--n_embd", type=int, default=768, help="channels (default: 768)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument(
        "--dtype",
        choices=list(hellaswag.DTYPES),
        help="dtype of both (default: bfloat16 on GPUs that support it, otherwise float32)",
    )
    return parser.parse_args()


def main():
    args = get_args()
    from transformers import GPT2Config, GPT2LMHeadModel  # imported here because it is slow

    device = hellaswag.pick_device(args.device)
    batch_size = args.batch_size or (8 if device.type == "cpu" else 32)
    dtype_name = args.dtype
    if dtype_name is None:
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        dtype_name = "bfloat16" if has_bfloat16 else "float32"
    dtype = hellaswag.DTYPES[dtype_name]
    torch.backends.cuda.enable_cudnn_sdp(False)  # these two as hellaswag.py does
    torch.set_float32_matmul_precision("high")

    # Both models have the same random weights.
    torch.manual_seed(0)
    config = GPT2Config(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    peer = GPT2LMHeadModel(config).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # losses as different as a trained model's
    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(directory)
        model = hellaswag.GPT.from_pretrained(directory, device, dtype)
    peer.to(device, dtype)
    tokenizer = hellaswag.get_tokenizer("gpt2")
    examples = make_examples(read_source(args.source), tokenizer, args.examples)

    # The methods take turns, part by part.
    examples.sort(key=lambda example: (len(example.context), hellaswag.row_length(example)))
    methods = {
        "plain": lambda part: score_plainly(peer, part),
        "hellaswag.py": lambda part: score_here(model, part, batch_size),
    }
    results = {name: [] for name in methods}
    seconds = {name: [] for name in methods}
    for method in methods.values():
        method(examples[:8])  # warms up
    num_parts = args.parts or math.ceil(len(examples) / 25)
    for i in range(num_parts):
        begin = i * len(examples) // num_parts
        end = (i + 1) * len(examples) // num_parts
        for name, method in methods.items():
            start = time.perf_counter()
            results[name] += method(examples[begin:end])  # Python numbers: the device is done
            seconds[name].append(time.perf_counter() - start)

    # Agreement and the table.
    print(f"torch {torch.__version__}, {machine_name(device.type)}")
    contexts = [len(example.context) for example in examples]
    endings = [len(ending) for example in examples for ending in example.endings]
    print(
        f"{len(examples)} examples, contexts of {statistics.mean(contexts):.1f} tokens "
        f"({min(contexts)} to {max(contexts)}), endings of {statistics.mean(endings):.1f} "
        f"({min(endings)} to {max(endings)})"
    )
    plain, here = results["plain"], results["hellaswag.py"]
    compare("total", [totals for totals, _ in plain], [totals for totals, _ in here])
    num_equal = compare("mean", [means for _, means in plain], [means for _, means in here])
    num_head = peer.lm_head.weight.numel()
    num_body = peer.num_parameters() - num_head - peer.transformer.wpe.weight.numel()
    plain_count, here_count = count_multiplications(examples, num_body, num_head)
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["hellaswag.py"], strict=True)]
    task = f"HellaSwag, {peer.num_parameters() / 1e6:.0f}M, {len(examples):,} examples, {dtype_name}"
    ours = f"{len(examples) / sum(seconds['hellaswag.py']):.2f} examples/s"
    plain_speed = f"transformers one by one: {len(examples) / sum(seconds['plain']):.2f} examples/s"
    limit = f"{plain_count / here_count:.2f} by multiplications alone, {num_equal} of {len(plain)} predictions equal"
    print(f"\n{HEADER}\n{row(task, ours, plain_speed, ratios, limit)}")


if __name__ == "__main__":
    main()
