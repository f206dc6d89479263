"""
Measure train_gpt2.py as a user starts it: time to the first step, tokens/s and memory, for several
settings.

    python prepare_shakespeare.py
    python benchmarks/bench_run.py -- --preset shakespeare      # two CPU cores; a minute
    python benchmarks/bench_run.py --setting= --setting=--compile -- --preset shakespeare
    python benchmarks/bench_run.py --pauses -- --preset shakespeare
    python benchmarks/bench_run.py --device cuda -- --data_dir edu_fineweb10B

Each setting is a run of --steps steps in a process of its own. Flags after -- go to all runs. The
time to the end of the first step includes Python's start, imports, checking the shards, the search
for a micro-batch size on a GPU, a validation of one window, two samples of one token, and
compiling. tokens/s are the median of the steps from --skip on. On a GPU, memory is what the run
used at most, with the CUDA context and what the allocator reserves. On a CPU, it is the peak
resident memory of the process. A failed run is a row that says so; the exit status is then 1. With
--pauses, one run measures the seconds of a checkpoint, a validation with its samples, and
HellaSwag.
"""

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
from dataclasses import dataclass

import torch
from common import ROOT, environment, make_parser

SETTINGS = {
    "cpu": ["", "--compile", "--optimizer adamw --schedule cosine", "--dtype bfloat16"],
    "cuda": ["", "--no-compile", "--optimizer muon --schedule wsd", "--dtype float32"],
}
# Each of these happens alone, before the step with this number. Evaluations also happen at step 0, so
# that what only the first one costs is not measured.
PAUSES = {"checkpoint": 5, "validation": 7, "HellaSwag": 9}


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


@dataclass
class Step:
    """A training step, as the trainer prints it."""

    arrival: float  # seconds from the start of the process to the line
    seconds: float
    speed: float  # tokens/s


def train(flags, device):
    """Run the trainer. Returns (exit status, {number: Step}, peak memory in bytes)."""
    with tempfile.TemporaryDirectory() as log_dir:
        start = time.perf_counter()
        watch = GPUMemoryWatch() if device == "cuda" else None
        if watch:
            watch.start()
        command = [sys.executable, f"{ROOT}/train_gpt2.py", *flags, "--log_dir", log_dir]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        steps = {}
        for line in process.stdout:
            match = re.match(r"step +(\d+) \| loss: .*dt: ([\d.]+)ms \| tok/s: ([\d.]+)", line)
            if match:
                arrival = time.perf_counter() - start
                steps[int(match[1])] = Step(arrival, float(match[2]) / 1000, float(match[3]))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        memory = watch.stop() if watch else 1024 * usage.ru_maxrss
    return process.returncode, steps, memory


def measure_settings(args, flags):
    """Print a row for each setting. Returns whether one of them failed."""
    never = args.steps + 1
    flags += shlex.split(
        f"--max_steps {args.steps} --eval_interval {never} --checkpoint_interval {never} "
        "--hellaswag_interval 0 --val_tokens 1 --max_new_tokens 1"
    )
    print("| setting | to the first step, s | tokens/s | peak memory, GB | ratio to the first row |")
    print("|---|---|---|---|---|", flush=True)
    reference = None  # tokens/s of the first run
    any_failed = False
    for i, setting in enumerate(args.setting or SETTINGS[args.device]):
        label = setting or "default"
        all_flags = [*flags, *args.flags, *shlex.split(setting)]
        status, steps, memory = train(all_flags, args.device)
        if status:
            print(f"| {label} | failed with exit status {status} | | | |", flush=True)
            any_failed = True
            continue
        # the first steps are slower
        speed = statistics.median(steps[number].speed for number in steps if number >= args.skip)
        if i == 0:
            reference = speed
        ratio = f"{speed / reference:.2f}" if reference else ""
        cells = [label, f"{steps[0].arrival:.1f}", f"{speed:,.1f}", f"{memory / 1e9:.2f}", ratio]
        print(f"| {' | '.join(cells)} |", flush=True)
    return any_failed


def measure_pauses(args, flags):
    """Print the seconds of each thing that interrupts the steps. Returns whether the run failed."""
    flags += shlex.split(
        f"--max_steps 10 --checkpoint_interval {PAUSES['checkpoint']} "
        f"--eval_interval {PAUSES['validation']} --hellaswag_interval {PAUSES['HellaSwag']}"
    )
    status, steps, _ = train([*flags, *args.flags], args.device)
    if status:
        print(f"failed with exit status {status}")
        return True
    print("| what | seconds |\n|---|---|")
    for name, number in PAUSES.items():
        # the time between the lines of two steps, without that of the second step itself
        seconds = steps[number].arrival - steps[number - 1].arrival - steps[number].seconds
        print(f"| {name} | {max(0.0, seconds):.2f} |")
    return False


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    settings_help = "flags of one run, may be repeated; without it, there are runs with four settings"
    add("--steps", type=int, default=30, help="steps per run")
    add("--skip", type=int, default=5, help="first steps that do not count")
    add("--device", choices=list(SETTINGS), default="cpu", help="device")
    add("--setting", action="append", metavar="FLAGS", default=[], help=settings_help)
    add("--pauses", action="store_true", help="measure checkpoints and evaluations instead")
    add("flags", nargs="*", help="flags of train_gpt2.py for all runs, after --")
    args = parser.parse_args()
    if args.skip >= args.steps:
        parser.error(f"--skip {args.skip} must be below --steps {args.steps}")
    return args


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    args = parse_args()
    print(f"{environment(args.device)}, {shlex.join(args.flags)}\n")
    flags = ["--log_interval", "1", "--device", args.device]
    measure = measure_pauses if args.pauses else measure_settings
    sys.exit(measure(args, flags))


if __name__ == "__main__":
    main()
