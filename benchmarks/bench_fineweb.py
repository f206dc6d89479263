"""
Compare the speed of fineweb.py with other ways to tokenize the same documents.

    python benchmarks/bench_fineweb.py --source ../shared/data/books/*.parquet
    python benchmarks/bench_fineweb.py --source books/*.parquet --before old/fineweb.py

In turns, --rounds times each, with two workers that are running and warm before the clock starts:

(a) fineweb.py: reads parquet, tokenizes in threads, writes and flushes a shard;
(b) a multiprocessing pool that encodes document by document, as most tokenizing scripts do: the documents
    are in memory, and each becomes a list, then an array, then a part of a shard;
(c) two processes that only encode documents that they hold already, and discard the tokens.

With --before, also (d): the whole command `python OLD_FINEWEB.py` and `python fineweb.py` on the same files.
Prints the medians, and the ratios round by round. Takes about two minutes.
"""

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from common import HEADER, ROOT, row

import fineweb

WORKERS = 2


# ----------------------------------------------------------------------------- (a) fineweb.py
def run_fineweb(pool, fast, source, directory, number):
    """Make one shard of a parquet file, as fineweb.py does. Returns the seconds it takes."""
    args = SimpleNamespace(workers=WORKERS, text_column="text")
    settings = {"eot_token": 50256, "source": {"world_size": 1}}
    started = time.perf_counter()
    writer = fineweb.ShardWriter(directory, fineweb.State(settings, rank=0), number, number)
    for batch in fineweb.tokenize_file(pool, fast, source, args.text_column, 0, 4 * WORKERS):
        writer.add(batch)
    seconds = time.perf_counter() - started
    assert writer.state.tokens == number
    return seconds


# ------------------------------------------------------------------------- (b) pool of documents
def encode_document(text):
    """Return the tokens of one document as uint16."""
    enc = tiktoken.get_encoding("gpt2")
    tokens = [enc.eot_token]
    tokens.extend(enc.encode_ordinary(text))
    tokens = np.array(tokens)
    assert (tokens >= 0).all() and (tokens < 2**16).all(), "token does not fit into uint16"
    return tokens.astype(np.uint16)


def run_document_pool(pool, texts, directory, number):
    """Collect the tokens of all documents in a shard, and save it. Returns the seconds it takes."""
    started = time.perf_counter()
    shard = np.empty(number, np.uint16)
    used = 0
    for tokens in pool.imap(encode_document, texts, chunksize=16):
        shard[used : used + len(tokens)] = tokens
        used += len(tokens)
    np.save(f"{directory}/documents.npy", shard)
    seconds = time.perf_counter() - started
    assert used == number
    return seconds


# --------------------------------------------------------------------------- (c) only encoding
def only_encode(texts, barrier, seconds):
    """Encode texts in this process, and put the time that it takes into a queue."""
    enc = tiktoken.get_encoding("gpt2")
    enc.encode_ordinary(texts[0])
    barrier.wait()  # all processes are ready
    started = time.perf_counter()
    for text in texts:
        enc.encode_ordinary(text)
    seconds.put(time.perf_counter() - started)


def run_only_encoding(texts):
    """Encode texts in two processes. Returns the seconds of the slower one."""
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(WORKERS), context.Queue()
    processes = []
    for i in range(WORKERS):
        part = texts[i::WORKERS]
        processes.append(context.Process(target=only_encode, args=(part, barrier, seconds)))
    for process in processes:
        process.start()
    slowest = max(seconds.get() for _ in processes)
    for process in processes:
        process.join()
    return slowest


# ---------------------------------------------------------------------------- (d) whole commands
def run_command(script, sources):
    """Run a fineweb.py on parquet files in its own process. Returns the seconds it takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, "--source", *sources, "--local_dir", f"{folder}/out"]
        command += ["--shard_size", "10000000", "--workers", str(WORKERS)]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


# -------------------------------------------------------------------------------- command line
def read_texts(paths, max_bytes):
    """Return the first documents of parquet files, up to about max_bytes, and their size."""
    texts, size = [], 0
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(100, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if text and size < max_bytes:
                    texts.append(text)
                    size += len(text.encode())
    return texts, size


def describe_ratios(seconds, other_seconds):
    """Return "median (smallest to largest)" of the ratios of two lists of times, round by round."""
    ratios = [other / own for own, other in zip(seconds, other_seconds, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", nargs="+", required=True, help="parquet files with a column text")
    parser.add_argument("--megabytes", type=int, default=40, help="megabytes of text to use (default: 40)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way (default: 5)")
    parser.add_argument("--before", metavar="FILE", help="another fineweb.py to compare whole commands with")
    return parser.parse_args()


def main():
    args = parse_args()
    texts, size = read_texts(args.source, args.megabytes * 1e6)
    print(f"{len(texts):,} documents, {size / 1e6:.1f} MB, medians of {args.rounds} rounds, {WORKERS} workers")
    enc = tiktoken.get_encoding("gpt2")
    fast = fineweb.without_look_ahead(enc)
    number = sum(1 + len(enc.encode_ordinary(text)) for text in texts)
    context = multiprocessing.get_context("spawn")
    times = {"a": [], "b": [], "c": []}

    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/texts.parquet"
        pq.write_table(pa.table({"text": texts}), source, row_group_size=1000, compression="zstd")
        with ThreadPoolExecutor(WORKERS) as threads, context.Pool(WORKERS) as processes:
            # warm up: start the threads and processes, and load the vocabulary in each
            list(threads.map(lambda text: fineweb.tokenize(fast, pa.array([text])), texts[:50]))
            processes.map(encode_document, texts[:200], chunksize=1)
            for _ in range(args.rounds):
                times["a"].append(run_fineweb(threads, fast, source, folder, number))
                times["b"].append(run_document_pool(processes, texts, folder, number))
                times["c"].append(run_only_encoding(texts))

    names = {"a": "fineweb.py", "b": "pool of documents", "c": "only encoding"}
    speeds = {}  # megabytes per second
    for key, name in names.items():
        speeds[key] = size / 1e6 / statistics.median(times[key])
        rounds = " ".join(f"{size / 1e6 / seconds:.2f}" for seconds in times[key])
        tokens_per_second = number * speeds[key] / size  # in millions
        print(f"({key}) {name:20} {speeds[key]:6.2f} MB/s   {tokens_per_second:5.2f}M tok/s   ({rounds})")

    if args.before:
        before, now = [], []
        for _ in range(args.rounds):
            before.append(run_command(args.before, args.source))
            now.append(run_command(f"{ROOT}/fineweb.py", args.source))
        print(f"(d) whole commands: {statistics.median(now):.1f} s, before {statistics.median(before):.1f} s, ", end="")
        print(f"ratio {describe_ratios(now, before)}")

    ours = f"{speeds['a']:.1f} MB/s, {number * speeds['a'] / size:.2f}M tokens/s"
    peer = f"pool of documents: {speeds['b']:.1f} MB/s"
    ratios = [other / own for own, other in zip(times["a"], times["b"], strict=True)]
    limit = f"{describe_ratios(times['a'], times['c'])} of bare encoding"
    print(f"\n{HEADER}\n{row(f'tokenizing, {WORKERS} workers', ours, peer, ratios, limit)}")


if __name__ == "__main__":
    main()
