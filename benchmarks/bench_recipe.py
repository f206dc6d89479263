"""
Measure how many of AdamW's tokens Muon needs to reach AdamW's final loss, in the same model on the
same batches.

    # two CPU cores; half an hour
    python benchmarks/bench_recipe.py --steps 500 -- --preset shakespeare
    # GPT-2 124M, 100M tokens per run; one GPU
    python benchmarks/bench_recipe.py --steps 190 --adamw_rates 6e-4 1.2e-3 2.4e-3 \\
        --muon_rates 1e-3 2e-3 4e-3 -- --val_tokens 1048576

AdamW with the cosine schedule runs for --steps steps with each of --adamw_rates and the first of
--seeds, then with the best rate and all seeds. Muon with the schedule wsd runs for each of
--fractions of the steps: all --muon_rates are tried at the largest fraction, and the best one is
used for all fractions and seeds. Schedule and warmup are scaled to the length of each run. Flags
after -- go to all runs. Each run has a directory under --out_dir, and the same command continues
where it was stopped. Prints both sweeps, the mean and range over the seeds, and the smallest
fraction whose mean is not above AdamW's. A run whose loss becomes NaN counts as infinite. With
--bfloat16_residual, AdamW is also run with the residual stream in bfloat16 (bfloat16_residual.py).
"""

import math
import re
import signal
import statistics
import subprocess
import sys
import time

from common import ROOT, make_parser

# script and flags of each recipe
RECIPES = {
    "adamw": (f"{ROOT}/train_gpt2.py", ["--optimizer", "adamw", "--schedule", "cosine"]),
    "muon": (f"{ROOT}/train_gpt2.py", ["--optimizer", "muon", "--schedule", "wsd"]),
    "adamw_bfloat16_residual": (
        f"{ROOT}/benchmarks/bfloat16_residual.py",
        ["--optimizer", "adamw", "--schedule", "cosine"],
    ),
}


def train(recipe, rate, steps, seed, args):
    """Return the final validation loss of one run, which is continued if it exists already."""
    script, flags = RECIPES[recipe]
    log_dir = f"{args.out_dir}/{recipe}_rate_{rate:g}_steps_{steps}_seed_{seed}"
    command = [sys.executable, script, *args.flags, *flags, "--resume", "--log_dir", log_dir]
    command += ["--seed", str(seed), "--learning_rate", str(rate), "--max_steps", str(steps)]
    command += ["--warmup_steps", str(max(1, round(args.warmup * steps)))]
    command += ["--hellaswag_interval", "0", "--keep_checkpoints", "1"]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    print(done.stderr, end="", file=sys.stderr)
    if done.returncode == 0:
        with open(f"{log_dir}/log.txt", encoding="utf-8") as file:
            loss = float(re.search(rf"^{steps} val (\S+)$", file.read(), re.M)[1])
    elif re.search(r"error: step \d+", done.stderr):
        loss = math.inf  # the training diverged
    else:
        sys.exit(f"error: {log_dir} ended with status {done.returncode}: repeat the same command")
    seconds = time.perf_counter() - start
    name = f"{recipe}, rate {rate:g}, {steps} steps, seed {seed}"
    print(f"{name}: {loss:.4f} ({seconds:.0f} s)", file=sys.stderr)
    return math.inf if math.isnan(loss) else loss


def sweep(recipe, rates, steps, args):
    """Train with each rate and the first seed. Prints a table. Returns (best rate, its loss)."""
    losses = {rate: train(recipe, rate, steps, args.seeds[0], args) for rate in rates}
    best = min(losses, key=losses.get)
    print(f"\n| {recipe}, {steps} steps: rate | val loss, seed {args.seeds[0]} |\n|---|---|")
    for rate, loss in losses.items():
        shown = f"**{loss:.4f}**" if rate == best else f"{loss:.4f}"
        print(f"| {rate:g} | {shown} |", flush=True)
    if len(rates) > 1 and best in (min(rates), max(rates)):
        print(f"\n{best:g} is at the end of the range: a better rate may lie beyond.")
    return best, losses[best]


def train_all_seeds(recipe, rate, steps, args, first=None):
    """Train with all seeds, except the first one if its loss is given.

    Returns (mean of the losses, row of the table).
    """
    losses = [] if first is None else [first]
    losses += [train(recipe, rate, steps, seed, args) for seed in args.seeds[len(losses) :]]
    mean = statistics.mean(losses)
    values = f"{mean:.4f} ({min(losses):.4f} to {max(losses):.4f})"
    return mean, f"| {recipe}, {rate:g} | {steps / args.steps:.2f} | {steps} | {values} |"


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    adamw_rates = [1e-3, 2e-3, 4e-3, 8e-3]
    muon_rates = [4e-3, 8e-3, 1.6e-2, 3.2e-2]
    fractions = [0.3, 0.4, 0.5, 0.6]
    residual_help = "also run AdamW with the residual stream in bfloat16"
    add("--steps", type=int, default=500, help="steps of the AdamW runs")
    add("--adamw_rates", type=float, nargs="+", default=adamw_rates, help="learning rates")
    add("--muon_rates", type=float, nargs="+", default=muon_rates, help="learning rates")
    add("--fractions", type=float, nargs="+", default=fractions, help="of AdamW's steps")
    add("--seeds", type=int, nargs="+", default=[1337, 1338, 1339], help="random seeds")
    add("--warmup", type=float, default=0.04, help="warmup as a fraction of a run's steps")
    add("--bfloat16_residual", action="store_true", help=residual_help)
    add("--out_dir", default="log_recipe", help="directory of the runs")
    add("flags", nargs="*", help="flags of train_gpt2.py for all runs, after --")
    return parser.parse_args()


def main():
    # Ctrl-C ends without a traceback; the run that it interrupts saves a checkpoint
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    args = parse_args()

    # AdamW: the best rate, then all seeds
    rate, loss = sweep("adamw", args.adamw_rates, args.steps, args)
    goal, row = train_all_seeds("adamw", rate, args.steps, args, loss)
    rows = [row]
    if args.bfloat16_residual:
        _, row = train_all_seeds("adamw_bfloat16_residual", rate, args.steps, args)
        rows.append(row)

    # Muon: the best rate at the largest fraction, then all fractions and seeds
    fractions = sorted(args.fractions, reverse=True)
    rate, loss = sweep("muon", args.muon_rates, round(fractions[0] * args.steps), args)
    enough = []
    for fraction in fractions:
        first = loss if fraction == fractions[0] else None
        mean, row = train_all_seeds("muon", rate, round(fraction * args.steps), args, first)
        rows.append(row)
        if mean <= goal:
            enough.append(fraction)

    title = f"val loss, mean of {len(args.seeds)} seeds (range)"
    print(f"\n| recipe | fraction of tokens | steps | {title} |")
    print("|---|---|---|---|", *rows, sep="\n")
    smallest = min(enough, default="none of these")
    print(f"\nSmallest fraction of AdamW's tokens that reaches its {goal:.4f}: {smallest}")


if __name__ == "__main__":
    main()
