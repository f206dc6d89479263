"""
Measure train_gpt2.py's data loader: time per batch, and resident memory over many steps.

    python benchmarks/bench_loader.py                            # synthetic shards; two minutes
    python benchmarks/bench_loader.py --data_dir edu_fineweb10B  # real shards
    python benchmarks/bench_loader.py --num_shards 100000 --steps 0   # start-up

Resident memory is shown in two parts: the process's own, and the mapped pages of shards, which the
system takes back when it needs them. Linux only.
"""

import re
import tempfile
import time

import numpy as np
from common import make_parser

import train_gpt2


def resident_memory():
    """Return (own, mapped) resident memory of this process in MB."""
    with open("/proc/self/status", encoding="utf-8") as file:
        status = file.read()
    own = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024
    mapped = int(re.search(r"RssFile:\s+(\d+)", status)[1]) / 1024
    return own, mapped


def make_sparse_shards(directory, num_shards, tokens):
    """Write training shards and one validation shard in llm.c's format.

    Their tokens are holes in the files, which read as 0.
    """
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, tokens
    for i in range(num_shards + 1):
        split = "train" if i else "val"
        with open(f"{directory}/sparse_{split}_{i:06d}.bin", "wb") as file:
            file.write(header.tobytes())
            file.truncate(header.nbytes + 2 * tokens)


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data_dir", default="", help="directory of token shards; none: synthetic ones")
    add("--num_shards", type=int, default=20, help="number of synthetic shards")
    add("--steps", type=int, default=100_000, help="batches to read")
    add("--batch_size", type=int, default=16, help="windows per batch")
    add("--block_size", type=int, default=1024, help="tokens per window")
    return parser.parse_args()


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory() as directory:
        data_dir = args.data_dir or directory
        if not args.data_dir:
            tokens = max(4096, 200_000_000 // args.num_shards)  # per shard
            make_sparse_shards(directory, args.num_shards, tokens)

        # start-up: check the shards, and find the first window
        start = time.perf_counter()
        data_set = train_gpt2.read_data_set(data_dir)
        dataset = train_gpt2.TokenDataset(data_dir, "train", data_set, args.block_size, 1337, True)
        dataset.locate(0)
        seconds = time.perf_counter() - start
        size = f"{len(dataset.paths):,} shards, {dataset.num_windows:,} windows"
        print(f"start-up: {size} in {seconds:.2f} s")

        # read the batches, and report ten times
        points = [args.steps * i // 10 for i in range(1, 11)]
        start = time.perf_counter()
        for step in range(args.steps):
            dataset.batch(range(step * args.batch_size, (step + 1) * args.batch_size))
            if step + 1 in points:
                own, mapped = resident_memory()
                memory = f"{own:.1f} MB own, {mapped:.1f} MB mapped"
                microseconds = 1e6 * (time.perf_counter() - start) / (step + 1)
                print(f"step {step + 1:7,d}: {memory}, {microseconds:.0f} us per batch")


if __name__ == "__main__":
    main()
