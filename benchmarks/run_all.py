"""
Run the benchmarks that compare the scripts with other implementations, and join their rows to one table.

    python benchmarks/run_all.py                                    # a quarter of an hour on two CPU cores
    python benchmarks/run_all.py --device cuda                      # one GPU; ten minutes
    python benchmarks/run_all.py --only step sample --dtypes float32
    python benchmarks/run_all.py --quick                            # a tiny model, to try everything; two minutes

Each row has the machine, the task, our speed, the speed of the peer in the same dtype, the median ratio of the two with
its range, and the fraction of what the machine could do at most. bench_step.py, bench_sample.py and bench_hellaswag.py
run once per dtype, and bench_fineweb.py once. The table is printed at the end. What the benchmarks print meanwhile goes
to stderr. Tokenizing takes the parquet files of --source or, without them, input.txt in documents of 5,000 characters.
GPT-2's vocabulary is needed (a network, or TIKTOKEN_CACHE_DIR). A benchmark that fails is a row that says so, and the
exit status is then 1.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import tempfile
import time

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import HEADER, ROOT, failed_row, machine_name

BENCHMARKS = ["step", "sample", "hellaswag", "fineweb"]
FLAGS = {  # of each benchmark on each device
    "cpu": {
        "step": "--device cpu",
        "sample": "--device cpu --max_new_tokens 64",
        "hellaswag": "--device cpu --examples 50",
        "fineweb": "",
    },
    "cuda": {
        # 524,288 tokens per step, as in the preset gpt2; transformers fits into 80 GB at B=32
        "step": "--device cuda --micro_batch_size 32 --block_size 1024 --grad_accum_steps 16 --steps 3",
        "sample": "--device cuda --batch_sizes 1 4 64",
        "hellaswag": "--device cuda --examples 2000 --parts 10",
        "fineweb": "",
    },
}
# float32 and bfloat16 on CPUs; on GPUs the trainer computes in bfloat16
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16"]}
TINY_MODEL = "--n_layer 1 --n_head 2 --n_embd 32"
QUICK_FLAGS = {  # added with --quick
    "step": f"{TINY_MODEL} --micro_batch_size 2 --block_size 16 --grad_accum_steps 2 --steps 1 --only ours",
    "sample": f"{TINY_MODEL} --prompt_tokens 4 --max_new_tokens 4 --rounds 1",
    "hellaswag": f"{TINY_MODEL} --examples 4 --parts 1",
    "fineweb": "--megabytes 1 --rounds 1",
}


def write_documents(path):
    """Write a parquet file with 40 MB of documents, cut from input.txt."""
    with open(f"{ROOT}/input.txt", encoding="utf-8") as file:
        text = file.read()
    documents = [text[i : i + 5000] for i in range(0, len(text), 5000)]
    repeats = 40_000_000 // len(text) + 1
    pq.write_table(pa.table({"text": documents * repeats}), path)


def make_commands(args, directory):
    """Return the benchmarks to run, a list of (name, flags)."""
    commands = []
    for name in args.only:
        flags = shlex.split(FLAGS[args.device][name])
        if args.quick:
            flags += shlex.split(QUICK_FLAGS[name])
        if name == "fineweb":
            sources = args.source
            if sources is None:
                sources = [f"{directory}/documents.parquet"]
                write_documents(sources[0])
            commands.append((name, [*flags, "--source", *sources]))
            continue
        if name == "hellaswag":
            flags += ["--source", f"{ROOT}/input.txt"]
        for dtype in args.dtypes:
            contestants = []
            if name == "step" and args.device == "cpu" and dtype == "bfloat16" and not args.quick:
                contestants = ["--only", "ours", "ours compiled", "ours, float32"]
            commands.append((name, [*flags, "--dtype", dtype, *contestants]))
    return commands


def run(name, flags):
    """Run a benchmark. Returns the rows of its table and whether it failed."""
    line = shlex.join([f"bench_{name}.py", *flags])
    print(f"$ python benchmarks/{line}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    command = [sys.executable, f"{ROOT}/benchmarks/bench_{name}.py", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(f"{done.stdout.strip()}\n{time.perf_counter() - start:.0f} s\n", file=sys.stderr, flush=True)
    rows = done.stdout.partition(HEADER)[2].strip().splitlines()
    if done.returncode or not rows:
        rows.append(failed_row(line, f"exit status {done.returncode}, see its messages above"))
        return rows, True
    return rows, any("| failed: " in row for row in rows)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--device", choices=list(FLAGS), default="cpu", help="device (default: cpu)")
    add("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help=f"benchmarks to run (default: {BENCHMARKS})")
    add(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16", "float16"],
        help="dtypes to measure (default: float32 and bfloat16 on a CPU, bfloat16 on a GPU)",
    )
    add("--source", nargs="+", metavar="FILE", help="parquet files to tokenize (default: made from input.txt)")
    add("--quick", action="store_true", help="tiny sizes, to try everything: the figures mean nothing")
    args = parser.parse_args()
    if args.dtypes is None:
        args.dtypes = DTYPES[args.device]
    return args


def main():
    args = parse_args()
    rows = []
    any_failed = False
    with tempfile.TemporaryDirectory() as directory:
        for name, flags in make_commands(args, directory):
            new_rows, failed = run(name, flags)
            rows += new_rows
            any_failed = any_failed or failed

    # the table has one more column than those of the benchmarks
    machine = machine_name(args.device)
    title, rule = HEADER.splitlines()
    print(f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print(f"| machine {title}\n|---{rule}")
    for row in rows:
        print(f"| {machine} {row}")
    sys.exit(any_failed)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    main()
