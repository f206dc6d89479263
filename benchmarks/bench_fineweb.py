"""
Compare the throughput of fineweb.py with the usual way to tokenise, and with bare encoding, on the same documents.

    python benchmarks/bench_fineweb.py --source ../shared/data/books/*.parquet

In turns, --rounds times each, all with two processes that are running and warm before the clock starts:
(a) fineweb.py: read parquet, tokenise, write shards; (b) multiprocessing.Pool.imap over the documents, which are in
memory, 16 a task, through a Python list, an array, a range check and a conversion, into a shard's buffer and a file;
(c) two processes that only encode documents they already hold. Prints the medians, and a to b and a to c round by
round.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import fineweb  # noqa: E402

HEADER = "| what | here | peer | ratio (range) | of the limit |\n|---|---|---|---|---|"


def plain_tokenize(text):
    """(b)'s task: one document's tokens as uint16."""
    enc = tiktoken.get_encoding("gpt2")
    tokens = np.array([enc.eot_token] + enc.encode_ordinary(text))  # noqa: RUF005
    assert (tokens >= 0).all() and (tokens < 2**16).all(), "token beyond uint16"
    return tokens.astype(np.uint16)


def only_encode(texts, barrier, seconds):
    """(c)'s process: encode texts and put the time into seconds."""
    enc = tiktoken.get_encoding("gpt2")
    enc.encode_ordinary(texts[0])
    for _ in range(2):  # all are ready; the clock starts
        barrier.wait()
    began = time.perf_counter()
    for text in texts:
        enc.encode_ordinary(text)
    seconds.put(time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", nargs="+", required=True, help="parquet files with a column text")
    parser.add_argument("--megabytes", type=int, default=40, help="of text to use (40)")
    parser.add_argument("--rounds", type=int, default=5, help="of each (5)")
    args = parser.parse_args()
    texts, size = [], 0
    for path in args.source:
        for batch in pq.ParquetFile(path).iter_batches(100, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if text and size < args.megabytes * 1e6:
                    texts.append(text)
                    size += len(text.encode())
    print(f"{len(texts):,} documents, {size / 1e6:.1f} MB of text, medians of {args.rounds} rounds, 2 processes")
    context = multiprocessing.get_context("spawn")
    enc = tiktoken.get_encoding("gpt2")
    number = sum(1 + len(enc.encode_ordinary(text)) for text in texts)

    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/texts.parquet"
        pq.write_table(pa.table({"text": texts}), source, row_group_size=1000, compression="zstd")

        def pipeline(submit):
            args = SimpleNamespace(workers=2, tokenizer="gpt2", text_column="text")
            settings = {"source": {"shard_size": 100_000_000, "world_size": 1}, "shards": [], "eot_token": 50256}
            counts = ("rank", "file", "row", "skip", "tokens", "partial", "documents", "bytes", "skipped")
            state, directory = settings | dict.fromkeys(counts, 0), tempfile.mkdtemp(dir=folder)
            began = time.perf_counter()
            for _, *found in fineweb.tokenize_file(submit, args, source, 0):
                fineweb.add(directory, state, sys.maxsize, *found)
            fineweb.finish_shard(directory, state)
            assert state["tokens"] == number
            return time.perf_counter() - began

        def usual(pool):
            began = time.perf_counter()
            shard, used = np.empty(number, np.uint16), 0
            for tokens in pool.imap(plain_tokenize, texts, chunksize=16):
                shard[used : used + len(tokens)] = tokens
                used += len(tokens)
            np.save(f"{folder}/usual.npy", shard)
            assert used == number
            return time.perf_counter() - began

        def bare():
            barrier, seconds = context.Barrier(3), context.Queue()
            parts = [texts[0::2], texts[1::2]]
            processes = [context.Process(target=only_encode, args=(part, barrier, seconds)) for part in parts]
            for process in processes:
                process.start()
            for _ in range(2):
                barrier.wait()
            result = max(seconds.get() for _ in processes)
            for process in processes:
                process.join()
            return result

        with fineweb.start_workers(2) as ours, context.Pool(2) as theirs:
            for future in [ours(fineweb.tokenize, "gpt2", pa.array(texts[:100])) for _ in range(8)]:
                future.result()
            theirs.map(plain_tokenize, texts[:200], chunksize=1)
            times = {"a": [], "b": [], "c": []}
            for _ in range(args.rounds):
                times["a"].append(pipeline(ours))
                times["b"].append(usual(theirs))
                times["c"].append(bare())
    speed = {name: size / 1e6 / statistics.median(seconds) for name, seconds in times.items()}
    names = {"a": "fineweb.py", "b": "Pool.imap and lists", "c": "only encoding"}
    for name, label in names.items():
        each = " ".join(f"{size / 1e6 / seconds:.2f}" for seconds in times[name])
        print(f"({name}) {label:20} {speed[name]:6.2f} MB/s   {number * speed[name] / size:5.2f}M tok/s   ({each})")
    ratio = {}
    for name in "bc":
        each = [b / a for a, b in zip(times["a"], times[name], strict=True)]
        ratio[name] = f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
    here = f"{speed['a']:.1f} MB/s, {number * speed['a'] / size:.2f}M tokens/s"
    peer, limit = f"Pool.imap {speed['b']:.1f} MB/s", f"{ratio['c']} of bare encoding"
    print(f"\n{HEADER}\n| tokenising, 2 processes | {here} | {peer} | {ratio['b']} | {limit} |")


if __name__ == "__main__":
    main()
