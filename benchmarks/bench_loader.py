"""
The loader of train_gpt2.py over 100,000 steps: its resident memory and its time a batch.

    python benchmarks/bench_loader.py                              # synthetic shards; about two minutes
    python benchmarks/bench_loader.py --data_dir edu_fineweb10B    # real ones
    python benchmarks/bench_loader.py --files 100000               # start-up with many files of holes, too

Memory is shown in two parts: the process's own, and the pages of shards that the system maps for it and takes
back when it needs them.
"""

import argparse
import os
import re
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_gpt2  # noqa: E402


def resident():
    """MB of this process in memory: (its own, mapped from files)."""
    with open("/proc/self/status", encoding="utf-8") as file:
        text = file.read()
    return tuple(int(re.search(rf"{name}:\s+(\d+)", text)[1]) / 1024 for name in ("RssAnon", "RssFile"))


def make_shards(directory, n, tokens):
    """n training shards and one for validation, each of so many tokens, all holes (id 0), in llm.c's format."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = train_gpt2.BIN_MAGIC, train_gpt2.BIN_VERSION, tokens
    for i in range(n + 1):
        with open(f"{directory}/holes_{'train' if i else 'val'}_{i:06d}.bin", "wb") as file:
            file.write(header.tobytes())
            file.truncate(train_gpt2.BIN_HEADER + 2 * tokens)


def start(data_dir, block_size):
    """The training windows of a data set; prints how long they take to open and what they cost."""
    before, begin = resident()[0], time.perf_counter()
    windows = train_gpt2.Windows(data_dir, "train", train_gpt2.read_meta(data_dir), block_size, 1337, True)
    windows.locate(0)
    seconds, grown = time.perf_counter() - begin, resident()[0] - before
    print(f"start: {len(windows.paths):,} shards, {windows.total:,} windows in {seconds:.2f} s, +{grown:.1f} MB own")
    return windows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data_dir", help="directory of token shards (synthetic ones)")
    parser.add_argument("--steps", type=int, default=100_000, help="batches to read (100,000)")
    parser.add_argument("--batch_size", type=int, default=16, help="windows a batch (16)")
    parser.add_argument("--block_size", type=int, default=1024, help="tokens a window (1024)")
    parser.add_argument("--files", type=int, default=0, help="files of holes to time the start-up on (0: do not)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if args.files:
            os.mkdir(f"{directory}/many")
            make_shards(f"{directory}/many", args.files, 4096)
            start(f"{directory}/many", args.block_size)
        if args.data_dir is None:
            os.mkdir(f"{directory}/data")
            make_shards(f"{directory}/data", 20, 10_000_000)
        windows = start(args.data_dir or f"{directory}/data", args.block_size)
        begin, points = time.perf_counter(), [args.steps * i // 10 for i in range(1, 11)]
        for step in range(args.steps):
            windows.batch(range(step * args.batch_size, (step + 1) * args.batch_size))
            if step + 1 in (100, *points):
                own, mapped = resident()
                each = 1e6 * (time.perf_counter() - begin) / (step + 1)
                print(
                    f"step {step + 1:7,d}: {own:.1f} MB own, {mapped:.1f} MB mapped, {each:.0f} us a batch", flush=True
                )


if __name__ == "__main__":
    main()
