"""
Turn FineWeb-Edu, or your own documents, into token shards for train_gpt2.py.

    python fineweb.py                          # sample-10BT of FineWeb-Edu from the Hugging Face Hub
    python fineweb.py --max_tokens 300000000   # its first 300M tokens: 100M val and 200M train
    python fineweb.py --source 'books/*.parquet' --local_dir books_tokens    # own documents
    python fineweb.py --verify edu_fineweb10B  # verify and summarize a directory of shards

Reads the column or field "text" of parquet files and of JSON lines (.jsonl, also .gz or .zst).
Writes edufineweb_val_000000.npy, edufineweb_train_000001.npy, ... into LOCAL_DIR (shard_val_... for
other data than FineWeb-Edu), the tokenizer's vocab.json and merges.txt, and finally meta.json, which
describes the shards. A shard is a one-dimensional uint16 array, with <|endoftext|> before each
document.

The first shard is the validation split. If all tokens fit into one shard, the documents in its last
tenth become the validation split. Both are consecutive documents: if neighbors in your data belong
together, such as the chapters of a book, shuffle the documents, or put documents for validation
into the first file.

If a run is interrupted, run the same command again: it continues with the shard that was not
finished. A shard is collected in memory, 200 MB by default. The disk needs 2 bytes per token, and
room for three downloaded parquet files of about 2 GB each. Two CPU cores tokenize 5 to 15 million
tokens per second while the next file is downloaded. Expect half an hour to an hour for sample-10BT
(10 billion tokens, 27 GB of parquet files).

Sections: tokenizing, reading files, the Hub, shards, making a data set, verifying, shared
functions, command line.
"""

import argparse
import functools
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq
import tiktoken
from tqdm import tqdm

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
SUBSETS = {  # --remote_name: folder of FineWeb-Edu
    "default": "data",
    "sample-10BT": "sample/10BT",
    "sample-100BT": "sample/100BT",
    "sample-350BT": "sample/350BT",
}
LOCAL_FILES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
BATCH_SIZE = 64  # documents per task of a thread, about 20 ms of work
JSON_BLOCK_SIZE = 2**26  # bytes of JSON lines that are parsed together, more than a long document
STATE_FILE = "state_00000.json"  # train_gpt2.py refuses a directory with a file of this name
DOWNLOAD_ATTEMPTS = 8  # with pauses of 1, 2, 4, ... seconds between them


# -------------------------------------------------------------------------------- tokenizing
# GPT-2's pattern for splitting text into words, without its alternative \s+(?!\S).
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
# The 25 characters that \s matches in GPT-2's pattern, as they are written between [ and ].
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Two characters that hardly any document contains stand for special tokens.
BEGIN = "\0"  # becomes <|endoftext|>
CUT = "\1"  # its token is removed


class FastTokenizer:
    """Tokenizes many documents at once, at twice the speed of tiktoken's encode_ordinary.

    GPT-2 splits text into words and runs of whitespace before it merges bytes. If several spaces
    precede a word, the last one belongs to the word. GPT-2's pattern finds it by looking ahead:
    \\s+(?!\\S) matches a run of whitespace except for its last character. Looking ahead is slow,
    because only tiktoken's slower regex engine can do it. Without that alternative, \\s+ matches
    the whole run, unless the text is cut before its last character. With three spaces:

        GPT-2's pattern      "a   b"       ->  "a", "  ", " b"
        PATTERN              "a   b"       ->  "a", "   ", "b"      (wrong)
        PATTERN, with a cut  "a  " + " b"  ->  "a", "  ", " b"

    So every run of two or more whitespace characters before a word is cut before its last one.
    """

    def __init__(self, encoding):
        self.encoding = encoding
        self.end_of_text = encoding.eot_token
        self.cut = encoding.eot_token + 1
        # tiktoken wants the rank of each token in the order of merges. In GPT-2's vocabulary, the
        # rank of a token is its id. <|endoftext|> has the last id, and no rank.
        ranks = {}
        for token in range(encoding.eot_token):
            ranks[encoding.decode_single_token_bytes(token)] = token
        self.fast_encoding = tiktoken.Encoding(
            f"{encoding.name}_without_look_ahead",
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens={BEGIN: self.end_of_text, CUT: self.cut},
        )

    def encode(self, texts):
        """Return the tokens of documents, with <|endoftext|> before each, as a uint16 array (N,).

        texts is a pyarrow array of large_string. Null and empty texts are left out.
        """
        # the length of a null is null, and filter drops the rows whose condition is null
        texts = texts.filter(pc.greater(pc.binary_length(texts), 0))
        # rare: a document contains a placeholder itself, so use the slow tokenizer
        if pc.any(pc.match_substring_regex(texts, f"[{BEGIN}{CUT}]")).as_py():
            tokens = []
            for text in texts.to_pylist():
                tokens.append(self.end_of_text)
                tokens.extend(self.encoding.encode_ordinary(text))
            return np.array(tokens, "<u2")
        # otherwise encode all documents at once: BEGIN text BEGIN text ..., with CUT inside them
        last_space = f"([{SPACE}])([{SPACE}][^{SPACE}])"
        texts = pc.replace_substring_regex(texts, last_space, f"\\1{CUT}\\2")
        joined = "".join(BEGIN + text for text in texts.to_pylist())
        tokens = self.fast_encoding.encode_to_numpy(joined, allowed_special={BEGIN, CUT})
        return tokens[tokens != self.cut].astype("<u2")


def map_in_order(submit, function, items, max_pending):
    """Yield function(item) for each item, in order.

    submit(function, item) starts the work in a thread and returns a Future. Up to max_pending
    items are worked on in advance. tiktoken and pyarrow release Python's global lock, so threads
    use all cores.
    """
    pending = deque()
    for item in items:
        pending.append(submit(function, item))
        if len(pending) > max_pending:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# ----------------------------------------------------------------------------- reading files
def find_local_files(patterns):
    """Return the paths that --source matches."""
    paths = []
    for pattern in patterns:
        # the name of a file may contain characters that mean something in patterns
        matches = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        # a pattern may also match other files, such as a README
        matches = [path for path in matches if path.endswith(LOCAL_FILES)]
        if not matches:
            fail(f"--source {pattern} matches no {', '.join(LOCAL_FILES)} file: pass the paths of such files")
        paths += matches
    return paths


def describe_files(paths, workers):
    """Return [[name, bytes, SHA-256], ...] of local files."""
    # Each start reads all files for their checksums: a file may have changed since the last run.
    with ThreadPoolExecutor(workers) as pool:
        work = pool.map(sha256_of, paths)
        checksums = list(tqdm(work, "checksums", len(paths), disable=None, leave=False))
    names = [os.path.basename(path) for path in paths]
    sizes = [os.path.getsize(path) for path in paths]
    return [list(file) for file in zip(names, sizes, checksums, strict=True)]


def read_parquet(path, column):
    """Yield the text column of a parquet file in pyarrow arrays of BATCH_SIZE rows."""
    # without buffer_size, pyarrow keeps whole row groups in memory
    with pq.ParquetFile(path, buffer_size=2**20) as parquet:
        # other types could be converted to text, but they are most likely a mistake
        schema = parquet.schema_arrow
        text_types = (pa.string(), pa.large_string(), pa.string_view())
        if column not in schema.names or schema.field(column).type not in text_types:
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise ValueError(f"{column} is not a text column, choose --text_column from {columns}")
        for batch in parquet.iter_batches(BATCH_SIZE, columns=[column]):
            yield batch.column(0).cast(pa.large_string())


def read_json_lines(path, column):
    """Yield one field of a file of JSON lines in pyarrow arrays of up to BATCH_SIZE rows."""
    # other fields may differ from line to line: they are not parsed
    parse_options = pa.json.ParseOptions(
        explicit_schema=pa.schema([(column, pa.large_string())]), unexpected_field_behavior="ignore"
    )
    read_options = pa.json.ReadOptions(block_size=JSON_BLOCK_SIZE)
    # open_json decompresses a file whose name ends with .gz or .zst
    for number, block in enumerate(pa.json.open_json(path, read_options, parse_options)):
        texts = block.column(0)
        # a field that does not exist is null in all lines
        if number == 0 and texts.null_count == len(texts):
            raise ValueError(f"its first lines have no field {column}, choose another --text_column")
        for start in range(0, len(texts), BATCH_SIZE):
            yield texts[start : start + BATCH_SIZE]


def tokenize_files(args, tokenizer, paths, state, pool):
    """Yield (number of the file, number of the batch in it, tokens) for each batch of documents.

    Begins where the state says. The batches before it are read, which is fast, but not tokenized.
    """
    first_batch = state.batch
    for file, path in enumerate(paths, start=state.file):
        read_batches = read_parquet if path.endswith(".parquet") else read_json_lines
        with explain(f"cannot use {path}", "replace or omit this file"):
            texts = itertools.islice(read_batches(path, args.text_column), first_batch, None)
            batches = map_in_order(pool.submit, tokenizer.encode, texts, 4 * args.workers)
            for batch, tokens in enumerate(batches, start=first_batch):
                yield file, batch, tokens
        first_batch = 0


# ----------------------------------------------------------------------------------- the Hub
def list_hub_files(repo_id, remote_name):
    """Return the newest commit of a data set, and [[name, bytes, SHA-256], ...] of its files."""
    from huggingface_hub import HfApi  # imported here because it is slow

    folder = SUBSETS.get(remote_name, remote_name)
    prefix = f"{folder}/" if folder else ""  # of the names of the files
    advice = "check --repo_id, --remote_name, HF_TOKEN and the network, or pass local files with --source"
    with explain(f"cannot list {remote_name} of {repo_id} on the Hugging Face Hub", advice):
        # one request returns the names, sizes and checksums of all files
        info = HfApi().dataset_info(repo_id, files_metadata=True)
        files = []
        for file in info.siblings:
            if file.rfilename.startswith(prefix) and file.rfilename.endswith(".parquet"):
                files.append([file.rfilename, file.size, file.lfs.sha256])
        if not files:
            raise ValueError("it has no parquet files")
    return info.sha, sorted(files)


def download(repo_id, revision, folder, file):
    """Download a parquet file of the Hub into folder, verify it, and return its path.

    file is [name, bytes, SHA-256]. Raises OSError if all attempts fail.
    """
    from huggingface_hub import hf_hub_download  # imported here because it is slow

    name, _, sha256 = file
    path = f"{folder}/{name}"
    for attempt in range(DOWNLOAD_ATTEMPTS):
        if attempt > 0:
            time.sleep(2 ** (attempt - 1))
        try:
            # an earlier run may have downloaded the file
            if not os.path.exists(path):
                hf_hub_download(repo_id, name, repo_type="dataset", revision=revision, local_dir=folder)
            # the network or the disk may have damaged it
            if sha256_of(path) == sha256:
                return path
            os.remove(path)
            reason = "it does not match its checksum"
        except Exception as error:  # errors of the Hub and of HTTP share no base class
            reason = f"{type(error).__name__}: {error}"
            # the data set is private or gated, or the file is missing: waiting would not help
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
                break
    raise OSError(f"cannot download {name} ({reason})")


def start_thread(function, item):
    """Start function(item) in a thread and return its Future.

    Python does not wait for such a thread when it exits. It would wait for those of a
    ThreadPoolExecutor, which means minutes for a download that is not needed any more.
    """
    future = Future()

    def work():
        try:
            future.set_result(function(item))
        except Exception as error:  # whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


# ------------------------------------------------------------------------------------ shards
@dataclass
class State:
    """How far the work has come. It is saved after each full shard, for a run that continues."""

    settings: dict  # as in meta.json: tokenizer, vocab_size, eot_token, source
    # Where the next shard begins: number of the file, number of the batch in that file, number of
    # tokens of that batch that finished shards contain.
    file: int = 0
    batch: int = 0
    skip: int = 0
    shards: list = field(default_factory=list)  # [{"file", "split", "tokens", "sha256"}, ...]

    @property
    def tokens(self):
        return sum(shard["tokens"] for shard in self.shards)


class ShardWriter:
    """Collects tokens in memory, and writes them and the state whenever a shard is full."""

    def __init__(self, directory, state, shard_size, max_tokens):
        self.directory = directory
        self.state = state
        self.buffer = np.empty(shard_size, "<u2")  # the tokens of the current shard
        self.used = 0  # number of tokens in the buffer
        self.room = (max_tokens or sys.maxsize) - state.tokens  # tokens that may still come

    def add(self, file, batch, tokens):
        """Add the tokens of a batch of a file, and write the shards that it fills."""
        state = self.state
        # the first batch of a run that continues: finished shards contain a part of it
        start = state.skip if (file, batch) == (state.file, state.batch) else 0
        while start < len(tokens) and self.room > 0:
            # Write a full shard once another token follows. So if all tokens fit into one shard,
            # finish has all of them in the buffer.
            if self.used == len(self.buffer):
                self.write_shard("train" if state.shards else "val", self.buffer)
                state.file, state.batch, state.skip = file, batch, start
                self.save_state()
                self.used = 0
            # copy as many tokens as the shard and the limit have room for
            part = tokens[start : start + min(self.room, len(self.buffer) - self.used)]
            self.buffer[self.used : self.used + len(part)] = part
            self.used += len(part)
            self.room -= len(part)
            start += len(part)

    def finish(self):
        """Write the remaining tokens. Splits them if they are the whole data set.

        The state is not saved: a run that is killed before meta.json is written writes them again.
        """
        tokens = self.buffer[: self.used]
        if self.state.shards:
            self.write_shard("train", tokens)  # shorter than the others
        else:
            # all tokens fit into one shard: cut them at the beginning of a document
            beginnings = np.flatnonzero(tokens == self.state.settings["eot_token"])
            if len(beginnings) < 2:
                fail(
                    f"{len(tokens)} tokens in {len(beginnings)} documents are too few for training and validation: "
                    "check --source and --text_column, or use prepare_shakespeare.py for a single text"
                )
            # the first document that begins in the last tenth, or the last document
            number = np.searchsorted(beginnings, 0.9 * len(tokens))
            cut = beginnings[min(number, len(beginnings) - 1)]
            self.write_shard("val", tokens[cut:])
            self.write_shard("train", tokens[:cut])
            print(f"all tokens fit into one shard: the last {len(tokens) - cut:,} are for validation")

    def write_shard(self, split, tokens):
        """Write a shard, and add it to the state in memory."""
        state = self.state
        # The state file marks the directory as unfinished. It is not written before the first shard,
        # so that after a mistake, such as a wrong --text_column, the directory can be used again.
        if not state.shards:
            self.save_state()
        # build-nanogpt has this name for shards of FineWeb-Edu
        is_fineweb_edu = state.settings["source"]["repo_id"] == FINEWEB_EDU
        prefix = "edufineweb" if is_fineweb_edu else "shard"
        name = f"{prefix}_{split}_{len(state.shards):06d}.npy"
        path = f"{self.directory}/{name}"
        with atomic_write(path) as file:
            np.save(file, tokens)
        shard = {"file": name, "split": split, "tokens": len(tokens), "sha256": sha256_of(path)}
        state.shards.append(shard)

    def save_state(self):
        write_json(f"{self.directory}/{STATE_FILE}", asdict(self.state))


# ------------------------------------------------------------------------- making a data set
def make_data_set(args):
    """Make the shards and meta.json, continuing an earlier run in the same directory."""
    directory = args.local_dir
    started = time.perf_counter()
    encoding = load_tokenizer(args.tokenizer)
    os.makedirs(directory, exist_ok=True)
    with lock(directory):
        # find out what is here already: a run that continues must have the settings of the first one
        advice = "delete it, or choose another --local_dir"
        with explain(f"cannot use the files in {directory}", advice):
            state, saved = read_state(directory)
        settings, paths = get_settings(args, encoding, saved)
        if saved:
            check_same_settings(directory, saved, settings)

        # make what is missing
        if os.path.exists(f"{directory}/meta.json"):
            print(f"{directory} is complete")
        else:
            state = state or State(settings)
            make_shards(args, FastTokenizer(encoding), paths, state)
            # meta.json comes last: it says that everything else is there
            write_tokenizer_files(args.tokenizer, directory)
            write_json(f"{directory}/meta.json", {**settings, "shards": state.shards})
            seconds = time.perf_counter() - started
            print(f"{state.tokens:,} tokens in {len(state.shards)} shards, {seconds:.1f} seconds")
        # delete what only an unfinished directory needs
        shutil.rmtree(f"{directory}/downloads", ignore_errors=True)
        with suppress(FileNotFoundError):
            os.remove(f"{directory}/{STATE_FILE}")


@contextmanager
def lock(directory):
    """Lock a directory, so that two runs do not write the same files.

    The operating system releases the lock when the process ends, even if it is killed.
    """
    file_lock = filelock.FileLock(f"{directory}/{STATE_FILE}.lock", fallback_to_soft=False)
    try:
        file_lock.acquire(blocking=False)
    except filelock.Timeout:
        fail(f"another run is writing to {directory}: wait for its end, or choose another --local_dir")
    except (OSError, NotImplementedError) as error:  # some cluster file systems have no locks
        print(f"warning: cannot lock {directory} ({error}): start only one run in it", file=sys.stderr)
    try:
        yield
    finally:
        file_lock.release()
        with suppress(OSError):  # another run may have opened it
            os.remove(file_lock.lock_file)


def read_state(directory):
    """Return the State of an unfinished directory, or None, and the settings of the first run.

    The settings are a flat dict, or None in a new directory.
    """
    state = None
    if os.path.exists(f"{directory}/meta.json"):
        settings = read_meta(directory)
    elif os.path.exists(f"{directory}/{STATE_FILE}"):
        with open(f"{directory}/{STATE_FILE}", encoding="utf-8") as file:
            state = State(**json.load(file))
        settings = state.settings
    elif glob.glob(f"{glob.escape(directory)}/*.npy"):
        # of another data set, or of another project: they would be mixed with the new ones
        raise ValueError("it contains shards without meta.json")
    else:
        return None, None
    return state, {**settings, **settings["source"]}


def get_settings(args, encoding, saved):
    """Return what determines the shards, for meta.json, and the paths of local files or None."""
    repo_id, remote_name = args.repo_id, args.remote_name
    revision = paths = None
    if args.source:
        repo_id = remote_name = None
        paths = find_local_files(args.source)
        files = describe_files(paths, args.workers)
    elif saved:  # the data set may have changed on the Hub: keep to one commit
        revision, files = saved.get("revision"), saved.get("files")
    else:
        revision, files = list_hub_files(repo_id, remote_name)
    source = {
        "repo_id": repo_id,
        "remote_name": remote_name,
        "text_column": args.text_column,
        "shard_size": args.shard_size,
        "max_tokens": args.max_tokens,
        "revision": revision,
        "files": files,
    }
    # train_gpt2.py reads the tokenizer's values, the source tells people where the tokens come from
    settings = {
        "tokenizer": args.tokenizer,
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
        "source": source,
    }
    return settings, paths


def check_same_settings(directory, saved, settings):
    """Exit with an error if settings differ from those that a directory was started with."""
    for name, new in {**settings, **settings["source"]}.items():
        old = saved.get(name)
        if old == new or name == "source":
            continue
        if name == "files":  # the list can be long: show the first file that differs
            pairs = itertools.zip_longest(old, new)
            old, new = next(pair for pair in pairs if pair[0] != pair[1])
        fail(
            f"{directory} was started with {name} {old}, not {new}: use the original settings and files, "
            "or another --local_dir"
        )


def make_shards(args, tokenizer, paths, state):
    """Tokenize the files into shards, beginning where the state says. paths are those of local files."""
    source = state.settings["source"]
    names = [name for name, *_ in source["files"]]
    folder = f"{args.local_dir}/downloads"
    if paths is None:
        # no name from the Hub or from the state may lead out of the folder
        if any(re.search(r"\.\.|[\\:]", name) for name in names):
            fail(f"{args.repo_id} contains files with .. or : in their names: use another data set")
        shutil.rmtree(f"{folder}/.cache", ignore_errors=True)  # unfinished downloads
        get_path = functools.partial(download, source["repo_id"], source["revision"], folder)
        # download the next file while a file is tokenized
        paths = map_in_order(start_thread, get_path, source["files"][state.file :], max_pending=1)
    else:
        paths = paths[state.file :]

    writer = ShardWriter(args.local_dir, state, args.shard_size, args.max_tokens)
    total = args.max_tokens or None  # with a total, the bar estimates the time left
    bar = tqdm(initial=state.tokens, total=total, unit="tok", unit_scale=True, disable=None)
    # tokenize in threads, and write shards in this one
    with bar, ThreadPoolExecutor(args.workers) as pool:
        first_file = state.file
        for file, batch, tokens in tokenize_files(args, tokenizer, paths, state, pool):
            bar.set_description(f"file {file + 1} of {len(names)}", refresh=False)
            bar.update(len(tokens))
            writer.add(file, batch, tokens)
            # a later run does not need the downloads before the state's file
            for name in names[first_file : state.file]:
                with suppress(FileNotFoundError):
                    os.remove(f"{folder}/{name}")
            first_file = state.file
            if writer.room == 0:
                break
    writer.finish()


# -------------------------------------------------------------------------------- verifying
SHARD_NAME = r"[^./\\][^/\\]*_(train|val)(_\d+)?\.(npy|bin)"  # also llm.c's tiny_shakespeare_val.bin


def read_meta(directory):
    """Return the content of meta.json. Raises an error if it is damaged."""
    with open(f"{directory}/meta.json", encoding="utf-8") as file:
        meta = json.load(file)
    for shard in meta["shards"]:
        # a plain name cannot lead out of the directory
        if not re.fullmatch(SHARD_NAME, shard["file"]):
            raise ValueError(f"{shard['file']} is not the name of a shard")
    return meta


def verify(directory):
    """Check all shards of a directory, and print a summary."""
    # find the shards: meta.json lists those of our scripts, other projects have only the files
    with explain(f"cannot verify {directory}", "pass a directory of shards"):
        if os.path.exists(f"{directory}/meta.json"):
            meta = read_meta(directory)
        elif os.path.exists(f"{directory}/{STATE_FILE}"):
            fail(f"{directory} is not finished: run the command that makes it again")
        else:
            names = sorted(os.listdir(directory))
            shards = [{"file": name} for name in names if re.fullmatch(SHARD_NAME, name)]
            if not shards:
                raise ValueError("it contains no shards")
            print(f"{directory} has no meta.json: GPT-2 tokens are assumed, and there are no checksums")
            meta = {"tokenizer": "gpt2", "shards": shards}
    encoding = load_tokenizer(meta["tokenizer"])

    # check each shard, and count its tokens and documents; problems are reported at the end
    problems = []
    totals = {}  # split: array of its number of shards, tokens and documents
    for shard in tqdm(meta["shards"], desc="verifying", unit="shard", disable=None, leave=False):
        path = f"{directory}/{shard['file']}"
        try:
            tokens = load_shard(path)
            if shard.get("sha256") and sha256_of(path) != shard["sha256"]:
                raise ValueError("it does not match its checksum")
            if tokens.max(initial=0) >= encoding.n_vocab:
                raise ValueError(f"it contains token ids above {encoding.n_vocab - 1}")
        except Exception as error:  # damaged headers raise errors of many types
            problems.append(f"{path} ({error})")
            continue
        split = re.fullmatch(SHARD_NAME, shard["file"])[1]
        if split not in totals:
            totals[split] = np.zeros(3, int)
            print(f"{shard['file']} begins with {encoding.decode(tokens[:50].tolist())!r}")
        totals[split] += [1, len(tokens), np.count_nonzero(tokens == encoding.eot_token)]
    for split, (num_shards, num_tokens, documents) in totals.items():
        print(f"{split}: {num_shards:,} shards, {num_tokens:,} tokens, {documents:,} documents")
    if problems:
        fail(f"problems with {'; '.join(problems[:5])}: regenerate {directory}, or restore it from a copy")
    print("no problems found")


# ------------------------------------------------------------------------- shared functions
# --- copied block: get_tokenizer ---
def get_tokenizer(name):
    """Return the tokenizer "gpt2" (50,257 tokens) or "bytes" (the 256 bytes and <|endoftext|>).

    tiktoken downloads GPT-2's vocabulary on first use, or reads it from TIKTOKEN_CACHE_DIR.
    """
    if name == "gpt2":
        return tiktoken.get_encoding("gpt2")
    return tiktoken.Encoding(
        name,
        pat_str=r"(?s:.{1,1000})",  # where text is split does not matter: no tokens are merged
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )


# --- end of copied block: get_tokenizer ---
# --- copied block: load_tokenizer ---
def load_tokenizer(name):
    """Return the tokenizer with this name. Exits with an error if it cannot be loaded."""
    advice = "connect to the network once, or set TIKTOKEN_CACHE_DIR to a directory that contains it"
    with explain(f"cannot load the tokenizer {name}", advice):
        return get_tokenizer(name)


# --- end of copied block: load_tokenizer ---
# --- copied block: write_tokenizer_files ---
def write_tokenizer_files(name, directory):
    """Write vocab.json and merges.txt, from which transformers builds the tokenizer."""
    if name == "gpt2":
        # OpenAI's files, which tiktoken downloads and keeps in its cache
        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
        vocab_sha256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
        merges_sha256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
        vocab = tiktoken.load.read_file_cached(f"{url}/encoder.json", vocab_sha256)
        merges = tiktoken.load.read_file_cached(f"{url}/vocab.bpe", merges_sha256)
    else:
        # GPT-2 writes each byte as one character: the printable bytes of Latin-1 as themselves, the
        # others as the characters from 256 on. There are no merges.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        ids = {chr(byte): byte for byte in printable}
        ids.update({chr(256 + i): byte for i, byte in enumerate(others)})
        ids["<|endoftext|>"] = 256
        vocab = json.dumps(ids).encode()
        merges = b"#version: 0.2\n"
    with atomic_write(f"{directory}/vocab.json") as file:
        file.write(vocab)
    with atomic_write(f"{directory}/merges.txt") as file:
        file.write(merges)


# --- end of copied block: write_tokenizer_files ---
# --- copied block: files ---
@contextmanager
def atomic_write(path):
    """Open a binary file that gets its name only when it is complete and on the disk."""
    with open(f"{path}.tmp", "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def write_json(path, content):
    """Write a JSON file atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def sha256_of(path):
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- end of copied block: files ---
# --- copied block: load_shard ---
def load_shard(path):
    """Memory-map a token shard, a .npy file or a .bin file of llm.c. Returns a uint16 array (N,)."""
    if path.endswith(".npy"):
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    else:  # 256 int32: magic number, version, number of tokens, zeros
        magic, _, num_tokens = np.fromfile(path, "<i4", count=3).tolist()
        if magic != 20240520:
            raise ValueError("it does not begin with llm.c's number 20240520")
        tokens = np.memmap(path, "<u2", mode="r", offset=1024, shape=(num_tokens,))
    if tokens.dtype != np.dtype("<u2") or tokens.ndim != 1:
        raise ValueError(f"it contains {tokens.dtype} in {tokens.ndim} dimensions, not uint16 in one")
    return tokens


# --- end of copied block: load_shard ---
# ----------------------------------------------------------------------------- command line
# --- copied block: errors ---
def fail(message):
    """Report a user error in one line on stderr and exit with status 2."""
    print("error:", *str(message).split(), file=sys.stderr)  # some messages have several lines
    sys.exit(2)


@contextmanager
def explain(problem, advice):
    """Turn any error in the with block into one line: what failed, why, and what to do."""
    try:
        yield
    except Exception as error:  # damaged files raise errors of many types
        # other messages, such as that of a KeyError, say nothing without the type
        is_clear = isinstance(error, (OSError, ValueError)) and str(error)
        reason = error if is_clear else f"{type(error).__name__}: {error}"
        fail(f"{problem} ({reason}): {advice}")


# --- end of copied block: errors ---
def parse_args():
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}: see --help")  # argparse's own errors in one line
    add = parser.add_argument
    # what to read
    add("--source", nargs="+", metavar="FILE", help="local files, or patterns (default: the Hub)")
    add("--repo_id", default=FINEWEB_EDU, help="data set on the Hugging Face Hub (default: %(default)s)")
    add("--remote_name", default="sample-10BT", help=f"{', '.join(SUBSETS)} or a folder (default: %(default)s)")
    add("--text_column", default="text", help="column or field with the documents (default: %(default)s)")
    # what to write
    add("--local_dir", default="edu_fineweb10B", help="output directory (default: %(default)s)")
    add("--tokenizer", choices=["bytes", "gpt2"], default="gpt2", help="%(default)s, or one token per byte")
    add("--shard_size", type=int, default=100_000_000, help="tokens per shard (default: %(default)s)")
    add("--max_tokens", type=int, default=0, help="stop after this many tokens (default: 0, no limit)")
    # system and other actions
    add("--workers", type=int, default=os.cpu_count(), help="threads that tokenize (default: one per CPU core)")
    add("--verify", metavar="DIR", help="only verify and summarize the shards of a directory")
    args = parser.parse_args()
    for name, minimum in {"shard_size": 1, "max_tokens": 0, "workers": 1}.items():
        if getattr(args, name) < minimum:
            fail(f"--{name} {getattr(args, name)} is too small: use at least {minimum}")
    return args


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script without a traceback
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    args = parse_args()
    # This script shows progress and reports errors itself. huggingface_hub reads these variables
    # when it is imported, which happens later.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_VERBOSITY"] = "critical"
    try:
        if args.verify:
            verify(args.verify)
        else:
            make_data_set(args)
    except MemoryError as error:
        fail(f"out of memory ({error}): use a smaller --shard_size or fewer --workers")
    except OSError as error:  # for example a full disk or a failed download
        fail(f"{error}: correct this and run the same command again, finished shards are kept")


if __name__ == "__main__":
    main()
