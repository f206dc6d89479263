"""
Measure train_gpt2.py as a user starts it: time to the first step, tokens/s and memory, for several settings.

    python prepare_shakespeare.py
    python benchmarks/bench_run.py -- --preset shakespeare                     # two CPU cores; a minute
    python benchmarks/bench_run.py --device cuda -- --data_dir edu_fineweb10B  # GPT-2 124M on one GPU
    python benchmarks/bench_run.py --setting= --setting=--compile -- --preset shakespeare

Each setting is a run of --steps steps in a process of its own. Flags after -- go to all runs. The time to the end of
the first step includes Python's start, imports, checking the shards, the search for a micro-batch size on a GPU, a
validation of one window, two samples of one token, and compiling. tokens/s are the median of the steps from --skip
on. Memory is the largest amount that the GPU lacked during the run, with the CUDA context and what the allocator
reserves, or on a CPU the process's peak resident memory. A failed run is a row that says so; the exit status is
then 1.
"""

import argparse
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import torch
from common import ROOT, machine_name

SETTINGS = {
    "cpu": ["", "--compile", "--optimizer adamw --schedule cosine", "--dtype bfloat16"],
    "cuda": ["", "--no-compile", "--optimizer muon --schedule linear", "--dtype float32"],
}


class GPUMemoryWatch(threading.Thread):
    """Polls the GPU's free memory."""

    def __init__(self):
        super().__init__(daemon=True)
        self.free_at_start, _ = torch.cuda.mem_get_info()
        self.least_free = self.free_at_start
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(0.02):
            free, _ = torch.cuda.mem_get_info()
            self.least_free = min(self.least_free, free)

    def stop(self):
        """Stop polling. Returns the most bytes that were in use since the start."""
        self.done.set()
        self.join()
        return self.free_at_start - self.least_free


def train(flags, device, skip):
    """Run the trainer. Returns (exit status, seconds to the end of the first step, tokens/s, peak bytes)."""
    with tempfile.TemporaryDirectory() as log_dir:
        start = time.perf_counter()
        first = None
        watch = GPUMemoryWatch() if device == "cuda" else None
        if watch:
            watch.start()
        command = [sys.executable, f"{ROOT}/train_gpt2.py", *flags, "--log_dir", log_dir]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if first is None and re.match(r"step +\d+ \| loss: ", line):
                first = time.perf_counter() - start
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        memory = watch.stop() if watch else 1024 * usage.ru_maxrss
        if process.returncode:
            return process.returncode, None, None, None
        speeds = []
        with open(f"{log_dir}/log.txt", encoding="utf-8") as file:
            for line in file:
                step, kind, value = line.split()
                if kind == "tok/s" and int(step) >= skip:
                    speeds.append(float(value))
    return 0, first, statistics.median(speeds), memory


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=30, help="steps per run (default: 30)")
    add("--skip", type=int, default=5, help="first steps that do not count (default: 5)")
    add("--device", choices=list(SETTINGS), default="cpu", help="device (default: cpu)")
    add("--setting", action="append", metavar="FLAGS", help="flags of one run; give it once per run (default: four)")
    add("flags", nargs="*", help="flags of train_gpt2.py for all runs, after --")
    args = parser.parse_args()
    if args.skip >= args.steps:
        parser.error(f"--skip {args.skip} must be below --steps {args.steps}")
    return args


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    args = parse_args()
    never = args.steps + 1
    common_flags = shlex.split(
        f"--max_steps {args.steps} --eval_interval {never} --checkpoint_interval {never} --log_interval 1 "
        f"--val_tokens 1 --max_new_tokens 1 --hellaswag_interval 0 --device {args.device}"
    )
    print(f"torch {torch.__version__}, {machine_name(args.device)}, {args.steps} steps, {shlex.join(args.flags)}\n")
    print("| setting | to the first step, s | tokens/s | peak memory, GB | ratio of tokens/s to the first row |")
    print("|---|---|---|---|---|", flush=True)
    reference = None  # tokens/s of the first run
    any_failed = False
    for number, setting in enumerate(args.setting or SETTINGS[args.device]):
        label = setting or "default"
        flags = [*common_flags, *args.flags, *shlex.split(setting)]
        status, first, speed, memory = train(flags, args.device, args.skip)
        if status:
            print(f"| {label} | failed with exit status {status}: see the messages above | | | |", flush=True)
            any_failed = True
            continue
        if number == 0:
            reference = speed
        ratio = f"{speed / reference:.2f}" if reference else ""
        print(f"| {label} | {first:.1f} | {speed:,.1f} | {memory / 1e9:.2f} | {ratio} |", flush=True)
    sys.exit(any_failed)


if __name__ == "__main__":
    main()
