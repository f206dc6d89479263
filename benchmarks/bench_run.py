"""
train_gpt2.py as a user starts it: seconds from launch to the first step, tokens/s, memory, for some settings.

    python prepare_shakespeare.py
    python benchmarks/bench_run.py -- --preset shakespeare                     # two CPU cores; a minute
    python benchmarks/bench_run.py --device cuda -- --micro_batch_size 64      # GPT-2 124M on real tokens
    python benchmarks/bench_run.py --setting= --setting=--compile -- --preset shakespeare

One run of --steps steps after another, each a process of its own. What stands after -- goes to all of them. The time
to the end of the first step includes Python's start and imports, opening and checking the shards, the weights, the
search for a micro-batch (on a GPU, where --micro_batch_size does not give it), measuring the matmul peak for half a
second, one window of validation, two samples of one token, compiling (less what torch's cache has of it from earlier
runs), and the step. tokens/s and the share of the matmul peak are medians of the steps from --skip on, as log.txt and
the screen show them. Memory is what the GPU lacks at most, the CUDA context and the allocator's reserve included, or
on a CPU the process's largest resident size. A run that fails is a row that says so, and the exit status is 1.
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

TRAINER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "train_gpt2.py")
SETTINGS = {
    "cpu": ["", "--compile", "--optimizer muon --schedule linear", "--dtype bfloat16"],
    "cuda": ["", "--no-compile", "--optimizer muon --schedule linear", "--dtype float32"],
}
MFU = re.compile(r"step +(\d+) \| loss: .* \| mfu: (\S+)%")


class MemoryWatch(threading.Thread):
    """The most bytes of the GPU's memory that were in use while it ran, beyond those at its start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.free = self.least = torch.cuda.mem_get_info()[0]
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(0.02):
            self.least = min(self.least, torch.cuda.mem_get_info()[0])

    def stop(self):
        self.done.set()
        self.join()
        return self.free - self.least


def train(flags, device, skip):
    """A run's (seconds to the end of its first step, median tokens/s, median mfu in %, peak bytes), or its status."""
    with tempfile.TemporaryDirectory() as log_dir:
        start, first, mfu = time.perf_counter(), None, []
        watch = MemoryWatch() if device == "cuda" else None
        if watch:
            watch.start()
        command = [sys.executable, TRAINER, *flags, "--log_dir", log_dir]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            found = MFU.match(line)
            if found:
                first = first or time.perf_counter() - start
                mfu += [float(found[2])] if int(found[1]) >= skip else []
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        memory = watch.stop() if watch else usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if process.returncode:
            return process.returncode
        with open(f"{log_dir}/log.txt", encoding="utf-8") as file:
            lines = [line.split() for line in file]
        speeds = [float(value) for step, kind, value in lines if kind == "tok/s" and int(step) >= skip]
        return first, statistics.median(speeds), statistics.median(mfu), memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of each run (30)")
    parser.add_argument("--skip", type=int, default=5, help="first steps that are not counted (5)")
    parser.add_argument("--device", choices=list(SETTINGS), default="cpu", help="(cpu)")
    setting = "flags of a run, once for each; the first is what the others are compared with (four runs)"
    parser.add_argument("--setting", action="append", metavar="FLAGS", help=setting)
    parser.add_argument("flags", nargs="*", help="flags of train_gpt2.py for all runs, after --")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    if args.skip >= args.steps:
        parser.error(f"--skip {args.skip} leaves none of --steps {args.steps}")
    never = args.steps + 1
    common = f"--max_steps {args.steps} --eval_interval {never} --checkpoint_interval {never} --log_interval 1 "
    common += f"--val_tokens 1 --max_new_tokens 1 --hellaswag_interval 0 --no-plot --device {args.device}"
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, {args.steps} steps, {shlex.join(args.flags)}\n", flush=True)
    print("| setting | to the first step, s | tokens/s | of the matmul peak | peak memory, GB | ratio of tokens/s |")
    print("|---|---|---|---|---|---|", flush=True)
    speeds, failed = [], False
    for setting in args.setting or SETTINGS[args.device]:
        result = train([*common.split(), *args.flags, *shlex.split(setting)], args.device, args.skip)
        label = setting or "as it is"
        if isinstance(result, int):
            print(f"| {label} | failed: exit status {result}, its messages are above | | | | |", flush=True)
            failed, speeds = True, speeds or [None]  # a first run that failed leaves nothing to compare with
            continue
        first, speed, mfu, memory = result
        speeds.append(speed)
        ratio = f"{speed / speeds[0]:.2f}" if speeds[0] else ""
        figures = f"{first:.1f} | {speed:,.1f} | {mfu:.1f}% | {memory / 1e9:.2f} | {ratio}"
        print(f"| {label} | {figures} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
