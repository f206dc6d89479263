"""
Measure how many of AdamW's tokens Muon needs to reach AdamW's final loss, in the same model on the same batches.

    python benchmarks/bench_recipe.py --steps 500 -- --preset shakespeare              # two CPU cores; half an hour
    python benchmarks/bench_recipe.py --steps 190 --adamw_rates 6e-4 1.2e-3 2.4e-3 --muon_rates 1e-3 2e-3 4e-3 \\
        -- --val_tokens 1048576                                             # GPT-2 124M, 100M tokens per run; one GPU

AdamW with the cosine schedule runs for --steps steps with each of --adamw_rates and the first of --seeds, then with the
best rate and all seeds. Muon with the linear schedule runs for each of --fractions of the steps: all --muon_rates are
tried at the largest fraction, and the best one is used for all fractions and seeds. Schedule and warmup are scaled to
the length of each run. Flags after -- go to all runs. Each run has a directory under --out_dir; the same command
continues where it was stopped, and reads the loss of a finished run from its log.txt. Prints both sweeps, the mean and
range over the seeds, and the smallest fraction whose mean is not above AdamW's. A run whose loss becomes NaN counts as
infinite.
"""

import argparse
import glob
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time

from common import ROOT

SCHEDULES = {"adamw": "cosine", "muon": "linear"}


def final_loss(log_dir, steps):
    """Return the validation loss of a finished run, infinity if it is NaN, or None if the run is not finished."""
    if not os.path.exists(f"{log_dir}/log.txt"):
        return None
    with open(f"{log_dir}/log.txt", encoding="utf-8") as file:
        match = re.search(rf"^{steps} val (\S+)$", file.read(), re.M)
    if match is None:
        return None
    loss = float(match[1])
    return math.inf if math.isnan(loss) else loss


def train(optimizer, rate, steps, seed, args):
    """Return the final validation loss of one run. Trains it, or continues it, if it is not finished."""
    log_dir = f"{args.out_dir}/{optimizer}_rate_{rate:g}_steps_{steps}_seed_{seed}"
    loss = final_loss(log_dir, steps)
    start = time.perf_counter()
    if loss is None:
        command = [sys.executable, f"{ROOT}/train_gpt2.py", *args.flags, "--resume", "--log_dir", log_dir]
        command += ["--optimizer", optimizer, "--schedule", SCHEDULES[optimizer], "--learning_rate", str(rate)]
        command += ["--max_steps", str(steps), "--warmup_steps", str(max(1, round(args.warmup * steps)))]
        command += ["--seed", str(seed), "--hellaswag_interval", "0", "--keep_checkpoints", "1"]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        print(done.stderr, end="", file=sys.stderr)
        loss = final_loss(log_dir, steps)
        if re.search(r"warning: step \d+, rank \d+: loss", done.stderr):
            loss = math.inf  # it diverged
        if loss is None:
            sys.exit(f"error: the run in {log_dir} ended with status {done.returncode}: start the same command again")
    seconds = time.perf_counter() - start
    print(f"{optimizer}, rate {rate:g}, {steps} steps, seed {seed}: {loss:.4f} ({seconds:.0f} s)", file=sys.stderr)
    return loss


def sweep(optimizer, rates, steps, args):
    """Train with each rate and the first seed. Prints a table and returns the best rate."""
    losses = {}
    for rate in rates:
        losses[rate] = train(optimizer, rate, steps, args.seeds[0], args)
    best = min(losses, key=losses.get)
    print(f"\n| {optimizer}, {SCHEDULES[optimizer]}, {steps} steps: rate | val loss, seed {args.seeds[0]} |")
    print("|---|---|")
    for rate, loss in losses.items():
        shown = f"**{loss:.4f}**" if rate == best else f"{loss:.4f}"
        print(f"| {rate:g} | {shown} |")
    if len(rates) > 1 and best in (min(rates), max(rates)):
        print(f"\n{best:g} is at the end of the range: a better rate may lie beyond.")
    return best


def train_all_seeds(optimizer, rate, steps, args):
    """Train with all seeds. Returns (mean of the losses, row of the table)."""
    losses = [train(optimizer, rate, steps, seed, args) for seed in args.seeds]
    mean = statistics.mean(losses)
    values = f"{mean:.4f} ({min(losses):.4f} to {max(losses):.4f})"
    return mean, f"| {optimizer}, {rate:g} | {steps / args.steps:.2f} | {steps} | {values} |"


def check_out_dir(args):
    """Exit if --out_dir contains runs with other flags."""
    os.makedirs(args.out_dir, exist_ok=True)
    settings = {"warmup": args.warmup, "flags": args.flags}
    path = f"{args.out_dir}/settings.json"
    if not glob.glob(f"{args.out_dir}/*/log.txt"):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(settings, file)
    with open(path, encoding="utf-8") as file:
        saved = json.load(file)
    if saved != settings:
        sys.exit(f"error: {args.out_dir} has runs with {saved}, not {settings}: choose another --out_dir")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    adamw_rates = [1e-3, 2e-3, 4e-3, 8e-3]
    muon_rates = [4e-3, 8e-3, 1.6e-2, 3.2e-2]
    fractions = [0.3, 0.4, 0.5, 0.6]
    seeds = [1337, 1338, 1339]
    add("--steps", type=int, default=500, help="steps of the AdamW runs (default: 500)")
    add("--adamw_rates", type=float, nargs="+", default=adamw_rates, help=f"learning rates (default: {adamw_rates})")
    add("--muon_rates", type=float, nargs="+", default=muon_rates, help=f"learning rates (default: {muon_rates})")
    add("--fractions", type=float, nargs="+", default=fractions, help=f"of AdamW's steps (default: {fractions})")
    add("--seeds", type=int, nargs="+", default=seeds, help=f"random seeds (default: {seeds})")
    add("--warmup", type=float, default=0.04, help="warmup as a fraction of a run's steps (default: 0.04)")
    add("--out_dir", default="log_recipe", help="directory of the runs (default: log_recipe)")
    add("flags", nargs="*", help="flags of train_gpt2.py for all runs, after --")
    return parser.parse_args()


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback; the run saves a checkpoint
    args = parse_args()
    check_out_dir(args)

    # AdamW: the best rate, then all seeds
    rate = sweep("adamw", args.adamw_rates, args.steps, args)
    goal, row = train_all_seeds("adamw", rate, args.steps, args)
    rows = [row]

    # Muon: the best rate at the largest fraction, then all fractions and seeds
    fractions = sorted(args.fractions, reverse=True)
    rate = sweep("muon", args.muon_rates, round(fractions[0] * args.steps), args)
    enough = []
    for fraction in fractions:
        mean, row = train_all_seeds("muon", rate, round(fraction * args.steps), args)
        rows.append(row)
        if mean <= goal:
            enough.append(fraction)

    print(f"\n| recipe | fraction of tokens | steps | val loss, mean of {len(args.seeds)} seeds (range) |")
    print("|---|---|---|---|", *rows, sep="\n")
    smallest = min(enough, default="none of these")
    print(f"\nSmallest fraction of AdamW's tokens that reaches its {goal:.4f}: {smallest}")


if __name__ == "__main__":
    main()
