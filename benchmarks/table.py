"""
One table of what the repository's scripts reach beside their peers, each row a ratio of things that took turns.

    python benchmarks/table.py                       # a quarter of an hour on two CPU cores
    python benchmarks/table.py --device cuda         # one GPU
    python benchmarks/table.py --quick               # a tiny model: whether everything is there, in a minute

Runs bench_step.py, bench_sample.py, bench_hellaswag.py and bench_fineweb.py one after another and joins the rows
that they end with. Tokenising takes the parquet files of --source or, without them, input.txt in documents of 5,000
characters, about the mean of FineWeb-Edu, over and over. What it prints while it works goes to stderr. Needs GPT-2's
vocabulary (a network, or TIKTOKEN_CACHE_DIR). A benchmark that fails is a row that says so, and the exit status is 1.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time

import pyarrow as pa
import pyarrow.parquet as pq
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
HEADER = "| what | here | peer | ratio (range) | of the limit |\n|---|---|---|---|---|"
# 524,288 tokens a step, as the preset gpt2 has
GPU_STEP = "--device cuda --dtype bfloat16 --micro_batch_size 64 --block_size 1024 --grad_accum_steps 8"
FLAGS = {  # of each benchmark on a device
    "cpu": {"step": "", "sample": "--device cpu --max_new_tokens 64", "hellaswag": "--device cpu --examples 50"},
    "cuda": {
        "step": GPU_STEP,
        "sample": "--device cuda --dtype bfloat16 --batch_sizes 1 4 64",
        "hellaswag": "--device cuda --dtype bfloat16 --examples 10042 --parts 10",
    },
}
TINY_MODEL = "--n_layer 1 --n_head 2 --n_embd 32"
QUICK = {  # added with --quick
    "step": f"{TINY_MODEL} --micro_batch_size 2 --block_size 16 --grad_accum_steps 2 --steps 1 --only ours",
    "sample": f"{TINY_MODEL} --prompt_tokens 4 --max_new_tokens 4 --rounds 1",
    "hellaswag": f"{TINY_MODEL} --examples 4 --parts 1",
    "fineweb": "--megabytes 1 --rounds 1",
}


def write_documents(path):
    """A parquet file of 40 MB of documents from input.txt."""
    with open(f"{HERE}/../input.txt", encoding="utf-8") as file:
        text = file.read()
    documents = [text[i : i + 5000] for i in range(0, len(text), 5000)]
    pq.write_table(pa.table({"text": documents * (40_000_000 // len(text) + 1)}), path)


def device_name(device):
    """The GPU's name, or the CPU's and how many threads torch uses of it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = "CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(": ")[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=list(FLAGS), default="cpu", help="(cpu)")
    parser.add_argument("--only", nargs="+", choices=list(QUICK), default=list(QUICK), help="these benchmarks (all)")
    parser.add_argument("--source", nargs="+", help="parquet files to tokenise (made of input.txt)")
    parser.add_argument("--data_dir", help="token shards for the training step (random tokens)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: the figures mean nothing")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as directory:
        for name in args.only:
            flags = shlex.split(f"{FLAGS[args.device].get(name, '')} {QUICK[name] if args.quick else ''}")
            if name == "fineweb" and not args.source:
                args.source = [f"{directory}/documents.parquet"]
                write_documents(*args.source)
            if name == "step" and args.data_dir:
                flags += ["--data_dir", args.data_dir]
            if name in ("hellaswag", "fineweb"):
                flags += ["--source", *(args.source if name == "fineweb" else [f"{HERE}/../input.txt"])]
            print(f"$ python benchmarks/bench_{name}.py {shlex.join(flags)}", file=sys.stderr, flush=True)
            command, start = [sys.executable, f"{HERE}/bench_{name}.py", *flags], time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            said, _, table = done.stdout.partition(HEADER)
            print(f"{said.strip()}\n{time.perf_counter() - start:.0f} s\n", file=sys.stderr, flush=True)
            rows += table.strip().splitlines()
            if done.returncode or not table.strip():
                rows.append(f"| {name} | failed: exit status {done.returncode}, its messages are above | | | |")
                failed = True
    print(f"torch {torch.__version__}, {device_name(args.device)}, {time.strftime('%Y-%m-%d')}\n\n{HEADER}")
    print("\n".join(rows))
    sys.exit(failed)


if __name__ == "__main__":
    main()
