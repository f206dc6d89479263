"""
hellaswag.py against the plain method: one example at a time, four rows of context and ending, padded, all logits.

    python benchmarks/bench_hellaswag.py                    # 124M, float32; about 3 minutes on two CPU cores
    python benchmarks/bench_hellaswag.py --examples 500     # 12 minutes
    python benchmarks/bench_hellaswag.py --device cuda --examples 10042 --parts 10

The examples are spans of --source: contexts of 10 to 90 GPT-2 tokens, four endings of 5 to 60, one of them the
true continuation. With --alike the endings of an example differ in length by a quarter at most from their middle,
so that the plain method pads less. The model has random weights. The plain method runs transformers'
GPT2LMHeadModel, in the same dtype on the same device. The two take turns with parts of the examples that are alike
in length, as the batches of a whole run are. Printed are examples/s of all parts together, the ratio part by part,
what it would be over all if products with weights alone took time and all the same, and how far losses and
predictions agree.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import hellaswag  # noqa: E402

HEADER = "| what | here | peer | ratio (range) | of the limit |\n|---|---|---|---|---|"


def make_examples(ids, enc, n, alike, seed=0):
    """n examples (ind, label, context, endings) as hellaswag.read_hellaswag returns them, from the ids of a text."""
    rng, examples = random.Random(seed), []
    for i in range(n):
        label, at, length = rng.randrange(4), rng.randrange(len(ids) - 200), rng.randint(10, 90)
        middle, context = rng.randint(5, 60), enc.decode(ids[at : at + length]).strip()
        low, high = (max(5, middle * 3 // 4), min(60, middle * 5 // 4)) if alike else (5, 60)
        endings = []
        for number in range(4):
            start = at + length if number == label else rng.randrange(len(ids) - 60)
            text = enc.decode(ids[start : start + rng.randint(low, max(low, high))]).strip()
            endings.append(enc.encode_ordinary(f" {text}"))
        examples.append((i, label, enc.encode_ordinary(context), endings))
    return examples


@torch.no_grad()
def plain(model, examples, device):
    """The summed and the mean losses of each example, as build-nanogpt and llm.c compute them."""
    results = []
    for _, _, context, endings in examples:
        T = len(context) + max(map(len, endings))
        tokens = torch.zeros(4, T, dtype=torch.long)
        mask = torch.zeros(4, T)
        for row, ending in enumerate(endings):
            end = len(context) + len(ending)
            tokens[row, :end] = torch.tensor(context + ending)
            mask[row, len(context) : end] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        logits = model(tokens).logits  # (4, T, V)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        losses = losses.view(4, -1) * mask[:, 1:]
        results.append((losses.sum(1).tolist(), (losses.sum(1) / mask[:, 1:].sum(1)).tolist()))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--source", default="input.txt", help="UTF-8 text that the examples are cut from (input.txt)")
    add("--examples", type=int, default=100, help="to score (100)")
    add("--parts", type=int, help="in which the methods take turns (one for 25 examples)")
    add("--alike", action="store_true", help="endings of an example that are alike in length (of any of 5 to 60)")
    add("--batch_tokens", type=int, help="as hellaswag.py's (2048 on a CPU, else 65536)")
    for name, default in (("n_layer", 12), ("n_head", 12), ("n_embd", 768)):
        add(f"--{name}", type=int, default=default, help=f"of the model ({default})")
    add("--device", default="auto", help="auto, cpu, cuda, ... (auto)")
    add("--dtype", choices=list(hellaswag.DTYPES), help="of both (bfloat16 on GPUs that have it, else float32)")
    args = parser.parse_args()
    from transformers import GPT2Config, GPT2LMHeadModel

    device = hellaswag.pick_device(args.device)
    if args.dtype is None:
        args.dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    config = GPT2Config(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    theirs = GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # as spread out as a trained model's
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = hellaswag.GPT(directory, device, hellaswag.DTYPES[args.dtype])
    ours.pack()
    theirs.to(device, hellaswag.DTYPES[args.dtype])
    enc = hellaswag.get_tokenizer("gpt2")
    with open(args.source, encoding="utf-8") as file:
        examples = make_examples(enc.encode_ordinary(file.read()), enc, args.examples, args.alike)
    batch_tokens = args.batch_tokens or (2048 if device.type == "cpu" else 65536)

    def shared(part):
        scores = hellaswag.score_hellaswag(ours, part, ours.config["n_positions"], batch_tokens, device)
        return [scores for _, *scores in sorted(scores)]

    methods = {"plain": lambda part: plain(theirs, part, device), "hellaswag.py": shared}
    results, seconds = {name: [] for name in methods}, {name: [] for name in methods}
    for method in methods.values():
        method(examples[:8])  # warms up
    n_parts = args.parts or -(-args.examples // 25)
    examples.sort(key=lambda example: len(example[2]) + sum(map(len, example[3])))
    for i in range(n_parts):
        part = examples[i * args.examples // n_parts : (i + 1) * args.examples // n_parts]
        for name, method in methods.items():
            start = time.perf_counter()
            results[name] += method(part)  # lists of numbers: the device is done
            seconds[name].append(time.perf_counter() - start)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    lengths = [len(context) for *_, context, _ in examples], [len(e) for *_, endings in examples for e in endings]
    means = (f"{statistics.mean(part):.1f} ({min(part)} to {max(part)})" for part in lengths)
    print("{} examples, contexts of {} tokens, endings of {}".format(args.examples, *means))
    head = theirs.lm_head.weight.numel()
    body = theirs.num_parameters() - head - theirs.transformer.wpe.weight.numel()
    plain_cost = sum(4 * (len(context) + max(map(len, endings))) * (body + head) for *_, context, endings in examples)
    extra = [sum(len(ending) - 1 for ending in endings) for *_, endings in examples]  # tokens behind the context
    our_cost = sum((len(e[2]) + n) * body + (1 + n) * head for e, n in zip(examples, extra, strict=True))
    pairs = list(zip(results["plain"], results["hellaswag.py"], strict=True))
    for k, what in enumerate(("summed", "mean")):
        same = sum(a[k].index(min(a[k])) == b[k].index(min(b[k])) for a, b in pairs)
        worst = max(abs(x - y) for a, b in pairs for x, y in zip(a[k], b[k], strict=True))
        print(f"{what} losses: largest difference {worst:.1e} nats, {same} of {len(pairs)} predictions the same")
    other, mine = (args.examples / sum(times) for times in seconds.values())
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    what = f"HellaSwag, {theirs.num_parameters() / 1e6:.0f}M, {args.examples:,} examples, {args.dtype}"
    print(
        f"\n{HEADER}\n| {what} | {mine:.2f} examples/s | transformers one by one {other:.2f} examples/s | {ratio} | "
        f"{plain_cost / our_cost:.2f} by multiplications alone, {same} of {len(pairs)} predictions the same |"
    )


if __name__ == "__main__":
    main()
