"""
Run the benchmarks that compare the scripts with other implementations, one after the other. All
print the same columns.

    python benchmarks/run_all.py                      # a quarter of an hour on two CPU cores
    python benchmarks/run_all.py --device cuda        # one GPU; ten minutes
    python benchmarks/run_all.py --only sample hellaswag

Tokenizing takes the parquet files of --source or, without them, input.txt in documents of 5,000
characters. GPT-2's vocabulary is needed (a network, or TIKTOKEN_CACHE_DIR). The exit status is 1 if
a benchmark failed.
"""

import shlex
import signal
import subprocess
import sys
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
from common import ROOT, make_parser

COMMANDS = {  # benchmark and flags; float32 and bfloat16 on CPUs, bfloat16 on GPUs
    "cpu": [
        "step --dtype float32",
        "step --dtype bfloat16",
        "sample --device cpu --max_new_tokens 64 --dtype float32",
        "sample --device cpu --max_new_tokens 64 --dtype bfloat16",
        "hellaswag --device cpu --examples 50 --dtype float32",
        "hellaswag --device cpu --examples 50 --dtype bfloat16",
        "fineweb",
    ],
    "cuda": [
        # 524,288 tokens per step, as in the preset gpt2; transformers fits into 80 GB at B=32
        "step --device cuda --dtype bfloat16 --steps 3 --micro_batch_size 32 --block_size 1024 --grad_accum_steps 16",
        "sample --device cuda --dtype bfloat16 --batch_sizes 1 4 64",
        "hellaswag --device cuda --dtype bfloat16 --examples 10042 --parts 10",
        "fineweb",
    ],
}


def write_documents(path):
    """Write a parquet file with 40 MB of documents, cut from input.txt."""
    with open(f"{ROOT}/input.txt", encoding="utf-8") as file:
        text = file.read()
    documents = [text[i : i + 5000] for i in range(0, len(text), 5000)]
    repeats = 40_000_000 // len(text) + 1
    pq.write_table(pa.table({"text": documents * repeats}), path)


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    names = ["step", "sample", "hellaswag", "fineweb"]
    add("--device", choices=list(COMMANDS), default="cpu", help="device")
    add("--only", nargs="+", choices=names, default=names, help="benchmarks to run")
    add("--source", nargs="+", metavar="FILE", default=[], help="parquet files to tokenize; none: made from input.txt")
    return parser.parse_args()


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    args = parse_args()
    any_failed = False
    with tempfile.TemporaryDirectory() as directory:
        for command in COMMANDS[args.device]:
            name, *flags = shlex.split(command)
            if name not in args.only:
                continue
            if name == "fineweb":
                sources = args.source or [f"{directory}/documents.parquet"]
                if not args.source:
                    write_documents(sources[0])
                flags += ["--source", *sources]
            print(f"\n$ python benchmarks/bench_{name}.py {shlex.join(flags)}", flush=True)
            done = subprocess.run([sys.executable, f"{ROOT}/benchmarks/bench_{name}.py", *flags])
            any_failed = any_failed or done.returncode != 0
    sys.exit(any_failed)


if __name__ == "__main__":
    main()
