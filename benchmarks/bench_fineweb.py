"""
Compare the speed of fineweb.py with a pool of processes on the same documents.

    python benchmarks/bench_fineweb.py --source ../shared/data/books/*.parquet

In turns, --rounds times each, with two workers that are running and warm before the clock starts:

- fineweb.py reads a parquet file, tokenizes it in threads, and writes and flushes two shards;
- a multiprocessing pool encodes document by document, as most tokenizing scripts do: the documents
  are in memory, and each becomes a list, then an array, then a part of a shard.

Both must have the same tokens. Prints the medians, and the ratios round by round. Takes about a
minute.
"""

import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from common import HEADER, environment, make_parser, row

import fineweb

WORKERS = 2
TASK = f"tokenizing, {WORKERS} workers"


def run_fineweb(pool, tokenizer, path, directory, num_tokens):
    """Make two shards of a parquet file, as fineweb.py does. Returns the seconds and all tokens."""
    args = SimpleNamespace(workers=WORKERS, text_column="text")
    settings = {"eot_token": tokenizer.end_of_text, "source": {"repo_id": None}}
    started = time.perf_counter()
    state = fineweb.State(settings)
    writer = fineweb.ShardWriter(directory, state, num_tokens // 2 + 1, max_tokens=None)
    for file, batch, tokens in fineweb.tokenize_files(args, tokenizer, [path], state, pool):
        writer.add(file, batch, tokens)
    writer.finish()
    seconds = time.perf_counter() - started
    shards = [np.load(f"{directory}/{shard['file']}") for shard in state.shards]
    return seconds, np.concatenate(shards)


def encode_document(text):
    """Return the tokens of one document as uint16."""
    enc = tiktoken.get_encoding("gpt2")
    tokens = [enc.eot_token]
    tokens.extend(enc.encode_ordinary(text))
    tokens = np.array(tokens)
    assert (tokens >= 0).all() and (tokens < 2**16).all(), "token does not fit into uint16"
    return tokens.astype(np.uint16)


def run_document_pool(pool, texts, directory, num_tokens):
    """Collect the tokens of all documents in a shard, and save it. Returns seconds and tokens."""
    started = time.perf_counter()
    shard = np.empty(num_tokens, np.uint16)
    used = 0
    for tokens in pool.imap(encode_document, texts, chunksize=16):
        shard[used : used + len(tokens)] = tokens
        used += len(tokens)
    np.save(f"{directory}/documents.npy", shard)
    return time.perf_counter() - started, shard


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


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--source", nargs="+", required=True, help="parquet files with a column text")
    parser.add_argument("--megabytes", type=int, default=40, help="megabytes of text to use")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way")
    args = parser.parse_args()
    print(environment("cpu"))
    texts, size = read_texts(args.source, args.megabytes * 1e6)
    print(f"{len(texts):,} documents, {size / 1e6:.1f} MB, medians of {args.rounds} rounds, {WORKERS} workers")
    encoding = tiktoken.get_encoding("gpt2")
    tokenizer = fineweb.FastTokenizer(encoding)
    num_tokens = sum(1 + len(encoding.encode_ordinary(text)) for text in texts)

    ours, pool_of_documents = [], []  # seconds
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/texts.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=1000, compression="zstd")
        with ThreadPoolExecutor(WORKERS) as threads, spawn.Pool(WORKERS) as processes:
            # warm up: start the threads and processes, and load the vocabulary in each
            list(threads.map(lambda text: tokenizer.encode(pa.array([text], pa.large_string())), texts[:50]))
            processes.map(encode_document, texts[:200], chunksize=1)
            for _ in range(args.rounds):
                seconds, tokens = run_fineweb(threads, tokenizer, path, folder, num_tokens)
                ours.append(seconds)
                seconds, expected = run_document_pool(processes, texts, folder, num_tokens)
                pool_of_documents.append(seconds)
                assert np.array_equal(tokens, expected), "the tokens differ"

    for name, rounds in (("fineweb.py", ours), ("pool of documents", pool_of_documents)):
        speeds = " ".join(f"{size / 1e6 / seconds:.2f}" for seconds in rounds)
        print(f"{name:20} {speeds} MB/s")
    megabytes, million_tokens = size / 1e6, num_tokens / 1e6
    fast, slow = statistics.median(ours), statistics.median(pool_of_documents)
    our_speed = f"{megabytes / fast:.1f} MB/s, {million_tokens / fast:.2f}M tokens/s"
    peer_speed = f"pool of documents: {megabytes / slow:.1f} MB/s"
    ratios = [other / own for own, other in zip(ours, pool_of_documents, strict=True)]
    print(f"\n{HEADER}\n{row(TASK, our_speed, peer_speed, ratios, '')}")


if __name__ == "__main__":
    main()
