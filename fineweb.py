"""
Turn FineWeb-Edu, or any parquet files with a text column, into token shards that train_gpt2.py reads.

    python fineweb.py                          # sample-10BT of FineWeb-Edu from the Hugging Face Hub
    python fineweb.py --max_tokens 300000000   # its first 300M tokens: 100M val and 200M train
    python fineweb.py --source 'books/*.parquet' --local_dir books_tokens      # local files
    python fineweb.py --rank 0 --world_size 4  # on the first of four machines
    python fineweb.py --finish                 # when all four machines are done
    python fineweb.py --verify edu_fineweb10B  # verify and summarize a directory of shards

Reads parquet files from this machine or from the Hub. Writes into LOCAL_DIR the shards
edufineweb_val_000000.npy, edufineweb_train_000001.npy, ..., the tokenizer's vocab.json and merges.txt,
and finally meta.json, which describes the shards. A shard is a one-dimensional uint16 array, with
<|endoftext|> before each document.

The first shard is the validation split, and all others are for training. For a small data set,
choose a --shard_size of about one tenth of its tokens. A data set without a training shard is an
error, and the error message says which --shard_size to use.

With --world_size N, each of N machines tokenizes every N-th parquet file. --finish needs the shards
and state files of all machines in one LOCAL_DIR: use a shared file system, or copy them into one
directory first. --max_tokens and --max_shards apply to each machine.

If interrupted, run the same command again to continue: at most one shard of work is repeated. A
shard is collected in memory, 200 MB by default. The disk needs room for 2 bytes per token and for
two downloaded parquet files of about 2 GB each. Two CPU cores tokenize 5 to 15 million tokens per
second while the next file is downloaded, so the download usually sets the pace. Expect half an hour
to an hour for sample-10BT (10 billion tokens, 27 GB of parquet files).

Sections: tokenizing, parquet files, shards and state, making a data set, finishing, verifying,
shared functions, command line.
"""

import argparse
import contextlib
import errno
import functools
import glob
import hashlib
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
from dataclasses import asdict, dataclass, field, fields

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tiktoken
from tqdm import tqdm

SUBSETS = {  # --remote_name: folder in the FineWeb-Edu repository
    "default": "data",
    "sample-10BT": "sample/10BT",
    "sample-100BT": "sample/100BT",
    "sample-350BT": "sample/350BT",
}
BATCH_SIZE = 64  # documents per task of a thread, about 20 ms of work
DOWNLOAD_ATTEMPTS = 8  # with pauses of 1, 2, 4, ... seconds between them
# Each srun command in a Slurm job starts a job step, and these steps have the numbers 0, 1, 2, ...
# Batch scripts and interactive shells have special step numbers, of which this is the smallest.
FIRST_SPECIAL_STEP = 2**32 - 16


# -------------------------------------------------------------------------------- tokenizing
# --- copied block: get_tokenizer ---
def get_tokenizer(name):
    """Return the tokenizer "gpt2" (50,257 tokens) or "bytes" (the 256 bytes and <|endoftext|>).

    tiktoken downloads GPT-2's vocabulary on first use, or reads it from TIKTOKEN_CACHE_DIR. "bytes"
    needs no network. Raises ValueError if the vocabulary cannot be loaded.
    """
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # network, disk or a wrong file: these errors share no base class
            raise ValueError(
                f"cannot load GPT-2's vocabulary ({type(error).__name__}): connect to the network once, "
                "or set TIKTOKEN_CACHE_DIR to a directory that contains it"
            ) from None
    byte_ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding(
        name,
        pat_str=r"(?s:.{1,1000})",  # where text is split does not matter, because no tokens are merged
        mergeable_ranks=byte_ranks,
        special_tokens={"<|endoftext|>": 256},
    )


# --- end of copied block: get_tokenizer ---


# GPT-2's pattern for splitting text into words, without its alternative \s+(?!\S).
# encode_documents explains why.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
# The 25 characters that \s matches in GPT-2's pattern, in the notation of a character class: [...].
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Two characters that hardly any document contains represent special tokens while texts are encoded.
BEGIN = "\0"  # becomes <|endoftext|>
CUT = "\1"  # its token is removed


def without_look_ahead(encoding):
    """Return a copy of a tiktoken.Encoding that uses PATTERN and has tokens for BEGIN and CUT."""
    # tiktoken wants the rank of each token, its place in the order of merges. In GPT-2's vocabulary
    # the rank of a token is its id. <|endoftext|> has the last id, and no rank.
    ranks = {}
    for token in range(encoding.eot_token):
        ranks[encoding.decode_single_token_bytes(token)] = token
    return tiktoken.Encoding(
        f"{encoding.name}_without_look_ahead",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={BEGIN: encoding.eot_token, CUT: encoding.eot_token + 1},
    )


def encode_documents(fast_encoding, texts):
    """Return the tokens of documents, with <|endoftext|> before each, as a uint32 array.

    fast_encoding is what without_look_ahead returns; texts is a pyarrow array of large_string
    without nulls. The tokens are those of encode_ordinary, at twice its speed.
    """
    # GPT-2 splits text into words and runs of whitespace before it merges bytes. If several spaces
    # precede a word, the last space belongs to the word. GPT-2's pattern finds it by looking ahead:
    # \s+(?!\S) matches a run of whitespace except for its last character. Looking ahead is slow,
    # because only tiktoken's slower regex engine can do it. Without that alternative, \s+ matches
    # the whole run, unless the text is cut before its last character. With three spaces:
    #
    #     GPT-2's pattern      "a   b"       ->  "a", "  ", " b"
    #     PATTERN              "a   b"       ->  "a", "   ", "b"      (wrong)
    #     PATTERN, with a cut  "a  " + " b"  ->  "a", "  ", " b"
    #
    # So a run of two or more whitespace characters is cut before its last one if a character that
    # is not whitespace follows. Whitespace at the end of a text needs no cut: \s+ takes all of it
    # in both patterns.
    before_cut = f"[{SPACE}]"
    after_cut = f"[{SPACE}][^{SPACE}]"
    cut_token = fast_encoding.max_token_value
    end_of_text = cut_token - 1

    # Rare: a document contains a placeholder itself. Split the texts, and encode piece by piece.
    if pc.any(pc.match_substring_regex(texts, f"[{BEGIN}{CUT}]")).as_py():
        cut_position = re.compile(f"(?<={before_cut})(?={after_cut})")
        tokens = []
        for text in texts.to_pylist():
            tokens.append(end_of_text)
            for piece in cut_position.split(text):
                tokens.extend(fast_encoding.encode_ordinary(piece))
        return np.array(tokens, np.uint32)

    # Otherwise encode all documents at once: BEGIN text BEGIN text ..., with CUT inside the texts.
    texts = pc.replace_substring_regex(texts, f"({before_cut})({after_cut})", f"\\1{CUT}\\2")
    joined = "".join(BEGIN + text for text in texts.to_pylist())
    tokens = fast_encoding.encode_to_numpy(joined, allowed_special={BEGIN, CUT})
    return tokens[tokens != cut_token]


@dataclass
class Batch:
    """The tokens of consecutive rows of a parquet file."""

    tokens: np.ndarray  # (number of tokens,) uint16
    rows: int
    text_bytes: int  # size of the texts in UTF-8
    empty: int  # rows without a text
    fraction: float = 0.0  # fraction of the file's rows up to the end of this batch


def tokenize(fast_encoding, texts):
    """Tokenize a pyarrow array of texts, leaving out null and empty ones. Returns a Batch."""
    rows = len(texts)
    # The column may be string, string_view or a dictionary. The cast is cheap for string columns.
    texts = texts.cast(pa.large_string())
    # The length of a null is null, and filter drops the rows whose condition is false or null.
    texts = texts.filter(pc.greater(pc.binary_length(texts), 0))
    return Batch(
        tokens=encode_documents(fast_encoding, texts).astype("<u2"),
        rows=rows,
        text_bytes=pc.sum(pc.binary_length(texts)).as_py() or 0,
        empty=rows - len(texts),
    )


def map_in_order(pool, function, items, max_pending):
    """Yield function(item) for each item, in order, computed in a pool of threads.

    The pool works on up to max_pending items after the one that is yielded.
    """
    # tiktoken and pyarrow release Python's global lock, so threads use all cores.
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > max_pending:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def read_texts(parquet, column, first_row):
    """Yield the text column of a parquet file, BATCH_SIZE rows at a time, starting with first_row.

    first_row must be the beginning of a batch. The batches before it are read but not tokenized,
    which is fast.
    """
    row = 0
    for batch in parquet.iter_batches(BATCH_SIZE, columns=[column]):
        if row >= first_row:
            yield batch.column(0)
        row += len(batch)


def tokenize_file(pool, fast_encoding, path, column, first_row, max_pending):
    """Tokenize a parquet file in the threads of a pool. Yields a Batch per BATCH_SIZE rows.

    first_row is 0 or the end of a Batch. Up to max_pending batches are computed in advance. Raises
    ValueError if the file cannot be used.
    """
    try:
        # Without buffer_size, pyarrow keeps whole row groups in memory.
        with pq.ParquetFile(path, buffer_size=2**20) as parquet:
            check_text_column(path, parquet.schema_arrow, column)
            row = first_row
            texts = read_texts(parquet, column, first_row)
            tokenize_texts = functools.partial(tokenize, fast_encoding)
            for batch in map_in_order(pool, tokenize_texts, texts, max_pending):
                row += batch.rows
                batch.fraction = row / parquet.metadata.num_rows
                yield batch
    except (OSError, UnicodeError, pa.ArrowException) as error:
        reason = str(error)[:300]
        raise ValueError(f"cannot read {path} ({reason}): replace or omit this file") from error


def check_text_column(path, schema, column):
    """Raise ValueError unless a parquet file has exactly one column of this name with text in it."""
    names = schema.names
    advice = f"choose --text_column from {', '.join(names)}"
    if column not in names:
        raise ValueError(f"{path} does not contain column {column}: {advice}")
    if names.count(column) > 1:
        raise ValueError(f"{path} contains {names.count(column)} columns called {column}: rename all but one")
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):  # each distinct text is stored once
        kind = kind.value_type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise ValueError(f"{path}: column {column} is {kind}, not text: {advice}")


# ----------------------------------------------------------------------------- parquet files
class HubFiles:
    """Parquet files of a data set on the Hugging Face Hub, downloaded in the background."""

    def __init__(self, repo_id, revision, files, folder, keep):
        self.repo_id = repo_id
        self.revision = revision  # commit of the data set
        self.files = files  # [[name, bytes], ...]
        self.folder = folder
        self.keep = keep  # keep the downloaded files
        self.downloads = {}  # index of a file: Future of its path
        self.deleted = 0  # the downloads of the first self.deleted files have been deleted
        # An interrupted run leaves partial downloads, but huggingface_hub starts new ones.
        for path in glob.glob(f"{glob.escape(folder)}/.cache/**/*.incomplete", recursive=True):
            os.remove(path)

    def get_path(self, index):
        """Wait for the download of a file, and return its path. Raises ValueError if it fails."""
        self.start_download(index)
        return self.downloads[index].result()

    def start_download(self, index):
        """Start the download of a file in a thread, unless it is started or there is no such file."""
        if index in self.downloads or index >= len(self.files):
            return
        future = Future()
        self.downloads[index] = future

        def work():
            try:
                future.set_result(self.download(*self.files[index]))
            except Exception as error:  # get_path raises it
                future.set_exception(error)

        # Python does not wait for daemon threads when it exits. It would wait for the threads of a
        # ThreadPoolExecutor: after an error elsewhere, a download that hangs would keep the process
        # alive.
        threading.Thread(target=work, daemon=True).start()

    def download(self, name, size):
        """Download a parquet file and return its path. Raises ValueError."""
        path = f"{self.folder}/{name}"
        if os.path.isfile(path) and os.path.getsize(path) == size:  # from an earlier run
            return path
        from huggingface_hub import hf_hub_download  # imported here because it is slow

        def fetch():
            hf_hub_download(
                repo_id=self.repo_id,
                filename=name,
                repo_type="dataset",
                revision=self.revision,
                local_dir=self.folder,
            )
            # A faulty proxy may deliver only a part of the file without an error.
            if os.path.getsize(path) != size:
                os.remove(path)
                raise OSError(f"incomplete download: expected {size} bytes")

        ask_hub(fetch, name, DOWNLOAD_ATTEMPTS)
        return path

    def delete_before(self, index):
        """Delete the downloads of all files before index, unless they are to be kept."""
        if self.keep:
            return
        for name, _ in self.files[self.deleted : index]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{self.folder}/{name}")
        self.deleted = index

    def delete_all(self):
        """Delete the folder of the downloads, unless they are to be kept."""
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)


def ask_hub(function, description, attempts):
    """Call function, which asks the Hub for something, and retry with growing pauses if it fails.

    description names what is asked for, for the error message. Raises ValueError if the last
    attempt fails, or if retrying is useless.
    """
    from huggingface_hub import constants  # imported here because it is slow

    for attempt in range(1, attempts + 1):
        try:
            return function()
        except Exception as error:  # errors of the Hub, of HTTP and of transfers share no base class
            reason = f"{type(error).__name__}: {error.__cause__ or error}"[:200]
            status = getattr(getattr(error, "response", None), "status_code", None)
            # Retrying is useless if the data do not exist, if access is denied, or if the name of
            # the data set is invalid, which huggingface_hub reports as a ValueError.
            final = status in (401, 403, 404) or isinstance(error, ValueError)
            if final or attempt == attempts:
                raise ValueError(
                    f"cannot get {description} from {constants.ENDPOINT} ({reason}): check --repo_id, "
                    "--remote_name and HF_TOKEN, or pass local parquet files with --source"
                ) from None
        time.sleep(2 ** (attempt - 1))


def list_hub_files(repo_id, remote_name):
    """Return the newest commit of a data set on the Hub, and [[name, bytes], ...] of its files.

    Raises ValueError if the Hub cannot be reached or the subset has no parquet files.
    """
    from huggingface_hub import HfApi  # imported here because it is slow

    api = HfApi()
    folder = SUBSETS.get(remote_name, remote_name) or None
    # few attempts: without a network, the user should see the error soon
    attempts = min(DOWNLOAD_ATTEMPTS, 3)
    commit = ask_hub(lambda: api.dataset_info(repo_id).sha, f"data set {repo_id}", attempts)

    def list_folder():
        entries = api.list_repo_tree(
            repo_id=repo_id,
            path_in_repo=folder,
            recursive=True,
            revision=commit,
            repo_type="dataset",
        )
        return list(entries)

    description = f"subset {remote_name} of data set {repo_id}"
    entries = ask_hub(list_folder, description, DOWNLOAD_ATTEMPTS)
    files = sorted([entry.path, entry.size] for entry in entries if entry.path.endswith(".parquet"))
    if not files:
        raise ValueError(f"subset {remote_name} of {repo_id} is empty: check --remote_name")
    return commit, files


def find_local_files(patterns):
    """Return the paths that --source matches. Raises ValueError if a pattern matches no files."""
    paths = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True))
        if os.path.isfile(pattern):  # a path, perhaps with characters that mean something in patterns
            matches = [pattern]
        # Named pipes and devices are not regular files: reading them could wait forever.
        matches = [path for path in matches if path.endswith(".parquet") and os.path.isfile(path)]
        if not matches:
            raise ValueError(f"--source {pattern} matches no parquet file: pass the paths of files")
        paths += matches
    return paths


def describe_local_file(path):
    """Return [name, bytes, SHA-256 of the footer] of a parquet file.

    In most cases, the checksum shows whether a file has been replaced by another one of the same
    name and size.
    """
    # A parquet file ends with its footer, the footer's length in 4 bytes, and "PAR1". The footer
    # contains the sizes and the smallest and largest values of all columns.
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 8, 0))
        footer_length = int.from_bytes(file.read(4), "little")
        file.seek(max(size - 8 - footer_length, 0))
        return [os.path.basename(path), size, hashlib.file_digest(file, "sha256").hexdigest()]


# -------------------------------------------------------------------------- shards and state
@dataclass
class State:
    """The progress of one rank, from which a later run continues. Stored as state_RANK.json."""

    settings: dict  # as in meta.json: tokenizer, vocab_size, eot_token, source
    rank: int
    done: bool = False  # all shards of this rank are finished
    file: int = 0  # index of the parquet file to continue with, among the files of this rank
    row: int = 0  # row of that file to continue with
    skip: int = 0  # tokens, counted from the beginning of that row, that finished shards contain
    # totals so far
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0  # size of the texts in UTF-8
    empty: int = 0  # rows whose text is null or empty
    shards: list = field(default_factory=list)  # [{"file", "split", "tokens", "sha256"}, ...]


def state_path(directory, rank):
    """Return the path of a rank's state file. train_gpt2.py refuses a directory that has one."""
    return f"{directory}/state_{rank:05d}.json"


def read_states(directory):
    """Return the states of all ranks in a directory. Raises ValueError if one is damaged."""
    states = []
    for path in sorted(glob.glob(f"{glob.escape(directory)}/state_*.json")):
        try:
            content = read_json(path)
            state = State(**{item.name: content.get(item.name) for item in fields(State)})
            check_state(state, path)
        except ValueError as error:
            advice = f"delete {directory}, or choose another --local_dir"
            raise ValueError(f"{error}: {advice}") from None
        states.append(state)
    return states


def check_state(state, path):
    """Raise ValueError if a State from a file is not what this script writes."""
    for item in fields(State):
        value = getattr(state, item.name)
        # The annotations of State are plain types, so a field's type can be compared with them.
        if type(value) is not item.type or (item.type is int and value < 0):
            raise ValueError(f"{path}: {item.name} is missing or has a wrong value")
    if os.path.basename(path) != os.path.basename(state_path("", state.rank)):
        raise ValueError(f"{path} belongs to rank {state.rank}")
    check_settings(state.settings, path)
    check_shards(state.shards, path)
    if state.tokens != sum(shard["tokens"] for shard in state.shards):
        raise ValueError(f"{path}: its shards do not have {state.tokens} tokens")


def check_settings(settings, path):
    """Raise ValueError if settings from a state or meta.json are not what this script writes."""
    tokenizer, vocab_size = settings.get("tokenizer"), settings.get("vocab_size")
    if not isinstance(tokenizer, str) or VOCAB_SIZES.get(tokenizer) != vocab_size:
        raise ValueError(f"{path}: tokenizer {tokenizer!r} with vocab_size {vocab_size!r} is not supported")
    source = settings.get("source")
    if not isinstance(source, dict) or not isinstance(source.get("files"), list):
        raise ValueError(f"{path}: source does not describe parquet files")
    world_size = source.get("world_size")
    if type(world_size) is not int or world_size < 1:
        raise ValueError(f"{path}: world_size is missing or has a wrong value")
    for file in source["files"]:
        if not isinstance(file, list) or len(file) < 2 or type(file[1]) is not int:
            raise ValueError(f"{path}: an entry of files does not describe a parquet file")
        # Downloads are written to folder/name and deleted later. A name such as "../x" or "/x", or
        # on Windows "..\x" or "C:x", would lead out of the folder. Local files are only read, so
        # their names may contain any character.
        name = file[0]
        is_download = source.get("repo_id") is not None
        leads_out = r"[\\:]|^/|(^|/)\.\.(/|$)|^$"
        if not isinstance(name, str) or (is_download and re.search(leads_out, name)):
            raise ValueError(f"{path}: an entry of files is not the name of a parquet file")


def write_json(path, content):
    """Write a JSON file atomically, and flush it to the disk."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


class ShardWriter:
    """Collects tokens in memory, and writes them to shards. After each shard it saves the state."""

    def __init__(self, directory, state, shard_size, limit):
        self.directory = directory
        self.state = state
        self.limit = limit  # maximum number of tokens of this rank, in all shards together
        self.saved_file = state.file  # index of the parquet file where a later run would continue
        self.buffer = np.empty(min(shard_size, limit), "<u2")  # the tokens of the current shard
        self.used = 0  # number of tokens in the buffer

    @property
    def full(self):
        """Whether --max_tokens or --max_shards is reached."""
        return self.state.tokens >= self.limit

    def add(self, batch):
        """Add the tokens of a Batch, write the shards that it fills, and advance the state."""
        state = self.state
        # skip counts the tokens of this batch that are already in the buffer or in a shard.
        # write_shard saves it, so a later run continues in the middle of a batch.
        while state.skip < len(batch.tokens) and not self.full:
            # copy as many tokens as the shard and the limit have room for
            room = min(len(self.buffer) - self.used, self.limit - state.tokens)
            tokens = batch.tokens[state.skip : state.skip + room]
            self.buffer[self.used : self.used + len(tokens)] = tokens
            self.used += len(tokens)
            state.skip += len(tokens)
            state.tokens += len(tokens)
            state.documents += int(np.count_nonzero(tokens == state.settings["eot_token"]))
            if self.used == len(self.buffer):
                self.write_shard()
        # continue with the next batch
        state.row += batch.rows
        state.skip = 0
        state.text_bytes += batch.text_bytes
        state.empty += batch.empty

    def next_file(self):
        """Advance the state to the beginning of the next parquet file."""
        self.state.file += 1
        self.state.row = 0

    def write_shard(self):
        """Write the collected tokens to a shard, and save the state."""
        state = self.state
        # Ranks take turns with the numbers, so that their shards can be put into one directory.
        # Shard 0 is for validation.
        number = len(state.shards) * state.settings["source"]["world_size"] + state.rank
        split = "train" if number else "val"
        name = f"edufineweb_{split}_{number:06d}.npy"  # build-nanogpt's names, also for other data sets
        path = f"{self.directory}/{name}"
        # Only a complete file gets the name of a shard.
        with open(f"{path}.tmp", "wb") as file:
            np.save(file, self.buffer[: self.used])
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
        # A run that is killed here has the old state, and writes this shard again.
        sha256 = sha256_of(path)
        state.shards.append({"file": name, "split": split, "tokens": self.used, "sha256": sha256})
        self.used = 0
        self.save_state()

    def save_state(self):
        """Write the state file.

        The buffer must be empty: all tokens that the state counts are on disk.
        """
        write_json(state_path(self.directory, self.state.rank), asdict(self.state))
        self.saved_file = self.state.file


# ------------------------------------------------------------------------- making a data set
def make_shards(args):
    """Make the shards of one rank, starting where the last run stopped. Raises ValueError."""
    directory = args.local_dir
    started = time.perf_counter()
    encoding = get_tokenizer(args.tokenizer)

    # find the input, and compare the settings with those that the directory was started with
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise ValueError(f"--local_dir {directory} is a file: choose another --local_dir")
    settings, paths = get_settings(args, encoding)
    if os.path.exists(f"{directory}/meta.json"):
        finish(directory)  # deletes the state files that remain if a run was killed after meta.json
        print(f"{directory} already contains these shards")
        return
    limit = get_token_limit(args)

    # Load the state under the lock. Another run may have written to the directory before.
    os.makedirs(directory, exist_ok=True)
    lock = lock_rank(directory, args.rank)
    if os.path.exists(f"{directory}/meta.json"):
        raise ValueError(f"another run has just finished {directory}: run the same command again")
    state = open_state(directory, args.rank, settings)

    # check that the disk has room for a shard, and allocate the memory in which it is collected
    check_free_space(directory, min(args.shard_size, limit))
    writer = ShardWriter(directory, state, args.shard_size, limit)
    writer.save_state()  # its file marks the directory as unfinished

    # share the files: rank r takes the files r, r + world_size, r + 2 * world_size, ...
    files = settings["source"]["files"]
    my_files = files[args.rank :: args.world_size]
    rank_label = f"rank {args.rank} of {args.world_size}"
    if args.world_size > 1:
        print(f"{rank_label}: this process tokenizes {len(my_files)} of {len(files)} parquet files")
    hub = None
    if paths:
        paths = paths[args.rank :: args.world_size]
    else:
        folder = f"{directory}/parquet_{args.rank:05d}"  # for the downloads of this rank
        hub = HubFiles(args.repo_id, settings["source"]["revision"], my_files, folder, args.keep_parquet)

    # make the shards, and put the directory in order
    sizes = [file[1] for file in my_files]
    tokenize_files(args, without_look_ahead(encoding), paths, hub, sizes, writer)
    state.done = True
    writer.save_state()
    if hub:
        hub.delete_all()
    lock.release()  # finish deletes the lock file, and Windows cannot delete a file that is open
    if args.world_size == 1:
        finish(directory)

    # print the summary last, because the output may have been closed
    seconds = time.perf_counter() - started
    skipped = f"{state.empty:,} empty ones skipped"
    print(f"{state.documents:,} documents ({skipped}), {state.text_bytes:,} bytes of text")
    print(f"{state.tokens:,} tokens in {len(state.shards)} shards, {seconds:.1f} seconds")
    if args.world_size > 1:
        print(f"{rank_label} is done: when all are, run fineweb.py --finish --local_dir {directory}")


def get_token_limit(args):
    """Return the maximum number of tokens of one rank.

    Raises ValueError if the limit leaves no tokens for training.
    """
    # 0 means no limit
    max_tokens = args.max_tokens or sys.maxsize
    max_shards = args.max_shards or sys.maxsize
    limit = min(max_tokens, max_shards * args.shard_size)
    if limit <= args.shard_size and args.world_size == 1:
        raise ValueError(
            f"--max_tokens or --max_shards allows {limit} tokens, which --shard_size {args.shard_size} puts "
            "into the validation shard, with none for training: use a smaller --shard_size or a higher limit"
        )
    return limit


def open_state(directory, rank, settings):
    """Return the saved state of a rank, or a new one.

    Raises ValueError if the directory was started with other settings, or a shard is damaged.
    """
    state = State(settings, rank)
    for saved in read_states(directory):
        check_same_settings(directory, saved.settings, settings)
        if saved.rank == rank:
            state = saved
    check_shard_files(directory, state.shards)
    return state


def tokenize_files(args, fast_encoding, paths, hub, sizes, writer):
    """Tokenize the parquet files of one rank, starting where the writer's state says.

    Either paths (of local files) or hub (a HubFiles) is given, and the other one is None. sizes are
    the sizes of the files in bytes, from which the progress bar on a terminal estimates the time
    left.
    """
    state = writer.state
    bar = tqdm(initial=state.tokens, unit="tok", unit_scale=True, disable=None)
    with bar, ThreadPoolExecutor(args.workers) as pool:
        for index in range(state.file, len(sizes)):
            if writer.full:
                break
            path = hub.get_path(index) if hub else paths[index]
            batches = tokenize_file(
                pool,
                fast_encoding,
                path,
                args.text_column,
                first_row=state.row,
                max_pending=4 * args.workers,
            )
            with contextlib.closing(batches):  # close the parquet file even if the loop ends early
                for batch in batches:
                    writer.add(batch)
                    # saved_file is the file in which a later run would continue. Once that is this
                    # file, the files before it are not needed any more: delete them, and download
                    # the next file in the background. So there are at most two downloads, unless
                    # the files are smaller than a shard: then they are kept until the shard that
                    # contains them is finished.
                    if hub and writer.saved_file == index:
                        hub.delete_before(index)
                        hub.start_download(index + 1)
                    # tqdm shows the time left, from an estimate of the number of tokens
                    fraction = (sum(sizes[:index]) + sizes[index] * batch.fraction) / sum(sizes)
                    bar.total = int(min(writer.limit, state.tokens / fraction))
                    bar.update(state.tokens - bar.n)
                    if writer.full:
                        break
            if not writer.full:  # this file is finished
                writer.next_file()
        if writer.used:
            writer.write_shard()  # the last shard is shorter than the others


def get_settings(args, encoding):
    """Return the settings for meta.json, and the paths of local parquet files or None.

    Raises ValueError if the directory was started with other settings, or contains other files.
    """
    # read the settings that the directory was started with
    directory = args.local_dir
    saved_settings = []
    if os.path.exists(f"{directory}/meta.json"):
        meta = read_meta(directory)
        check_settings(meta, f"{directory}/meta.json")
        saved_settings.append(meta)
    saved_settings += [state.settings for state in read_states(directory)]
    if not saved_settings and os.path.isdir(directory):
        # Refuse a directory with other files: they may be shards, which train_gpt2.py would read
        # together with the new ones. Lock files and temporary state files may remain from a run
        # that was interrupted before it saved its first state.
        ours = re.compile(r"state_\d+\.(lock|json\.tmp)")
        others = [name for name in os.listdir(directory) if not ours.fullmatch(name)]
        if others:
            advice = "choose another --local_dir"
            raise ValueError(f"{directory} contains other files ({others[0]}): {advice}")

    # list the parquet files
    paths = None
    if args.source:
        revision = None
        paths = find_local_files(args.source)
        files = [describe_local_file(path) for path in paths]
    elif saved_settings:
        # The data set may have changed on the Hub, but a directory keeps to one commit.
        revision = saved_settings[0]["source"].get("revision")
        files = saved_settings[0]["source"]["files"]
    else:
        revision, files = list_hub_files(args.repo_id, args.remote_name)

    # refuse settings that differ from the saved ones
    settings = {
        "tokenizer": args.tokenizer,
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
        "source": {
            "repo_id": None if args.source else args.repo_id,
            "remote_name": None if args.source else args.remote_name,
            "text_column": args.text_column,
            "shard_size": args.shard_size,
            "max_tokens": args.max_tokens,
            "max_shards": args.max_shards,
            "world_size": args.world_size,
            "revision": revision,
            "files": files,
        },
    }
    for saved in saved_settings:
        check_same_settings(directory, saved, settings)
    return settings, paths


def check_same_settings(directory, saved, settings):
    """Raise ValueError if settings differ from those that a directory was started with."""
    started = f"{directory} was started with"
    advice = "use the original settings, or another --local_dir"
    old_values = {**saved, **saved["source"]}
    new_values = {**settings, **settings["source"]}
    for name, new in new_values.items():
        old = old_values.get(name)
        if old != new and name not in ("source", "files"):
            raise ValueError(f"{started} {name} {str(old)[:100]}, not {str(new)[:100]}: {advice}")
    # the list of files can be long, so show only what differs
    old_files, new_files = saved["source"]["files"], settings["source"]["files"]
    if len(old_files) != len(new_files):
        numbers = f"{len(old_files)} parquet files, not {len(new_files)}"
        raise ValueError(f"{started} {numbers}: {advice}")
    for old, new in zip(old_files, new_files, strict=True):
        if old[:2] != new[:2]:
            both = f"{old[0]} ({old[1]} bytes), not {new[0]} ({new[1]} bytes)"
            raise ValueError(f"{started} {both}: {advice}")
        if old != new:  # the checksums of the footers
            raise ValueError(f"{started} another {new[0]} of {new[1]} bytes: {advice}")


def lock_rank(directory, rank):
    """Lock the work of a rank, and return the lock. Raises ValueError if another process has it.

    The operating system releases the lock when the process ends, even if it is killed. If the file
    system does not support locks, prints a warning and returns a lock that is not held.
    """
    lock = filelock.FileLock(f"{directory}/state_{rank:05d}.lock", fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ValueError(
            f"another run of rank {rank} is writing to {directory}: wait for it, or choose another --local_dir"
        ) from None
    except (NotImplementedError, OSError) as error:
        # Continue without a lock if the file system does not support locks. Raise any other error,
        # for example a full disk.
        code = getattr(error, "errno", errno.ENOSYS)  # NotImplementedError has no errno
        if code not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        print(f"warning: {directory} cannot be locked: start only one run in it", file=sys.stderr)
    return lock


def check_shard_files(directory, shards):
    """Raise ValueError if the file of a finished shard is missing or has another length."""
    for shard in shards:
        path = f"{directory}/{shard['file']}"
        try:
            complete = len(load_shard(path)) == shard["tokens"]
        except ValueError:
            complete = False
        if not complete:
            raise ValueError(
                f"{path} is missing or damaged: restore it from a copy, or delete {directory} and start again"
            )


def check_free_space(directory, shard_tokens):
    """Raise ValueError if the disk has no room for one shard."""
    needed = 2 * shard_tokens
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ValueError(
            f"a shard needs {needed} bytes but {directory} has only {free} free: use a smaller "
            "--shard_size, or free some space"
        )


# -------------------------------------------------------------------------------- finishing
def finish(directory):
    """Write meta.json for the shards of all ranks, and delete their state files.

    Raises ValueError if ranks or training shards are missing, or the vocabulary cannot be loaded.
    """
    if not os.path.exists(f"{directory}/meta.json"):
        # check that all ranks are done
        states = read_states(directory)
        if not states:
            raise ValueError(f"{directory} does not contain a started data set: check --local_dir")
        settings = states[0].settings
        world_size = settings["source"]["world_size"]
        done = [state for state in states if state.done and state.settings == settings]
        if len(done) != world_size:
            raise ValueError(
                f"{directory}: only {len(done)} of {world_size} ranks have finished with these "
                "settings: run the others first"
            )
        # collect their shards, in the order of the numbers in their names
        shards = []
        for state in done:
            check_shard_files(directory, state.shards)
            shards += state.shards
        shards.sort(key=lambda shard: int(re.search(r"\d+", shard["file"])[0]))
        check_splits(directory, shards)
        # meta.json comes last: it says that everything else is there
        get_tokenizer(settings["tokenizer"])  # downloads GPT-2's vocabulary if it is not here
        write_tokenizer_files(settings["tokenizer"], directory)
        write_json(f"{directory}/meta.json", {**settings, "shards": shards})
    for path in glob.glob(f"{glob.escape(directory)}/state_*"):  # states and locks
        os.remove(path)


def check_splits(directory, shards):
    """Raise ValueError unless there are shards for validation and for training."""
    num_tokens = sum(shard["tokens"] for shard in shards)
    if num_tokens == 0:
        raise ValueError(
            f"{directory} contains no tokens, because the parquet files contain no text: "
            "delete it, and check --source and --text_column"
        )
    splits = {shard["split"] for shard in shards}
    if "train" not in splits:
        raise ValueError(
            f"{directory} has only {num_tokens} tokens, which are all in the validation shard, and none for "
            f"training: delete it, and run the command again with --shard_size {max(1, num_tokens // 10)}"
        )
    if "val" not in splits:  # rank 0 makes the validation shard
        raise ValueError(
            f"{directory} contains no validation shard, because the files of rank 0 contain no text: "
            "delete it, and use a smaller --world_size"
        )


# -------------------------------------------------------------------------------- verifying
@dataclass
class Summary:
    """Counts of one split, and the beginning of its text."""

    shards: int = 0
    tokens: int = 0
    documents: int = 0
    beginning: str = ""


def verify(directory):
    """Check the shards of a directory, compare them with meta.json, and print a summary.

    Raises ValueError if there are problems.
    """
    if not os.path.isdir(directory):
        raise ValueError(f"--verify {directory} is not a directory: pass a directory of shards")
    names = [name for name in os.listdir(directory) if re.fullmatch(r"[^.].*\.(npy|bin)", name)]
    if not names:
        raise ValueError(f"{directory} contains no .npy or .bin files: pass a directory of shards")

    tokenizer, expected = expected_shards(directory)
    encoding = get_tokenizer(tokenizer)

    # check each shard, and count its tokens and documents
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(names))]
    summaries = {}  # split: Summary
    for name in tqdm(sorted(names), desc="verifying", unit="shard", disable=None, leave=False):
        path = f"{directory}/{name}"
        try:
            tokens = load_shard(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        largest = int(tokens.max(initial=0))
        if largest >= encoding.n_vocab:
            problems.append(f"{name} contains token {largest}, but {tokenizer} has {encoding.n_vocab}")
        if expected and name not in expected:
            problems.append(f"{name} is not part of the data set")
        elif expected:
            problems += compare_shard(path, tokens, expected[name])
        # The number is optional: llm.c has tiny_shakespeare_val.bin.
        split = "val" if re.search(r"_val(_\d+)?\.", name) else "train"
        summary = summaries.setdefault(split, Summary())
        summary.shards += 1
        summary.tokens += len(tokens)
        summary.documents += np.count_nonzero(tokens == encoding.eot_token)
        if summary.shards == 1:
            first_tokens = [token for token in tokens[:50].tolist() if token < encoding.n_vocab]
            summary.beginning = encoding.decode(first_tokens)

    # report
    for split, summary in summaries.items():
        print(f"{split}: {summary.shards:,} shards, {summary.tokens:,} tokens, ", end="")
        print(f"{summary.documents:,} documents")
        print(f"  begins with {summary.beginning!r}")
    if problems:
        first = "; ".join(problems[:5])
        raise ValueError(f"{len(problems)} problems in {directory}: {first}")
    print("no problems found")


def expected_shards(directory):
    """Return the tokenizer of a directory, and {file name: entry of meta.json or of a state file}.

    Also prints what the shards are compared with. The dict is empty if the directory has neither
    meta.json nor a finished shard in a state file, like a directory of build-nanogpt's shards.
    """
    tokenizer = "gpt2"
    shards = []
    states = read_states(directory)
    if os.path.exists(f"{directory}/meta.json"):
        meta = read_meta(directory)
        tokenizer = meta["tokenizer"]
        shards = meta["shards"]
        print(f"{directory}: {tokenizer} tokens; the shards are compared with meta.json")
    elif states:
        tokenizer = states[0].settings["tokenizer"]
        for state in states:
            shards += state.shards
        print(f"{directory}: {tokenizer} tokens, unfinished; the shards are compared with the state")
    else:
        print(f"{directory}: {tokenizer} tokens, assumed because meta.json is missing; no checksums")
    return tokenizer, {shard["file"]: shard for shard in shards}


def compare_shard(path, tokens, expected):
    """Return a list of what differs between a shard and its entry in meta.json."""
    name = os.path.basename(path)
    if len(tokens) != expected["tokens"]:
        return [f"{name} has {len(tokens)} tokens instead of {expected['tokens']}"]
    if expected.get("sha256") and sha256_of(path) != expected["sha256"]:
        return [f"{name} does not match its checksum"]
    return []


# ------------------------------------------------------------------------- shared functions
# --- copied block: write_tokenizer_files ---
GPT2_FILES = {  # Hugging Face's file name: (OpenAI's file name, SHA-256)
    "vocab.json": ("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "merges.txt": ("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"


def write_tokenizer_files(name, directory):
    """Write the tokenizer files of transformers, vocab.json and merges.txt, into directory.

    For "gpt2" they are OpenAI's files. tiktoken has them in its cache once get_tokenizer("gpt2")
    has been called.
    """
    if name == "gpt2":
        for file_name, (original_name, sha256) in GPT2_FILES.items():
            content = tiktoken.load.read_file_cached(f"{GPT2_URL}/{original_name}", sha256)
            with open(f"{directory}/{file_name}", "wb") as file:
                file.write(content)
        return
    # vocab.json maps characters to ids. GPT-2 represents each byte by one character: the printable
    # bytes of Latin-1 by themselves, the others by the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(others):
        vocab[chr(256 + i)] = byte
    vocab["<|endoftext|>"] = 256
    with open(f"{directory}/vocab.json", "w", encoding="utf-8") as file:
        json.dump(vocab, file)
    with open(f"{directory}/merges.txt", "w", encoding="utf-8") as file:
        file.write("#version: 0.2\n")  # no merges


# --- end of copied block: write_tokenizer_files ---


# --- copied block: sha256_of ---
def sha256_of(path):
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- end of copied block: sha256_of ---


# --- copied block: read_json ---
def read_json(path):
    """Return the JSON object in a file as a dict.

    Raises ValueError if the content is not a JSON object, OSError if the file cannot be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file")  # opening a named pipe would wait forever
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return content


# --- end of copied block: read_json ---


# --- copied block: read_meta ---
VOCAB_SIZES = {"gpt2": 50257, "bytes": 257}


def check_shards(shards, path):
    """Raise ValueError unless shards is a list that describes shards, as meta.json has it."""
    if not isinstance(shards, list):
        raise ValueError(f"{path}: shards is not a list")
    for shard in shards:
        if not isinstance(shard, dict):
            raise ValueError(f"{path}: {shard!r} does not describe a shard")
        name, tokens, sha256 = shard.get("file"), shard.get("tokens"), shard.get("sha256")
        # A plain name cannot point to a file outside the directory.
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.(npy|bin)", name):
            raise ValueError(f"{path}: {name!r} is not the name of a shard")
        if type(tokens) is not int or not 0 <= tokens < 2**62:
            raise ValueError(f"{path}: {name} has {tokens!r} tokens")
        if sha256 and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
            raise ValueError(f"{path}: {sha256!r} is not a SHA-256")


def read_meta(directory):
    """Return the checked content of a data set's meta.json.

    Raises ValueError if the content is wrong, OSError if the file cannot be read.
    """
    path = f"{directory}/meta.json"
    meta = read_json(path)
    tokenizer, vocab_size = meta.get("tokenizer"), meta.get("vocab_size")
    if not isinstance(tokenizer, str) or VOCAB_SIZES.get(tokenizer) != vocab_size:
        raise ValueError(f"{path}: tokenizer {tokenizer!r} with vocab_size {vocab_size!r} is not supported")
    check_shards(meta.get("shards"), path)
    return meta


# --- end of copied block: read_meta ---


# --- copied block: load_shard ---
def load_shard(path):
    """Memory-map a token shard, a .npy file or a .bin file in llm.c's format.

    Returns a uint16 array (N,). Raises ValueError if the file is not a shard, or is shorter or
    longer than its header says.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file")  # opening a named pipe would wait forever
    try:
        if path.endswith(".npy"):
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            offset = getattr(tokens, "offset", 0)
        else:  # 256 int32 (magic number, version, number of tokens, zeros), then the tokens
            offset = 1024
            magic, version, num_tokens = np.fromfile(path, dtype="<i4", count=3).tolist()
            if (magic, version) != (20240520, 1):
                raise ValueError("its first numbers are not 20240520 and 1")
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(num_tokens,))
    except Exception as error:  # damaged headers raise many types of errors
        raise ValueError(f"{path} is not a token shard ({error}): regenerate it") from None
    if not isinstance(tokens, np.ndarray) or tokens.dtype != np.dtype("<u2") or tokens.ndim != 1:
        raise ValueError(f"{path} is not a token shard (a one-dimensional uint16 array): regenerate it")
    if os.path.getsize(path) != offset + tokens.nbytes:
        raise ValueError(f"{path} is longer than its header says: regenerate it")
    return tokens


# --- end of copied block: load_shard ---


# ----------------------------------------------------------------------------- command line
# --- copied block: fail ---
def fail(message):
    """Report a user error in one line on stderr and exit with status 2."""
    one_line = " ".join(str(message).split())  # some messages have several lines
    print(f"error: {one_line}", file=sys.stderr)
    sys.exit(2)


# --- end of copied block: fail ---


# --- copied block: run_script ---
def run_script(main):
    """Call main() with output that suits terminals, pipes and files.

    Each line appears at once, and "?" replaces characters that the terminal cannot encode. If the
    program that reads the output has ended, as in "| head", the script ends silently. Any other
    OSError, for example a full disk, is reported in one line.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script without a traceback
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, as in ">&-"
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (stays open)
        elif hasattr(stream, "reconfigure"):  # Jupyter's streams have no such method
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(0)  # a normal exit would write to the closed pipe again
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(1)  # a normal exit would try to flush stdout again


# --- end of copied block: run_script ---


def default_ranks():
    """Return the defaults of --rank and --world_size: $RANK and $WORLD_SIZE, or Slurm's values.

    Both are strings. argparse converts a default that is a string like the value of a flag.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    rank, world_size = "0", "1"
    # srun starts SLURM_NTASKS processes, and SLURM_PROCID is the number of this process. A batch
    # script has these variables too, although it is run by one process only.
    if step.isdecimal() and int(step) < FIRST_SPECIAL_STEP:
        rank = os.environ.get("SLURM_PROCID", rank)
        world_size = os.environ.get("SLURM_NTASKS", world_size)
    return os.environ.get("RANK", rank), os.environ.get("WORLD_SIZE", world_size)


def parse_args():
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}: see --help")  # argparse's own errors in one line

    group = parser.add_argument_group("data")
    group.add_argument(
        "--source",
        nargs="+",
        metavar="FILE",
        help="read local parquet files instead of the Hub; quoted patterns such as 'books/*.parquet' also work",
    )
    group.add_argument(
        "--repo_id",
        default="HuggingFaceFW/fineweb-edu",
        help="data set on the Hugging Face Hub (default: HuggingFaceFW/fineweb-edu)",
    )
    group.add_argument(
        "--remote_name",
        default="sample-10BT",
        help=f"subset: {', '.join(SUBSETS)}, or a folder in the repository, or '' for everything "
        "(default: sample-10BT)",
    )
    group.add_argument("--text_column", default="text", help="column that contains the documents (default: text)")
    group.add_argument(
        "--keep_parquet",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep the downloaded parquet files (default: delete each once it is tokenized)",
    )

    group = parser.add_argument_group("shards")
    group.add_argument("--local_dir", default="edu_fineweb10B", help="output directory (default: edu_fineweb10B)")
    group.add_argument(
        "--tokenizer",
        choices=["bytes", "gpt2"],
        default="gpt2",
        help="gpt2 (50,257 tokens, the default) or bytes (one token per byte)",
    )
    group.add_argument(
        "--shard_size",
        type=int,
        default=100_000_000,
        help="tokens per shard; the first shard is the validation split (default: 100000000)",
    )
    group.add_argument(
        "--max_tokens",
        type=int,
        default=0,
        help="stop after this many tokens per rank, with those of the validation shard (default: 0, no limit)",
    )
    group.add_argument(
        "--max_shards", type=int, default=0, help="stop after this many shards per rank (default: 0, no limit)"
    )

    group = parser.add_argument_group("system")
    group.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="threads that tokenize (default: one per CPU core)"
    )
    rank, world_size = default_ranks()
    group.add_argument(
        "--rank", type=int, default=rank, help="number of this machine, from 0 (default: $RANK, srun's number, or 0)"
    )
    group.add_argument(
        "--world_size",
        type=int,
        default=world_size,
        help="number of machines that share the work (default: $WORLD_SIZE, srun's number of tasks, or 1)",
    )

    group = parser.add_argument_group("other actions")
    group.add_argument("--finish", action="store_true", help="write meta.json in --local_dir when all ranks are done")
    group.add_argument("--verify", metavar="DIR", help="only verify and summarize the shards of a directory")

    args = parser.parse_args()
    minimums = {"shard_size": 1, "max_tokens": 0, "max_shards": 0, "workers": 1, "rank": 0}
    for name, minimum in minimums.items():
        value = getattr(args, name)
        if value < minimum:
            fail(f"--{name} is {value}: it must be at least {minimum}")
    if args.rank >= args.world_size:
        fail(f"--rank {args.rank} must be less than --world_size {args.world_size}")
    return args


def main():
    args = parse_args()
    # Silence huggingface_hub, because this script shows progress and reports errors itself. It
    # reads these variables when it is imported, which the functions above do later.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_VERBOSITY"] = "critical"
    try:
        if args.verify is not None:
            verify(args.verify)
        elif args.finish:
            finish(args.local_dir)
            print(f"{args.local_dir} is finished")
        else:
            make_shards(args)
    except ValueError as error:  # all functions above raise it for the user's errors
        fail(error)
    except MemoryError:
        fail("out of memory: use a smaller --shard_size or fewer --workers, and run the command again")
    except BrokenPipeError:
        raise  # run_script ends the script silently
    except OSError as error:
        advice = "free some space if the disk is full, and run the same command again (finished shards are kept)"
        fail(f"{error}: {advice}")


if __name__ == "__main__":
    run_script(main)
