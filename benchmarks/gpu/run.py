"""
Run the scripts and benchmarks on a GPU as a user starts them, each in a process of its own.

    python benchmarks/gpu/run.py --data_dir edu_fineweb10B           # one GPU; 9 minutes
    python benchmarks/gpu/run.py --only train hellaswag --out_dir results
    python benchmarks/gpu/run.py --device cpu --tiny                 # tries the script itself; two minutes

The steps: 12 training steps of GPT-2 124M with the search for a micro-batch size, validation, HellaSwag and a
checkpoint; hellaswag.py and sample.py on that checkpoint in two dtypes; the preset shakespeare to its end; a part of
lesson 2; then bench_sample.py, bench_hellaswag.py, bench_step.py at B=32, and bench_run.py. HellaSwag's place is taken
by examples of its shape, cut from input.txt. Without --data_dir the data are the GPT-2 tokens of input.txt.

Every command has a line that begins with "ok" or "FAIL", with its seconds, and under it what its output ends with.
--out_dir keeps the whole outputs. After --seconds no new command starts, and one that runs has 80 seconds more. The
exit status is 1 if a command failed.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time

from gpu_common import BENCHMARKS, ROOT, machine_name, make_data, make_parser, write_hellaswag

# isort: split
import torch

import train_gpt2

TINY_MODEL = "--n_layer 1 --n_head 2 --n_embd 32"
TINY_TRAINING = f"{TINY_MODEL} --block_size 256 --total_batch_size 512 --micro_batch_size 2 --val_tokens 256"


class Commands:
    """The commands, and the directory in which they run."""

    def __init__(self, args, directory):
        self.args = args
        self.directory = directory
        self.model = f"{directory}/log"
        self.examples = f"{directory}/examples.jsonl"
        self.data_dir = os.path.abspath(args.data_dir) if args.data_dir else f"{directory}/data"
        self.byte_data_dir = f"{directory}/shakespeare"
        self.commands = []  # (step, command, number of its last lines to print, timeout in seconds)

    def add(self, step, script, flags, num_lines, timeout, tiny=""):
        """Add a command. The flags in tiny are added at tiny size."""
        # tiny flags come before "--", behind which bench_run.py expects the flags of the trainer
        path = f"{BENCHMARKS}/{script}.py" if script.startswith("bench_") else f"{ROOT}/{script}.py"
        before_dashes, dashes, after_dashes = flags.partition("-- ")
        if self.args.tiny:
            before_dashes = f"{before_dashes} {tiny} "
        line = before_dashes + dashes + after_dashes
        line = f"--device {self.args.device} {line}"
        self.commands.append((step, [sys.executable, path, *shlex.split(line)], num_lines, timeout))

    def add_scripts(self):
        """Add the scripts as a user starts them."""
        # paths may contain spaces
        data = shlex.quote(self.data_dir)
        examples = shlex.quote(self.examples)
        model = shlex.quote(self.model)
        self.add("prepare", "hellaswag", f"--prepare --data {examples}", 1, 60)
        # everything that a long run does, in 12 steps
        flags = f"--data_dir {data} --log_dir {model} --max_steps 12 --warmup_steps 4 --eval_interval 12"
        self.add("train", "train_gpt2", f"{flags} --hellaswag_interval 12", 24, 250, f"{TINY_TRAINING} --max_steps 2")
        for dtype in ("bfloat16", "float32"):
            flags = f"--model {model} --data {examples} --dtype {dtype}"
            self.add("hellaswag", "hellaswag", flags, 1, 100, "--limit 8")
        for dtype in ("bfloat16", "float32"):
            for num_samples in (1, 64):
                flags = f"--model {model} --dtype {dtype} --num_samples {num_samples} --max_new_tokens 100 --prompt The"
                self.add("sample", "sample", flags, 1, 100, "--num_samples 2 --max_new_tokens 4")
        # the whole preset shakespeare
        flags = f"--preset shakespeare --data_dir {shlex.quote(self.byte_data_dir)} --log_dir {model}_shakespeare"
        tiny = f"{TINY_TRAINING} --max_steps 2 --log_interval 1 --max_new_tokens 4"
        self.add("shakespeare", "train_gpt2", f"{flags} --log_interval 500", 12, 150, tiny)
        # lesson 2, a quarter of its steps
        flags = f"--input {shlex.quote(os.path.join(ROOT, 'input.txt'))} --preset full --max_steps 500"
        self.add("gpt", "gpt", flags, 4, 90, "--preset cpu --max_steps 2 --eval_iters 1 --max_new_tokens 4")

    def add_benchmarks(self):
        """Add the benchmarks, at sizes that fit into 80 GB and a few minutes."""
        data = shlex.quote(self.data_dir)
        for dtype in ("bfloat16", "float32"):
            flags = f"--dtype {dtype} --batch_sizes 1 64 --max_new_tokens 64 --rounds 3"
            tiny = f"{TINY_MODEL} --batch_sizes 2 --prompt_tokens 4 --max_new_tokens 4 --rounds 1"
            self.add("bench_sample", "bench_sample", flags, 2, 110, tiny)
        # examples of HellaSwag's shape, cut from input.txt
        source = shlex.quote(os.path.join(ROOT, "input.txt"))
        flags = f"--source {source} --examples 1000 --parts 4"
        self.add("bench_hellaswag", "bench_hellaswag", flags, 1, 100, f"{TINY_MODEL} --examples 4 --parts 1")
        # transformers needs B=32 to fit into 80 GB
        flags = (
            "--dtype bfloat16 --micro_batch_size 32 --block_size 1024 --grad_accum_steps 16 --steps 3 "
            "--only 'ours compiled' 'transformers compiled'"
        )
        tiny = f"{TINY_MODEL} --micro_batch_size 2 --block_size 16 --grad_accum_steps 2 --steps 1 --only ours"
        self.add("bench_step", "bench_step", flags, 3, 240, tiny)
        flags = f"--steps 10 --skip 4 --setting= --setting='--optimizer muon --schedule linear' -- --data_dir {data}"
        # the trainer's own flags for tiny sizes go behind "--"
        if self.args.tiny:
            flags = f"--steps 3 --skip 1 --setting= -- --data_dir {data} {TINY_TRAINING}"
        self.add("bench_run", "bench_run", flags, 2, 150)


def run(step, command, num_lines, timeout, number, args, directory):
    """Run a command and print its line and the end of its output. Returns whether it succeeded."""
    start = time.perf_counter()
    path = f"{args.out_dir or directory}/{number:02d}_{step}.txt"
    with open(path, "w", encoding="utf-8") as output:
        try:
            done = subprocess.run(command, cwd=directory, stdout=output, stderr=subprocess.STDOUT, timeout=timeout)
            reason = f"exit status {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            reason = f"not finished after {timeout:.0f} s"
    # one line about the command, then the end of its output
    seconds = time.perf_counter() - start
    shown = shlex.join([os.path.basename(command[1]), *command[2:]])
    print(f"{'FAIL' if reason else 'ok  '} {step}: {seconds:.1f} s, {shown}", flush=True)
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip() for line in file if line.strip()]
    if reason:
        print(f"     {reason}")
        num_lines = 20
    for line in lines[-num_lines:]:
        print(f"     {line[:300]}", flush=True)
    return reason is None


def parse_args():
    parser = make_parser(__doc__, "token shards of GPT-2's tokenizer (default: made from input.txt)")
    steps = ["train", "hellaswag", "sample", "shakespeare", "gpt"]
    steps += ["bench_sample", "bench_hellaswag", "bench_step", "bench_run"]
    add = parser.add_argument
    add("--only", nargs="+", choices=steps, default=steps, metavar="STEP", help=f"(default: all of {steps})")
    add("--out_dir", help="directory for the outputs of the commands (default: they are not kept)")
    add("--seconds", type=float, default=500, help="start no new command after this time (default: 500)")
    args = parser.parse_args()
    if args.out_dir:
        os.makedirs(args.out_dir, exist_ok=True)
        args.out_dir = os.path.abspath(args.out_dir)
    return args


def main():
    begin = time.perf_counter()
    args = parse_args()
    any_failed = False
    print(f"{machine_name(args.device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        commands = Commands(args, directory)
        commands.add_scripts()
        commands.add_benchmarks()
        # hellaswag.py and sample.py need the model that train writes
        needed = {"hellaswag": {"prepare", "train"}, "sample": {"train"}, "train": {"prepare"}}
        steps = set(args.only)
        for step in args.only:
            steps |= needed.get(step, set())
        # make what the commands read
        if steps & {"train", "bench_run"} and not args.data_dir:
            make_data(commands.data_dir, "gpt2")
        if "shakespeare" in steps:
            make_data(commands.byte_data_dir, "bytes")
        if "train" in steps:
            steps.add("prepare")
            write_hellaswag(commands.examples, train_gpt2.get_tokenizer("gpt2"), 20 if args.tiny else 10042)
        # run them in their order, and stop starting new ones in time
        for number, (step, command, num_lines, timeout) in enumerate(commands.commands):
            if step not in steps:
                continue
            if time.perf_counter() - begin > args.seconds:
                print(f"FAIL {step}: not started, --seconds {args.seconds:g} are over")
                any_failed = True
                continue
            timeout = min(timeout, begin + args.seconds + 80 - time.perf_counter())
            if not run(step, command, num_lines, timeout, number, args, directory):
                any_failed = True
    print(f"{time.perf_counter() - begin:.0f} s")
    sys.exit(any_failed)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    main()
