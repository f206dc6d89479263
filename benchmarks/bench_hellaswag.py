"""
Compare hellaswag.py with the plain method: one example at a time, four padded rows, all logits.

    python benchmarks/bench_hellaswag.py                    # 124M, float32; 3 minutes on two cores
    python benchmarks/bench_hellaswag.py --dtype bfloat16
    python benchmarks/bench_hellaswag.py --examples 500     # 12 minutes
    python benchmarks/bench_hellaswag.py --device cuda --examples 10042 --parts 10

The examples are cut from --source: contexts of 10 to 90 GPT-2 tokens and four endings of 5 to 60
tokens, one of which is the true continuation. The model has random weights. The plain method runs
transformers' GPT2LMHeadModel, in the same dtype on the same device. The two methods take turns with
parts of the examples. Printed are the examples per second of all parts together, the ratio of each
part, and how many predictions agree.
"""

import math
import random
import tempfile
import time

import torch
import torch.nn.functional as F
from common import HEADER, environment, make_parser, row

import hellaswag


def make_examples(text, tokenizer, n):
    """Return n hellaswag.Example, cut from a text at random."""
    rng = random.Random(0)
    tokens = tokenizer.encode_ordinary(text)
    examples = []
    for i in range(n):
        start = rng.randrange(len(tokens) - 200)
        length = rng.randint(10, 90)
        label = rng.randrange(4)
        endings = []
        for j in range(4):
            begin = start + length if j == label else rng.randrange(len(tokens) - 60)
            endings.append(tokens[begin : begin + rng.randint(5, 60)])
        examples.append(hellaswag.Example(i, label, tokens[start : start + length], endings))
    return examples


@torch.inference_mode()
def predict_plainly(model, examples):
    """Return the ending with the lowest mean loss of each example, as build-nanogpt computes it."""
    predictions = []
    for example in examples:
        n = len(example.context)
        tokens = torch.zeros(4, example.length, dtype=torch.int64)
        mask = torch.zeros(4, example.length)  # 1 at the tokens of endings
        for i, ending in enumerate(example.endings):
            tokens[i, : n + len(ending)] = torch.tensor(example.context + ending)
            mask[i, n : n + len(ending)] = 1
        tokens = tokens.to(model.device)
        mask = mask[:, 1:].to(model.device)
        logits = model(tokens).logits[:, :-1].flatten(0, 1).float()  # (4 (T - 1), V)
        losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        means = (losses.view(4, -1) * mask).sum(dim=1) / mask.sum(dim=1)
        predictions.append(means.argmin().item())
    return predictions


def parse_args():
    """Parse the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--source", default="input.txt", help="UTF-8 text that the examples are cut from")
    add("--examples", type=int, default=100, help="number of examples")
    add("--parts", type=int, default=0, help="number of turns; 0: one for every 25 examples")
    add("--batch_size", type=int, default=8, help="examples per batch, as in hellaswag.py")
    add("--n_layer", type=int, default=12, help="number of layers")
    add("--n_head", type=int, default=12, help="number of heads")
    add("--n_embd", type=int, default=768, help="number of channels")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="dtype of both models")
    return parser.parse_args()


def main():
    args = parse_args()
    from transformers import GPT2Config, GPT2LMHeadModel  # imported here because it is slow

    device = hellaswag.pick_device(args.device)
    dtype = getattr(torch, args.dtype)
    torch.backends.cuda.enable_cudnn_sdp(False)  # these two as hellaswag.py does
    torch.set_float32_matmul_precision("high")

    # both models have the same random weights
    torch.manual_seed(0)
    config = GPT2Config(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    peer = GPT2LMHeadModel(config).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # losses as different as a trained model's
    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(directory)
        model, tokenizer, _ = hellaswag.load_model(directory, device, dtype)
    peer.to(device, dtype)

    def predict(examples):
        return [prediction["pred_norm"] for prediction in hellaswag.evaluate(model, examples, args.batch_size)]

    # the methods take turns, part by part; neighbors in length are in one part
    with open(args.source, encoding="utf-8") as file:
        examples = make_examples(file.read(), tokenizer, args.examples)
    examples.sort(key=lambda example: example.length)
    methods = {"plain": lambda part: predict_plainly(peer, part), "ours": predict}
    predictions = {"plain": [], "ours": []}
    seconds = {"plain": [], "ours": []}
    for method in methods.values():
        method(examples[:8])  # warms up
    num_parts = args.parts or math.ceil(len(examples) / 25)
    for i in range(num_parts):
        part = examples[i * len(examples) // num_parts : (i + 1) * len(examples) // num_parts]
        for name, method in methods.items():
            start = time.perf_counter()
            predictions[name] += method(part)  # Python numbers: the device has finished
            seconds[name].append(time.perf_counter() - start)

    # the table
    n = len(examples)
    num_equal = sum(a == b for a, b in zip(predictions["plain"], predictions["ours"], strict=True))
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
    task = f"HellaSwag, {peer.num_parameters() / 1e6:.0f}M, {n:,} examples, {args.dtype}"
    ours = f"{n / sum(seconds['ours']):.2f} examples/s"
    plain = f"transformers one by one: {n / sum(seconds['plain']):.2f} examples/s"
    print(f"{environment(device.type)}\n\n{HEADER}")
    print(row(task, ours, plain, ratios, f"{num_equal} of {n} predictions equal"))


if __name__ == "__main__":
    main()
