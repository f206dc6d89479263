"""
How many of AdamW's tokens Muon needs to reach AdamW's final loss, in the same model on the same batches.

    python benchmarks/bench_recipe.py --steps 500 -- --preset shakespeare              # two CPU cores; half an hour
    python benchmarks/bench_recipe.py --steps 190 --adamw_rates 6e-4 1.2e-3 2.4e-3 --muon_rates 1e-3 2e-3 4e-3 \\
        -- --val_tokens 1048576                                             # GPT-2 124M, 100M tokens a run; one GPU

AdamW with a cosine runs for --steps with each of --adamw_rates and the first of --seeds, then the best rate with all
of them. Muon with the linear schedule runs for each of --shares of the steps: all --muon_rates are tried at the
largest, and the best is taken for all. Each run's schedule and warmup are of its own length. What stands after --
goes to all runs. Each has a directory under --out_dir, with its last checkpoint; the same command goes on where it
was stopped, and takes the loss of a finished run from its log.txt. Prints both sweeps, the mean and the range over
the seeds, and the smallest share whose mean is not above AdamW's. A run whose loss became nan counts as infinite.
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

TRAINER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "train_gpt2.py")
RECIPES = {"adamw": "cosine", "muon": "linear"}  # each with its schedule


def final_loss(log_dir, steps):
    """The validation loss of a finished run, or None."""
    if not os.path.exists(f"{log_dir}/log.txt"):
        return None
    with open(f"{log_dir}/log.txt", encoding="utf-8") as file:
        found = re.search(rf"^{steps} val (\S+)$", file.read(), re.M)
    loss = float(found[1]) if found else None
    return math.inf if loss is not None and math.isnan(loss) else loss


def train(optimizer, rate, steps, seed, args):
    """The final validation loss of one run, which is trained, or trained on, if it is not there."""
    log_dir = f"{args.out_dir}/{optimizer}_rate_{rate:g}_steps_{steps}_seed_{seed}"
    loss, start = final_loss(log_dir, steps), time.perf_counter()
    if loss is None:
        flags = f"--optimizer {optimizer} --schedule {RECIPES[optimizer]} --learning_rate {rate} --max_steps {steps} "
        flags += f"--warmup_steps {max(1, round(args.warmup * steps))} --seed {seed} --resume"
        command = [sys.executable, TRAINER, "--no-plot", "--hellaswag_interval", "0", "--keep_checkpoints", "1"]
        command += [*args.flags, *flags.split(), "--log_dir", log_dir]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        print(done.stderr, end="", file=sys.stderr)
        diverged = re.search(r"warning: step \d+, rank \d+: loss", done.stderr)
        loss = math.inf if diverged else final_loss(log_dir, steps)
        if loss is None:
            sys.exit(f"error: the run in {log_dir} ended early, with status {done.returncode}: start again to go on")
    taken = time.perf_counter() - start
    print(f"{optimizer}, rate {rate:g}, {steps} steps, seed {seed}: {loss:.4f} ({taken:.0f} s)", file=sys.stderr)
    return loss


def sweep(optimizer, rates, steps, args):
    """The best of rates with the first seed; prints the table of all."""
    losses = {rate: train(optimizer, rate, steps, args.seeds[0], args) for rate in rates}
    best = min(losses, key=losses.get)
    print(f"\n| {optimizer}, {RECIPES[optimizer]}, {steps} steps: learning rate | val loss, seed {args.seeds[0]} |")
    print("|---|---|")
    for rate, loss in losses.items():
        print(f"| {rate:g} | {f'**{loss:.4f}**' if rate == best else f'{loss:.4f}'} |")
    if len(rates) > 1 and best in (min(rates), max(rates)):
        print(f"\n{best:g} is at the end of the rates: a better one may lie beyond.")
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=500, help="of AdamW's runs (500)")
    add("--adamw_rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3], help="(1e-3 2e-3 4e-3 8e-3)")
    add("--muon_rates", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2, 3.2e-2], help="(4e-3 8e-3 1.6e-2 3.2e-2)")
    add("--shares", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6], help="of the steps, Muon's (0.3 0.4 0.5 0.6)")
    add("--seeds", type=int, nargs="+", default=[1337, 1338, 1339], help="of weights and batches (1337 1338 1339)")
    add("--warmup", type=float, default=0.04, help="share of a run's own steps (0.04)")
    add("--out_dir", default="log_recipe", help="directory of the runs (log_recipe)")
    add("flags", nargs="*", help="flags of train_gpt2.py for all runs, after --")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback; the run saves where it is
    os.makedirs(args.out_dir, exist_ok=True)
    settings, path = {"warmup": args.warmup, "flags": args.flags}, f"{args.out_dir}/settings.json"
    if not glob.glob(f"{args.out_dir}/*/log.txt"):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(settings, file)
    with open(path, encoding="utf-8") as file:
        if (was := json.load(file)) != settings:
            sys.exit(f"error: {args.out_dir} has runs with {was}, not {settings}: name another --out_dir")

    def all_seeds(optimizer, rate, steps):
        losses = [train(optimizer, rate, steps, seed, args) for seed in args.seeds]
        mean = statistics.mean(losses)
        rows.append(f"| {optimizer}, {rate:g} | {steps / args.steps:.2f} | {steps} | {mean:.4f} ")
        rows[-1] += f"({min(losses):.4f} to {max(losses):.4f}) |"
        return mean

    rows, shares = [], sorted(args.shares, reverse=True)
    rate = sweep("adamw", args.adamw_rates, args.steps, args)
    goal = all_seeds("adamw", rate, args.steps)
    rate = sweep("muon", args.muon_rates, round(shares[0] * args.steps), args)
    means = {share: all_seeds("muon", rate, round(share * args.steps)) for share in shares}
    print(f"\n| recipe | share of tokens | steps | val loss, mean of {len(args.seeds)} seeds (range) |")
    print("|---|---|---|---|", *rows, sep="\n")
    enough = [share for share, mean in means.items() if mean <= goal]
    print(f"\nSmallest share of AdamW's tokens that reaches its {goal:.4f}: {min(enough, default='none of these')}")


if __name__ == "__main__":
    main()
