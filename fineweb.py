"""
Turn FineWeb-Edu, or any parquet data set with a text column, into the token shards that train_gpt2.py reads.

    python fineweb.py                                # sample-10BT of FineWeb-Edu from the Hugging Face hub
    python fineweb.py --max_tokens 300000000         # its first 300M tokens
    python fineweb.py --source 'books/*.parquet' --local_dir tokens --shard_size 1000000    # local files
    python fineweb.py --rank 0 --world_size 4        # one machine of four; when all are done: --finish
    python fineweb.py --verify edu_fineweb10B        # recount and describe any directory of shards

Writes LOCAL_DIR/edufineweb_val_000000.npy, edufineweb_train_000001.npy, ... (one-dimensional uint16 arrays, each
document after an <|endoftext|>) and at last meta.json, which describes them. However it is interrupted, the same
command continues. Disk: 2 bytes a token and two parquet files (2 GB each). Two CPU cores make up to 9M tokens a second.
"""

import argparse
import contextlib
import functools
import glob
import hashlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import struct
import sys
import threading
import time
from collections import deque
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import requests
import tiktoken
from tqdm import tqdm

SUBSETS = {"default": "data"} | {f"sample-{size}": f"sample/{size}" for size in ("10BT", "100BT", "350BT")}
BATCH = 64  # documents a task: about 20 ms of work
TRIES = 8  # of a download, with pauses of 1, 2, 4, ... seconds
HEADER_BYTES = 128  # bytes of NumPy's header for a one-dimensional array of any length
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # what \s is in GPT-2's pattern
BEGIN, CUT = "\0", "\1"  # stand for <|endoftext|> and for nothing


def fail(message):
    """Report a user's mistake in one line on stderr and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# -------------------------------------------------------------------------------- worker processes
# --- copied block: get_tokenizer ---
def get_tokenizer(name):
    """The tiktoken.Encoding called name.

    "gpt2" has 50,257 tokens; tiktoken fetches its vocabulary once, or finds it in TIKTOKEN_CACHE_DIR, and
    raises requests.RequestException where it cannot. "bytes" has 257, the 256 bytes and <|endoftext|>, and
    never needs a network.
    """
    if name == "gpt2":
        return tiktoken.get_encoding("gpt2")
    ranks = {bytes([i]): i for i in range(256)}
    pieces = r"(?s:.{1,1000})"  # how text is cut before merging: with no merges any cut gives the same
    return tiktoken.Encoding(name, pat_str=pieces, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})


# --- end of copied block: get_tokenizer ---
@functools.cache
def get_fast_tokenizer(name):
    """The tokenizer for text with BEGIN and CUT in it: GPT-2's pattern without `\\s+(?!\\S)`, twice as fast."""
    enc, pieces = get_tokenizer(name), r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
    marks = {BEGIN: enc.eot_token, CUT: enc.n_vocab}
    return tiktoken.Encoding(name, pat_str=pieces, mergeable_ranks=enc._mergeable_ranks, special_tokens=marks)


def tokenize(tokenizer, texts):
    """(tokens, rows, bytes, rows skipped because they are null or empty) of a pyarrow array of texts.

    The tokens are [eot] + encode_ordinary(text) of all texts. All that the look-ahead of GPT-2's pattern does is to
    leave the last of several spaces to what comes after them; text with a cut before that one needs no look-ahead.
    """
    enc, rows = get_fast_tokenizer(tokenizer), len(texts)
    texts = texts.filter(pc.greater(pc.binary_length(texts), 0))
    if pc.any(pc.match_substring_regex(texts, f"[{BEGIN}{CUT}]")).as_py():  # rare: cut for real
        cut, begin = re.compile(f"(?<=[{SPACE}])(?=[{SPACE}][^{SPACE}])"), enc.encode(BEGIN, allowed_special="all")
        parts = [(begin, *map(enc.encode_ordinary, cut.split(text))) for text in texts.to_pylist()]
        tokens = np.concatenate([part for text in parts for part in text])
    else:
        texts_cut = pc.replace_substring_regex(texts, f"([{SPACE}])([{SPACE}][^{SPACE}])", f"\\1{CUT}\\2").to_pylist()
        tokens = enc.encode_to_numpy("".join(BEGIN + text for text in texts_cut), allowed_special="all")
        tokens = tokens[tokens != enc.max_token_value]  # CUT's
    return tokens.astype("<u2"), rows, pc.sum(pc.binary_length(texts)).as_py() or 0, rows - len(texts)


def work(pipe):
    """Call what comes through a pipe, (function, *arguments), and send the result back. Ends when its parent does."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, *arguments = pipe.recv()
            try:
                result = function(*arguments)
            except Exception as error:
                result = error
            pipe.send(result)


@contextlib.contextmanager
def start_workers(number):
    """Start processes; gives submit(function, *arguments), which runs function in one of them and returns a Future.

    Each has a pipe and a thread of its own, so that one which the system kills, even in the middle of a message,
    can neither block the others nor go unnoticed: its Future raises BrokenExecutor.
    """
    spawn, idle, threads = multiprocessing.get_context("spawn"), queue.SimpleQueue(), ThreadPoolExecutor(number)

    def call(*task):
        pipe = idle.get()
        try:
            pipe.send(task)
            result = pipe.recv()
        except (EOFError, OSError):
            raise BrokenExecutor from None
        finally:
            idle.put(pipe)  # a broken one breaks the next call, too, which would wait for it
        if isinstance(result, Exception):
            raise result
        return result

    ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes begin with it: Ctrl-C is their parent's
    for _ in range(number):
        pipe, end = spawn.Pipe()
        spawn.Process(target=work, args=[end]).start()
        end.close()
        idle.put(pipe)
    signal.signal(signal.SIGINT, ctrl_c)
    try:
        yield functools.partial(threads.submit, call)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()


def ahead(futures, number):
    """Yield the results of futures in order, where futures is an iterator that starts them, number of them ahead."""
    pending = deque()
    for future in futures:
        pending.append(future)
        if len(pending) > number:
            yield pending.popleft().result()
    for future in pending:
        yield future.result()


# -------------------------------------------------------------------------------------- parquet in
def ask_hub(call, what, tries=TRIES):
    """call(), after growing pauses again while the hub is busy or out of reach."""
    from huggingface_hub import constants

    for attempt in range(tries):
        try:
            return call()
        except Exception as error:  # the hub, its HTTP client and its transfer library share no base class
            reason = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())[:200]
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403, 404) or isinstance(error, ValueError) or attempt + 1 == tries:
                break
        time.sleep(2**attempt)
    advice = "check --repo_id, --remote_name and HF_TOKEN, or name local parquet files with --source"
    raise OSError(f"cannot get {what} from {constants.ENDPOINT} ({reason}): {advice}")


def find_files(args):
    """The hub's commit, [[name, bytes], ...] of all parquet files in their order, and the paths of local ones."""
    if args.source:
        paths = []
        for pattern in args.source:
            found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
            paths += [path for path in found if path.endswith(".parquet")]
            if not any(path.endswith(".parquet") for path in found):
                fail(f"no parquet file at --source {pattern}: name files, or a pattern such as 'data/*.parquet'")
        return None, [[os.path.basename(path), os.path.getsize(path)] for path in paths], paths
    from huggingface_hub import HfApi

    what, folder = f"data set {args.repo_id}", SUBSETS.get(args.remote_name, args.remote_name) or None
    commit = ask_hub(lambda: HfApi().dataset_info(args.repo_id).sha, what, min(TRIES, 3))
    tree = functools.partial(HfApi().list_repo_tree, args.repo_id, folder, repo_type="dataset", recursive=True)
    found = ask_hub(lambda: list(tree(revision=commit)), f"subset {args.remote_name} of {what}")
    files = sorted([entry.path, entry.size] for entry in found if entry.path.endswith(".parquet"))
    return commit, files or fail(f"no parquet file in subset {args.remote_name} of {what}: check --remote_name"), None


def download(repo_id, commit, folder, name, size):
    """Fetch a parquet file of the hub to folder, whole, and return its path."""
    from huggingface_hub import hf_hub_download

    def fetch():
        path = hf_hub_download(repo_id, name, repo_type="dataset", revision=commit, local_dir=folder)
        if os.path.getsize(path) != size:
            os.remove(path)
            raise OSError(f"it did not come with {size} bytes")
        return path

    return ask_hub(fetch, name)


def tokenize_file(submit, args, path, row):
    """Yield (share of the file that is done, *what tokenize returns) for the batches of a parquet file from row on."""
    column = args.text_column

    def start(parquet, at=0):
        for batch in parquet.iter_batches(BATCH, columns=[column]):
            if at >= row:
                yield submit(tokenize, args.tokenizer, batch.column(0))
            at += len(batch)

    try:
        with pq.ParquetFile(path, buffer_size=2**20) as parquet:  # without a buffer it holds whole row groups
            names, done = parquet.schema_arrow.names, row
            kind = parquet.schema_arrow.field(column).type if column in names else "missing"
            if kind not in (pa.string(), pa.large_string()):
                raise ValueError(f"text column {column} is {kind}: choose --text_column from {', '.join(names)}")
            for tokens, rows, *counts in ahead(start(parquet), 4 * args.workers):
                done += rows
                yield done / parquet.metadata.num_rows, tokens, rows, *counts
    except (OSError, ValueError, pa.ArrowException) as error:
        raise OSError(f"cannot use {path} ({' '.join(str(error).split())[:300]})") from error


# -------------------------------------------------------------------------------------- shards out
def load_json(directory, name):
    """The meta.json, or the state files, of a directory: a list, empty if there are none."""
    found = []
    for path in sorted(glob.glob(f"{glob.escape(directory)}/{name}")):
        try:
            with open(path, encoding="utf-8") as file:
                found.append({"shards": [], "source": {}} | json.load(file))
        except (ValueError, TypeError) as error:
            fail(f"cannot read {path} ({error}): delete {directory}, or name another")
    return found


def save_json(path, content):
    """Write content to path, complete and on the disk, or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def unfinished(directory, state):
    """The path of the shard in the making; .tmp will be cut off. Ranks take turns with the numbers, 0 is val."""
    number = len(state["shards"]) * state["source"]["world_size"] + state["rank"]
    return f"{directory}/edufineweb_{'train' if number else 'val'}_{number:06d}.npy.tmp"


def add(directory, state, limit, tokens, rows, size, skipped):
    """Write what tokenize returned, up to limit tokens in all, and finish the shards that it fills.

    The state says where to read on (file, row, and skip: tokens of the batch there which are written already), how
    many tokens are written (tokens) and how many of them to the unfinished shard (partial).
    """
    while state["skip"] < len(tokens) and state["tokens"] < limit:
        n = min(state["source"]["shard_size"] - state["partial"], limit - state["tokens"])
        new = tokens[state["skip"] :][:n]
        with open(unfinished(directory, state), "ab") as file:
            file.truncate(HEADER_BYTES + 2 * state["partial"])  # room for the header, and what a killed run left off
            file.write(new)
        for key, more in (
            ("skip", new),
            ("tokens", new),
            ("partial", new),
            ("documents", new[new == state["eot_token"]]),
        ):
            state[key] += len(more)
        if len(new) == n:
            finish_shard(directory, state)
    state.update(row=state["row"] + rows, skip=0, bytes=state["bytes"] + size, skipped=state["skipped"] + skipped)


def save(directory, state, **changes):
    """Bring the unfinished shard to the disk, and then the state that goes with it, from which a later run goes on."""
    state.update(changes)
    if state["partial"]:
        with open(unfinished(directory, state), "ab") as file:
            os.fsync(file.fileno())
    save_json(f"{directory}/state_{state['rank']:05d}.json", state)


def finish_shard(directory, state):
    """Make the unfinished shard a complete one, if it has any tokens."""
    path, count = unfinished(directory, state), state["partial"]
    if count:
        with open(path, "r+b") as file:
            header = {"descr": "<u2", "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            os.fsync(file.fileno())
        name = os.path.basename(path).removesuffix(".tmp")
        about = {"file": name, "split": name.split("_")[1], "tokens": count, "sha256": sha256_of(path)}
        save(directory, state, partial=0, shards=[*state["shards"], about])
        os.replace(path, path.removesuffix(".tmp"))


def finish(directory):
    """Write meta.json for the shards of all ranks, and delete their state files."""
    if load_json(directory, "meta.json"):
        return print(f"{directory} is finished already")
    states = load_json(directory, "state_*.json")
    source = states[0]["source"] if states else {"world_size": 1}
    done = sum(state["done"] and state["source"] == source for state in states)
    if done != source["world_size"]:
        fail(f"{directory} has {done} of {source['world_size']} ranks done with the same settings: run the rest")
    shards = sorted((shard for state in states for shard in state["shards"]), key=lambda shard: shard["file"][-10:])
    for shard in shards:
        path = f"{directory}/{shard['file']}"
        if not os.path.exists(path) or os.path.getsize(path) != HEADER_BYTES + 2 * shard["tokens"]:
            fail(f"{path} is missing or cut short: copy it here, or delete {directory} and start again")
    about = {key: states[0][key] for key in ("tokenizer", "vocab_size", "eot_token", "source")}
    save_json(f"{directory}/meta.json", about | {"shards": shards})
    for path in glob.glob(f"{glob.escape(directory)}/state_*"):
        os.remove(path)


# ------------------------------------------------------------------------------------ command line
# --- copied block: read_shard ---
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '<u2', 'fortran_order': False, 'shape': \((\d+),\), \}", re.S
)
BIN_MAGIC, BIN_VERSION, BIN_HEADER = 20240520, 1, 1024  # llm.c's shards: 256 int32, then uint16 tokens


def read_header(path):
    """(bytes before the tokens, number of tokens) of a shard; raises ValueError if it is none."""
    with open(path, "rb") as file:
        head = file.read(BIN_HEADER)
        size = file.seek(0, os.SEEK_END)
    npy = NPY_HEADER.match(head)
    if npy:
        offset, count = 10 + int.from_bytes(npy[1], "little"), int(npy[2])
    elif len(head) == BIN_HEADER and struct.unpack("<2i", head[:8]) == (BIN_MAGIC, BIN_VERSION):
        offset, count = BIN_HEADER, struct.unpack("<i", head[8:12])[0]
    else:
        raise ValueError(f"{path} is no token shard: neither a one-dimensional uint16 .npy nor llm.c's .bin")
    if size != offset + 2 * count:
        raise ValueError(f"{path} has {size:,} bytes, its header promises {offset + 2 * count:,}: make it again")
    return offset, count


@lru_cache(maxsize=16)
def open_shard(path):
    """The tokens of a shard, mapped into memory: a read-only uint16 array (N,)."""
    offset, count = read_header(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(count,))


# --- end of copied block: read_shard ---
# --- copied block: sha256_of ---
def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- end of copied block: sha256_of ---
def verify(directory):
    """Recount the shards of a directory, ours or foreign, compare them with meta.json if there is one, and report."""
    known = load_json(directory, "meta.json") or load_json(directory, "state_*.json")
    about = known[0] if known else {"tokenizer": "gpt2", "vocab_size": 50257, "eot_token": 50256}
    told = {shard["file"]: (shard["tokens"], shard["sha256"]) for one in known for shard in one["shards"]}
    names = sorted(name for name in os.listdir(directory) if name.endswith((".npy", ".bin")))
    if not names:
        fail(f"{directory} has no shard (.npy or .bin): name a directory that does")
    enc, splits, frequency = get_tokenizer(about["tokenizer"]), {}, np.zeros(2**16, np.int64)
    wrong = [f"{name} is missing" for name in told if name not in names]
    for name in tqdm(names, disable=None, leave=False):
        try:
            tokens, digest = open_shard(f"{directory}/{name}"), sha256_of(f"{directory}/{name}")
        except (OSError, ValueError) as error:
            wrong.append(str(error))
            continue
        count = sum(np.bincount(tokens[i : i + 2**22], minlength=2**16) for i in range(0, len(tokens), 2**22))
        frequency += count
        if count[about["vocab_size"] :].any():
            wrong.append(f"{name} has token {np.flatnonzero(count)[-1]}, beyond the vocabulary")
        if told and told.get(name) != (len(tokens), digest):
            wrong.append(f"{name} is not as described: {len(tokens)} tokens, SHA-256 {digest}")
        split = splits.setdefault("val" if "_val_" in name else "train", [0, 0, 0, tokens[:50].tolist()])
        split[:3] = split[0] + 1, split[1] + len(tokens), split[2] + int(count[about["eot_token"]])
    print(f"{directory}: {about['tokenizer']} tokens, {'SHA-256 compared' if told else 'no SHA-256 known'}")
    for split, (shards, number, documents, ids) in splits.items():
        text = enc.decode([i for i in ids if i < about["vocab_size"]])
        print(f"{split}: {shards:,} shards, {number:,} tokens, {documents:,} documents, beginning {text!r}")
    top = [int(i) for i in np.argsort(-frequency)[:10] if i < about["vocab_size"]]
    print("most frequent:", *(f"{enc.decode([i])!r} {frequency[i] / max(frequency.sum(), 1):.1%}" for i in top))
    if wrong:
        fail(f"{len(wrong)} faults in {directory}: {'; '.join(wrong[:5])}")


def open_state(args):
    """The state that --local_dir was left in or a new one, and the paths of local parquet files."""
    directory, enc = args.local_dir, get_tokenizer(args.tokenizer)
    known = load_json(directory, "meta.json") + load_json(directory, "state_*.json")
    ours = re.compile(r"edufineweb_\w+\.npy\.tmp|state_\d+\.(lock|json\.tmp)|parquet_\d+")  # of a run that got nowhere
    if not known and os.path.isdir(directory) and not all(map(ours.fullmatch, os.listdir(directory))):
        fail(f"--local_dir {directory} holds something else: name another directory")
    keys = ("repo_id", "remote_name", "text_column", "shard_size", "max_tokens", "max_shards", "world_size")
    source, paths = {key: getattr(args, key) for key in keys}, None
    if known and not args.source:  # the commit and the files of the hub stay those of the first run
        source |= {key: known[0]["source"].get(key) for key in ("revision", "files")}
    else:
        source["revision"], source["files"], paths = find_files(args)
    about = {"tokenizer": args.tokenizer, "vocab_size": enc.n_vocab, "eot_token": enc.eot_token}
    for key, new in (about | source).items():
        for old in [old for one in known if (old := (one | one["source"]).get(key)) != new]:
            was = f"{directory} was begun with {key} {str(old)[:200]}, not {str(new)[:200]}"
            fail(f"{was}: repeat the first settings, or use another --local_dir")
    new = dict.fromkeys(("file", "row", "skip", "tokens", "partial", "documents", "bytes", "skipped"), 0)
    mine = [one for one in known if one.get("rank", args.rank) == args.rank]
    return mine[0] if mine else about | {"source": source, "shards": [], "rank": args.rank, "done": False} | new, paths


def run(args):
    """Make the shards of one rank, from where the last run stopped, with a progress bar on a terminal."""
    began, directory, folder = time.perf_counter(), args.local_dir, f"{args.local_dir}/parquet_{args.rank:05d}"
    state, paths = open_state(args)
    if "done" not in state:  # it is meta.json
        return print(f"{directory} already holds these shards")
    os.makedirs(directory, exist_ok=True)
    lock = open(f"{directory}/state_{args.rank:05d}.lock", "a", encoding="utf-8")  # noqa: SIM115, held open
    with contextlib.suppress(ImportError):  # Windows has no such lock
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
        except BlockingIOError:
            fail(f"another run of rank {args.rank} writes to {directory}: wait for it, or name another --local_dir")
    for path in (f"{directory}/{shard['file']}" for shard in state["shards"][-1:]):
        if os.path.exists(f"{path}.tmp"):  # killed before the last line of finish_shard
            os.replace(f"{path}.tmp", path)
    for stale in glob.glob(f"{glob.escape(folder)}/.cache/**/*.incomplete", recursive=True):
        os.remove(stale)  # of a killed run; the library begins a new one
    limit = min(args.max_tokens or sys.maxsize, (args.max_shards or sys.maxsize) * args.shard_size)
    need, free = 2 * (min(args.shard_size, limit) - state["partial"]), shutil.disk_usage(directory).free
    if need > free:
        fail(f"a shard takes {need} bytes, {directory} has {free} left: use a smaller --shard_size or make room")
    files, first = state["source"]["files"][args.rank :: args.world_size], state["file"]
    sizes, todo, read = [size for _, size in files], files[first:] if state["tokens"] < limit else [], 0
    bar = tqdm(initial=state["tokens"], unit="tok", unit_scale=True, disable=None)
    with start_workers(args.workers + (not paths)) as submit, bar:
        fetch = functools.partial(submit, download, args.repo_id, state["source"]["revision"], folder)
        coming = paths[args.rank :: args.world_size][first:] if paths else ahead((fetch(*file) for file in todo), 1)
        for file, (_, path) in enumerate(zip(todo, coming, strict=False), first):
            for share, *found in tokenize_file(submit, args, path, state["row"]):
                add(directory, state, limit, *found)
                read += found[2] / 1e6
                share = (sum(sizes[:file]) + sizes[file] * share) / sum(sizes)
                bar.total = int(min(limit, state["tokens"] / share))
                bar.set_postfix_str(f"{read / (time.perf_counter() - began):.1f} MB/s", refresh=False)
                bar.update(state["tokens"] - bar.n)
                if state["tokens"] == limit:
                    break
            if state["tokens"] == limit:
                break
            save(directory, state, file=file + 1, row=0)
            if not paths and not args.keep_parquet:
                os.remove(path)
    finish_shard(directory, state)
    save(directory, state, done=True)
    if not args.keep_parquet:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{state['documents']:,} documents ({state['skipped']:,} empty ones skipped), {state['bytes']:,} bytes,")
    print(f"{state['tokens']:,} tokens in {len(state['shards'])} shards, {time.perf_counter() - began:.1f} seconds")
    if args.world_size == 1:
        return finish(directory)
    print(f"rank {args.rank} is done: when all {args.world_size} are, run --finish --local_dir {directory}")


def end_at_ctrl_c(number, frame):
    """The handler of SIGINT: ends at once, as a run may at any moment; an exception can get lost in a library."""
    for process in multiprocessing.active_children():
        process.kill()
    os.write(2, b"interrupted: the same command continues\n")
    os._exit(130)


def main():
    signal.signal(signal.SIGINT, end_at_ctrl_c)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")  # argparse's own errors in one line, too
    add, env = parser.add_argument, os.environ.get
    add("--source", nargs="+", metavar="FILE", help="local parquet files or 'patterns' instead of the hub's")
    add("--repo_id", default="HuggingFaceFW/fineweb-edu", help="data set on the hub (HuggingFaceFW/fineweb-edu)")
    add("--remote_name", default="sample-10BT", help=f"{', '.join(SUBSETS)} or a folder, '' for all (sample-10BT)")
    add("--text_column", default="text", help="column of the documents (text)")
    add("--local_dir", default="edu_fineweb10B", help="directory to make (edu_fineweb10B)")
    add("--tokenizer", choices=["bytes", "gpt2"], default="gpt2", help="one token a byte, or GPT-2's (gpt2)")
    add("--shard_size", type=int, default=100_000_000, help="tokens a shard (100000000)")
    add("--max_tokens", type=int, default=0, help="stop after so many tokens a rank, 0: never (0)")
    add("--max_shards", type=int, default=0, help="stop after so many shards a rank, 0: never (0)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that tokenise (one a core)")
    add("--keep_parquet", action=argparse.BooleanOptionalAction, default=False, help="keep the downloads (no)")
    rank, world_size = env("RANK", env("SLURM_PROCID", "0")), env("WORLD_SIZE", env("SLURM_NTASKS", "1"))
    add("--rank", type=int, default=rank, help="number of this machine, from 0 ($RANK, $SLURM_PROCID, 0)")
    add("--world_size", type=int, default=world_size, help="machines ($WORLD_SIZE, $SLURM_NTASKS, 1)")
    add("--finish", action="store_true", help="write meta.json for --local_dir when all ranks are done")
    add("--verify", metavar="DIR", help="recount and describe the shards of a directory, do nothing else")
    args = parser.parse_args()
    for name, least in {"shard_size": 1, "max_tokens": 0, "max_shards": 0, "workers": 1, "rank": 0}.items():
        if getattr(args, name) < least:
            fail(f"--{name} is {getattr(args, name)}: it must be at least {least}")
    if args.rank >= args.world_size:
        fail(f"--rank {args.rank} must be below --world_size {args.world_size}")
    args.repo_id, args.remote_name = (None, None) if args.source else (args.repo_id, args.remote_name)
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_VERBOSITY="critical")
    try:
        verify(args.verify) if args.verify else finish(args.local_dir) if args.finish else run(args)
    except BrokenExecutor:
        fail(
            "a worker process was killed, perhaps for lack of memory: the same command continues, fewer --workers help"
        )
    except requests.RequestException as error:
        reason = f"cannot fetch the GPT-2 vocabulary ({type(error).__name__})"
        fail(f"{reason}: point TIKTOKEN_CACHE_DIR at a folder that holds it, or use --tokenizer bytes")
    except OSError as error:
        again = "what is finished stays and the same command continues, on a full disk after making room"
        fail(f"{error}: {again}" if error.errno and not args.verify else str(error))  # ours say what to do


if __name__ == "__main__":
    main()
