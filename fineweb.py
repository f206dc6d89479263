"""
Turn FineWeb-Edu, or any parquet data set with a text column, into the token shards that train_gpt2.py reads.

    python fineweb.py                                # sample-10BT of FineWeb-Edu from the Hugging Face hub
    python fineweb.py --max_tokens 300000000         # its first 300M tokens
    python fineweb.py --source 'books/*.parquet' --local_dir tokens --shard_size 1000000    # local files
    python fineweb.py --rank 0 --world_size 4        # one machine of four; when all are done: --finish
    python fineweb.py --verify edu_fineweb10B        # recount and describe any directory of shards

Writes LOCAL_DIR/edufineweb_val_000000.npy, edufineweb_train_000001.npy, ... (one-dimensional uint16 arrays, each
document after an <|endoftext|>) and at last meta.json, which describes them. However it is interrupted, the same
command continues. Disk: 2 bytes a token and two parquet files (2 GB each). 10B tokens take 40 minutes on two cores.
"""

import argparse
import functools
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import tiktoken
from tqdm import tqdm

SUBSETS = {
    "default": "data",
    "sample-10BT": "sample/10BT",
    "sample-100BT": "sample/100BT",
    "sample-350BT": "sample/350BT",
}
MANY = sys.maxsize  # no limit
CHUNK = 500_000  # characters of text a task: about 50 ms of work
NPY_HEADER = 128  # bytes of NumPy's header for a one-dimensional array of any length
LLMC_MAGIC, LLMC_HEADER = 20240520, 1024  # of llm.c's .bin shards, the header in bytes: 256 int32


class Problem(Exception):
    """What ends a run with one line: a user's mistake, or a failure of the network, a file or the disk."""


def fail(message):
    """Report a user's mistake in one line on stderr and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# -------------------------------------------------------------------------------- worker processes
# --- copied block: get_tokenizer ---
def get_tokenizer(name):
    """The tiktoken.Encoding called name.

    "gpt2" has 50,257 tokens; tiktoken fetches its vocabulary once, or finds it in TIKTOKEN_CACHE_DIR.
    "bytes" has 257: the 256 bytes and <|endoftext|>. It never needs a network.
    """
    if name == "bytes":
        byte_ranks = {bytes([i]): i for i in range(256)}
        pieces = r"(?s:.{1,1000})"  # how text is cut before merging; with no merges any cut gives the same
        return tiktoken.Encoding(
            "bytes", pat_str=pieces, mergeable_ranks=byte_ranks, special_tokens={"<|endoftext|>": 256}
        )
    try:
        return tiktoken.get_encoding(name)
    except (requests.RequestException, OSError) as error:
        fail(
            f"cannot fetch the GPT-2 vocabulary ({type(error).__name__}): use --tokenizer bytes, "
            "or point TIKTOKEN_CACHE_DIR at a folder that holds it"
        )


# --- end of copied block: get_tokenizer ---
cached_tokenizer = functools.cache(get_tokenizer)


def start_worker():
    """Make a new process leave Ctrl-C to its parent, and end when its parent does, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def tokenize(tokenizer, texts):
    """The tokens (N,) of some texts, and of each text (tokens, bytes, documents, skipped documents): (texts, 4).

    Skipped are texts that are null, empty or beyond the tokenizer, as a million spaces in a row are.
    """
    enc = cached_tokenizer(tokenizer)
    parts, counts = [np.empty(0, "<u2")], np.zeros((len(texts), 4), dtype=np.int64)
    for text, count in zip(texts, counts, strict=True):
        try:
            ids = enc.encode_to_numpy(text or "", disallowed_special=())
        except ValueError:
            ids = parts[0]
        if len(ids):
            parts += [[enc.eot_token], ids]
        count[:] = (1 + len(ids), len(text.encode()), 1, 0) if len(ids) else (0, 0, 0, 1)
    return np.concatenate(parts, dtype="<u2", casting="unsafe"), counts  # every id is below 65,536


# -------------------------------------------------------------------------------------- parquet in
def ask_hub(call, what, tries, at_start=False):
    """call(), after growing pauses again while the hub is busy or, except at the start, out of reach."""
    from huggingface_hub import constants, errors

    for attempt in range(tries):
        try:
            return call()
        except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError, errors.HFValidationError) as error:
            raise Problem(f"{constants.ENDPOINT} has no {what}, or needs HF_TOKEN for it: check --repo_id") from error
        except Exception as error:  # the hub, its HTTP client and its transfer library share no base class
            reason = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())[:200]
        if attempt + 1 == tries or (at_start and "ConnectError" in reason):
            advice = "the same command continues later; without a network, name parquet files with --source"
            raise Problem(f"cannot get {what} from {constants.ENDPOINT} ({reason}): {advice}")
        time.sleep(min(2**attempt, 60))  # seconds


def find_files(args):
    """The commit (of a hub) and [[name, bytes], ...] of all parquet files, in order, and the paths of local ones."""
    from huggingface_hub import HfApi

    if args.source:
        paths = []
        for pattern in args.source:
            found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
            paths += [path for path in found if path.endswith(".parquet")]
            if not paths:
                raise Problem(
                    f"no parquet file at --source {pattern}: name files, or a pattern such as 'data/*.parquet'"
                )
        return None, [[os.path.basename(path), os.path.getsize(path)] for path in paths], paths
    what, folder = f"data set {args.repo_id}", SUBSETS.get(args.remote_name, args.remote_name)
    commit = ask_hub(lambda: HfApi().dataset_info(args.repo_id).sha, what, args.tries, at_start=True)
    tree = functools.partial(HfApi().list_repo_tree, args.repo_id, folder or None, repo_type="dataset", recursive=True)
    found = ask_hub(lambda: list(tree(revision=commit)), f"{args.remote_name} in {what}", args.tries)
    files = sorted([entry.path, entry.size] for entry in found if entry.path.endswith(".parquet"))
    if not files:
        raise Problem(f"no parquet file in {args.remote_name} of {what}: check --remote_name")
    return commit, files, None


def download(repo_id, commit, folder, tries, name, size):
    """Fetch a parquet file of the hub to folder, whole, and return its path. Runs in a process of its own."""
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_VERBOSITY="critical")
    from huggingface_hub import hf_hub_download

    def fetch():
        path = hf_hub_download(repo_id, name, repo_type="dataset", revision=commit, local_dir=folder)
        if os.path.getsize(path) != size:
            os.remove(path)
            raise OSError(f"it came with another size than {size} bytes")
        return path

    return ask_hub(fetch, name, tries)


def downloads(fetch, files, keep):
    """Yield the paths of files as fetch(name, size) promises them, the next on its way; the caller is back: delete."""
    coming = fetch(*files[0]) if files else None
    for following in [*files[1:], None]:
        path, coming = coming.result(), following and fetch(*following)
        yield path
        if not keep:
            os.remove(path)


def read_texts(path, column, first_row):
    """Yield (row, rows, texts) from first_row on: some texts of a parquet file, the first one's row, the file's rows."""
    try:
        with pq.ParquetFile(path, buffer_size=2**20) as parquet:  # without a buffer it holds whole row groups
            schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
            kind = schema.field(column).type if column in schema.names else "missing"
            if kind not in (pa.string(), pa.large_string()):
                raise Problem(f"text column {column} of {path} is {kind}: --text_column {' or '.join(schema.names)}?")
            row, texts, length = 0, [], 0
            for batch in parquet.iter_batches(16, columns=[column]):
                new = batch.column(0)[max(0, first_row - row) :].to_pylist()
                row, texts, length = row + len(batch), texts + new, length + sum(len(text or "") for text in new)
                if length >= CHUNK and row < rows:
                    yield row - len(texts), rows, texts
                    texts, length = [], 0
            yield row - len(texts), rows, texts
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise Problem(f"{path} is not a sound parquet file ({reason}): delete it, get it again") from error


def tokenize_files(pool, workers, tokenizer, paths, column, file=0, row=0):
    """Yield (file, row, rows, tokens, counts), in order, for the texts of paths; the first is number file, from row on."""
    for file, path in enumerate(paths, file):  # noqa: B020
        pending = []
        for *where, texts in read_texts(path, column, row):
            pending.append((where, pool.submit(tokenize, tokenizer, texts)))
            if len(pending) > 8 * workers:
                where, result = pending.pop(0)
                yield file, *where, *result.result()
        for where, result in pending:  # all of a file is used before the next one, so that it can be deleted
            yield file, *where, *result.result()
        row = 0


# -------------------------------------------------------------------------------------- shards out
def load_json(pattern):
    """The paths that match, sorted, and the contents of these meta.json or state files."""
    paths, contents = sorted(glob.glob(pattern)), []
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                contents.append({"shards": [], "source": {}} | json.load(file))
        except (OSError, ValueError, TypeError) as error:
            raise Problem(f"cannot read {path} ({error}): delete the directory, or name another") from error
    return paths, contents


def save_json(path, content):
    """Write content to path, complete and on the disk, or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


class Shards:
    """The shards of one rank in the making, and the state file from which any later run continues them."""

    def __init__(self, directory, state):
        self.directory, self.state, self.file = directory, state, None
        self.total = state["partial"] + sum(shard["tokens"] for shard in state["shards"])
        for shard in state["shards"][-1:]:
            if os.path.exists(f"{directory}/{shard['file']}.tmp"):  # killed before the last line of save()
                os.replace(f"{directory}/{shard['file']}.tmp", f"{directory}/{shard['file']}")

    def begin(self):
        """Open the next shard where the state says. Ranks take turns with the numbers; number 0 is the val shard."""
        number = len(self.state["shards"]) * self.state["source"]["world_size"] + self.state["rank"]
        self.name = f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"
        mode = "r+b" if self.state["partial"] else "w+b"
        self.file = open(f"{self.directory}/{self.name}.tmp", mode, buffering=0)  # noqa: SIM115
        self.file.truncate(NPY_HEADER + 2 * self.state["partial"])
        self.file.seek(0, os.SEEK_END)

    def save(self, finish=False, **state):
        """Bring all tokens to the disk, with finish as a complete shard, and then the state that goes with them."""
        self.state.update(state)
        finish = finish and self.state["partial"]
        if finish:
            self.file.seek(0)
            header = {"descr": "<u2", "fortran_order": False, "shape": (finish,)}
            np.lib.format.write_array_header_1_0(self.file, header)
            self.file.seek(0)
            digest = hashlib.file_digest(self.file, "sha256").hexdigest()
            shard = {"file": self.name, "split": self.name.split("_")[1], "tokens": finish, "sha256": digest}
            self.state["shards"].append(shard)
            self.state["partial"] = 0
            tqdm.write(f"{self.directory}/{self.name}: {finish:,} tokens")
        if self.file:
            os.fsync(self.file.fileno())
        save_json(f"{self.directory}/state_{self.state['rank']:05d}.json", self.state)
        if finish:
            self.file.close()
            self.file = None
            os.replace(f"{self.directory}/{self.name}.tmp", f"{self.directory}/{self.name}")

    def write(self, file, row, rows, tokens, counts, limit):
        """Append one result of tokenize_files, or as much of it as reaches the limit; save where shard or file end."""
        state, size, ends = self.state, self.state["source"]["shard_size"], counts[:, 0].cumsum()
        at, before = state["skip"], np.array(state["counts"])
        while at < len(tokens) and self.total < limit:
            if not self.file:
                self.begin()
            n = min(size - state["partial"], limit - self.total, len(tokens) - at)
            view = memoryview(tokens[at : at + n]).cast("B")
            while view:
                view = view[self.file.write(view) :]
            at, self.total, state["partial"] = at + n, self.total + n, state["partial"] + n
            if state["partial"] == size or self.total == limit:
                i = int(np.searchsorted(ends, at, side="right"))  # the text that the next shard begins in
                skip = int(at - counts[:i, 0].sum())
                self.save(True, file=file, row=row + i, skip=skip, counts=(before + counts[:i].sum(0)).tolist())
        if self.total < limit:
            state["skip"], state["counts"] = 0, (before + counts.sum(0)).tolist()
            if row + len(counts) == rows:
                self.save(False, file=file + 1, row=0)


def finish(directory):
    """Write meta.json for the shards of all ranks, and delete their state files."""
    paths, states = load_json(f"{directory}/state_*.json")
    number, done = states[0]["source"]["world_size"] if states else 1, sum(state["done"] for state in states)
    if done < number or any(state["source"] != states[0]["source"] for state in states):
        raise Problem(f"{directory} has {done} of {number} ranks done with equal settings: run the others first")
    shards = sorted((shard for state in states for shard in state["shards"]), key=lambda shard: shard["file"][-10:])
    for shard in shards:
        path = f"{directory}/{shard['file']}"
        if not os.path.exists(path) or os.path.getsize(path) != NPY_HEADER + 2 * shard["tokens"]:
            raise Problem(f"{path} is missing or cut short: copy it here, or delete {directory} and start again")
    keys = ("tokenizer", "vocab_size", "eot_token", "source")
    save_json(f"{directory}/meta.json", {key: states[0][key] for key in keys} | {"shards": shards})
    for path in paths:
        os.remove(path)


def verify(directory):
    """Recount the shards of a directory, ours or foreign, compare them with meta.json if there is one, and report."""
    known = load_json(f"{directory}/meta.json")[1] or load_json(f"{directory}/state_*.json")[1]
    about = known[0] if known else {"tokenizer": "gpt2", "vocab_size": 50257, "eot_token": 50256}
    told = {shard["file"]: shard for one in known for shard in one["shards"]}
    names = sorted(os.path.basename(path) for kind in ("npy", "bin") for path in glob.glob(f"{directory}/*.{kind}"))
    if not names:
        raise Problem(f"no shard (.npy or .bin) in {directory}")
    enc, wrong = get_tokenizer(about["tokenizer"]), [f"{name} is missing" for name in told if name not in names]
    totals, frequency = {}, np.zeros(2**16, np.int64)
    for name in tqdm(names, disable=None, leave=False):
        path = f"{directory}/{name}"
        try:
            if name.endswith(".npy"):
                tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            else:
                header = np.fromfile(path, "<i4", 256)
                if len(header) < 256 or header[0] != LLMC_MAGIC or header[1] != 1:
                    raise ValueError("no llm.c header of version 1")
                tokens = np.memmap(path, "<u2", "r", LLMC_HEADER, (int(header[2]),))
            if tokens.dtype != "<u2" or tokens.ndim != 1 or os.path.getsize(path) != tokens.offset + tokens.nbytes:
                raise ValueError("no one-dimensional uint16 array, or another size than its header says")
        except (OSError, ValueError) as error:
            wrong.append(f"{name}: {error}")
            continue
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        count = sum(np.bincount(tokens[i : i + 2**22], minlength=2**16) for i in range(0, len(tokens), 2**22))
        frequency += count
        if count[about["vocab_size"] :].any():
            wrong.append(f"{name} has token {np.flatnonzero(count)[-1]}, above the vocabulary")
        if told and (name not in told or (told[name]["tokens"], told[name]["sha256"]) != (len(tokens), digest)):
            wrong.append(f"{name} ({len(tokens)} tokens, SHA-256 {digest[:16]}...) is not what meta.json describes")
        start = totals.setdefault("val" if "val" in name else "train", [0, 0, 0, tokens[:64].tolist()])
        start[:3] = start[0] + 1, start[1] + len(tokens), start[2] + int(count[about["eot_token"]])
    print(f"{directory}: {about['tokenizer']} tokens, {'SHA-256 compared' if told else 'no meta.json to compare with'}")
    for split, (shards, number, documents, ids) in totals.items():
        text = enc.decode([i for i in ids if i < about["vocab_size"]])
        print(f"{split}: {shards:,} shards, {number:,} tokens, {documents:,} documents, the first: {text!r}")
    top = [int(i) for i in np.argsort(-frequency)[:10] if i < about["vocab_size"]]
    print("most frequent: " + ", ".join(f"{enc.decode([i])!r} {frequency[i] / frequency.sum():.2%}" for i in top))
    if wrong:
        raise Problem(f"{len(wrong)} faults in {directory}: {'; '.join(wrong[:5])}")


# ------------------------------------------------------------------------------------ command line
def open_state(args, enc):
    """The state that --local_dir was left in or a new one, and the paths of local parquet files."""
    directory, keys = (
        args.local_dir,
        ("repo_id", "remote_name", "text_column", "shard_size", "max_tokens", "max_shards"),
    )
    known = load_json(f"{glob.escape(directory)}/meta.json")[1] + load_json(f"{glob.escape(directory)}/state_*.json")[1]
    source = {key: getattr(args, key) for key in (*keys, "world_size")}
    if known and not args.source:  # the commit and the files of the hub stay those of the first run
        paths, source["revision"], source["files"] = None, *map(known[0]["source"].get, ("revision", "files"))
    else:
        source["revision"], source["files"], paths = find_files(args)
    for other in known:
        for key, new in ({"tokenizer": args.tokenizer} | source).items():
            old = (other | other["source"]).get(key)
            if old != new:
                new, old = (repr(value)[:200] for value in (new, old))
                raise Problem(f"{directory} was begun with {key} {old}, not {new}: use that, or another --local_dir")
    if not known and os.path.isdir(directory) and any(not name.endswith(".tmp") for name in os.listdir(directory)):
        raise Problem(f"--local_dir {directory} holds something else: name another directory")
    for state in known:
        if state.get("rank", args.rank) == args.rank:
            return state, paths
    about = {"tokenizer": args.tokenizer, "vocab_size": enc.n_vocab, "eot_token": enc.eot_token, "source": source}
    start = {"file": 0, "row": 0, "skip": 0, "partial": 0, "counts": [0, 0, 0, 0], "done": False}
    return about | {"shards": [], "rank": args.rank} | start, paths


def run(args):
    """Make the shards of one rank, from where the last run was interrupted."""
    began, directory = time.perf_counter(), args.local_dir
    state, paths = open_state(args, get_tokenizer(args.tokenizer))
    if "done" not in state:  # then it is meta.json
        print(f"{directory} already holds these shards")
        return
    shards, limit = Shards(directory, state), min(args.max_tokens or MANY, (args.max_shards or MANY) * args.shard_size)
    if not state["done"]:
        os.makedirs(directory, exist_ok=True)
        need, free = 2 * (min(args.shard_size, limit) - state["partial"]), shutil.disk_usage(directory).free
        if need > free:
            raise Problem(f"--shard_size {args.shard_size} needs {need} bytes, {directory} has {free} free")
        save_json(f"{directory}/state_{args.rank:05d}.json", state)
        fill(shards, limit, paths, args)
        shards.save(True, done=True)
    if not args.source and not args.keep_parquet:
        shutil.rmtree(f"{directory}/parquet_{args.rank:05d}", ignore_errors=True)
    _, size, documents, skipped = state["counts"]
    print(f"{documents + (state['skip'] > 0):,} documents ({skipped:,} empty ones skipped), {size:,} bytes of text")
    print(f"{shards.total:,} tokens in {len(state['shards'])} shards, {time.perf_counter() - began:.1f} seconds")
    if args.world_size == 1:
        finish(directory)
    else:
        print(f"rank {args.rank} is done: when all {args.world_size} are, run --finish --local_dir {directory}")


def fill(shards, limit, paths, args):
    """Read, tokenise and write what is missing, with worker processes and, for the hub, one that downloads."""
    state, start, began = shards.state, shards.total, time.perf_counter()
    files = state["source"]["files"][args.rank :: args.world_size]
    sizes = [size for _, size in files]
    context, hold = multiprocessing.get_context("spawn"), getattr(signal, "pthread_sigmask", lambda how, signals: None)
    pool, hub = (ProcessPoolExecutor(number, context, start_worker) for number in (args.workers, 1))
    try:
        hold(getattr(signal, "SIG_BLOCK", 0), {signal.SIGINT})  # processes start with it, so Ctrl-C never hits them
        for _ in range(args.workers):
            pool.submit(tokenize, args.tokenizer, [])
        if paths:
            paths = paths[args.rank :: args.world_size][state["file"] :]
        else:
            folder = f"{shards.directory}/parquet_{args.rank:05d}"
            for stale in glob.glob(f"{glob.escape(folder)}/.cache/**/*.incomplete", recursive=True):
                os.remove(stale)  # of a killed run; the library begins a new one
            hub.submit(os.getpid)
            fetch = functools.partial(
                hub.submit, download, args.repo_id, state["source"]["revision"], folder, args.tries
            )
            paths = downloads(fetch, files[state["file"] :], args.keep_parquet)
        hold(getattr(signal, "SIG_UNBLOCK", 0), {signal.SIGINT})
        with tqdm(initial=start, unit="tok", unit_scale=True, disable=None) as bar:
            at, read = (state["file"], state["row"]), 0
            for file, row, rows, tokens, counts in tokenize_files(
                pool, args.workers, args.tokenizer, paths, args.text_column, *at
            ):
                shards.write(file, row, rows, tokens, counts, limit)
                share = (sum(sizes[:file]) + sizes[file] * (row + len(counts)) / max(rows, 1)) / sum(sizes)
                bar.total = int(min(limit, shards.total / share)) if share else None
                read += counts[:, 1].sum() / 1e6
                bar.set_postfix_str(f"{read / (time.perf_counter() - began):.1f} MB/s", refresh=False)
                bar.update(shards.total - bar.n)
                if shards.total >= limit:
                    break
    finally:
        for child in multiprocessing.active_children():
            child.kill()
            child.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = fail  # argparse reports its own errors in one line, too
    add = parser.add_argument
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
    add("--tries", type=int, default=8, help="tries a download, with pauses of 1, 2, 4, ... 60 seconds (8)")
    add("--keep_parquet", action=argparse.BooleanOptionalAction, default=False, help="keep the downloads (no)")
    env = os.environ.get
    add(
        "--rank", type=int, default=env("RANK", env("SLURM_PROCID", "0")), help="number of this machine, from 0 ($RANK)"
    )
    world = env("WORLD_SIZE", env("SLURM_NTASKS", "1"))
    add("--world_size", type=int, default=world, help="machines that share the files ($WORLD_SIZE)")
    add("--finish", action="store_true", help="write meta.json for --local_dir when all ranks are done")
    add("--verify", metavar="DIR", help="recount and describe the shards of a directory, do nothing else")
    args = parser.parse_args()
    for name, least in {"shard_size": 1, "max_tokens": 0, "max_shards": 0, "workers": 1, "tries": 1, "rank": 0}.items():
        if getattr(args, name) < least:
            fail(f"--{name} is {getattr(args, name)}: it must be at least {least}")
    if args.rank >= args.world_size:
        fail(f"--rank {args.rank} must be below --world_size {args.world_size}")
    if args.source:
        args.repo_id = args.remote_name = None
    try:
        if args.verify:
            verify(args.verify)
        elif args.finish:
            finish(args.local_dir)
        else:
            run(args)
    except Problem as problem:
        fail(problem)
    except BrokenProcessPool:
        fail("a worker process died, perhaps for lack of memory: the same command continues, with fewer --workers")
    except OSError as error:
        fail(f"cannot write to {args.local_dir} ({error}): make room, the same command continues")
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
