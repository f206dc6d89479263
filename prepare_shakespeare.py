"""
Turn a UTF-8 text into the token shards that train_gpt2.py reads.

    python prepare_shakespeare.py                            # input.txt, one token per byte
    python prepare_shakespeare.py --tokenizer gpt2 --out_dir plays_gpt2    # GPT-2's 50,257 tokens
    python prepare_shakespeare.py --download --out_dir tiny  # the real Tiny Shakespeare
    python prepare_shakespeare.py --input book.txt --out_dir book

Takes a second for a megabyte, and about five times the size of the text in memory. Writes five
files to OUT_DIR. NAME is the last part of OUT_DIR.

    NAME_train_000000.npy   the first 90% of the text, a one-dimensional uint16 array of tokens
    NAME_val_000000.npy     the last 10%, for validation
    meta.json               describes the data set: tokenizer, source, sizes, checksums
    vocab.json, merges.txt  the tokenizer in Hugging Face's format, for checkpoints

With the default tokenizer, input.txt gives 432,828 training tokens and 48,093 validation tokens.
Each of the two parts is one document, which begins with the end-of-text token. A literal
<|endoftext|> in the text is tokenized like any other text: it does not become that token.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from contextlib import contextmanager

import numpy as np
import requests
import tiktoken

# The 40,000 lines of Shakespeare on which char-rnn and nanoGPT train character-level models.
TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_PATH = "data/tinyshakespeare/input.txt"


# -------------------------------------------------------------------------------------- the text
def download_tiny_shakespeare():
    """Download Tiny Shakespeare, unless it is already there. Returns the path of the file."""
    path = TINY_SHAKESPEARE_PATH
    # a file that is damaged, for example by an interrupted copy, is replaced
    if os.path.exists(path) and sha256_of(path) == TINY_SHAKESPEARE_SHA256:
        return path
    advice = f"download it by hand to {path}, or pass another text with --input"
    with explain(f"cannot download {TINY_SHAKESPEARE_URL}", advice):
        response = requests.get(TINY_SHAKESPEARE_URL, timeout=30)
        response.raise_for_status()
        # a proxy may return a page of its own instead of the file
        if hashlib.sha256(response.content).hexdigest() != TINY_SHAKESPEARE_SHA256:
            raise ValueError("it does not match its checksum")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with atomic_write(path) as file:
            file.write(response.content)
    return path


def read_text(path):
    """Return the text of a UTF-8 file with its line endings unchanged."""
    # as a text, JSON lines would be tokenized with their braces and escapes
    if path.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        fail(f"{path} contains many documents: use python fineweb.py --source {path}")
    with explain(f"cannot read {path} as UTF-8 text", "pass another file with --input"):
        with open(path, encoding="utf-8-sig", newline="") as file:  # drops a byte order mark
            text = file.read()
        if not text:
            raise ValueError("it is empty")
    return text


# -------------------------------------------------------------------------------------- data set
def tokenize(tokenizer, text):
    """Return the tokens of a document, uint16 (N,), beginning with the end-of-text token."""
    # a list of Python integers would need many times the memory of these arrays
    if tokenizer.name == "bytes":
        tokens = np.frombuffer(text.encode(), np.uint8)
    else:
        # no special tokens are allowed: <|endoftext|> in the text is text like any other
        tokens = tokenizer.encode_to_numpy(text, disallowed_special=())
    # NumPy narrows integers only with casting="unsafe"; every token id fits into uint16
    return np.concatenate(([tokenizer.eot_token], tokens), dtype="<u2", casting="unsafe")


def write_data_set(out_dir, parts, tokenizer_name, source):
    """Write a data set with one shard per split: parts is {"train": text, "val": text}.

    Returns the content of meta.json.
    """
    advice = "use --tokenizer bytes, connect to the network once, or set TIKTOKEN_CACHE_DIR"
    with explain("cannot load GPT-2's vocabulary", advice):
        tokenizer = get_tokenizer(tokenizer_name)
    # train_gpt2.py reads the values of the tokenizer and the list of shards
    meta = {
        "tokenizer": tokenizer_name,
        "vocab_size": tokenizer.n_vocab,
        "eot_token": tokenizer.eot_token,
        "source": source,
        "shards": [],
    }
    out_dir = os.path.abspath(out_dir)
    # the name of a shard consists of letters, digits and the characters _ . -
    name = re.sub(r"[^\w.-]|^[.-]", "_", os.path.basename(out_dir))
    # Write everything to a directory inside a temporary one, and rename it at the end: the data set
    # is complete or absent. The temporary directory is next to out_dir, because a directory cannot
    # be renamed to another file system.
    parent_dir = os.path.dirname(out_dir)
    os.makedirs(parent_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}.", suffix=".tmp", dir=parent_dir) as temporary_dir:
        new_dir = f"{temporary_dir}/{name}"
        os.mkdir(new_dir)
        # write the shards, then the tokenizer, then meta.json
        for split, text in parts.items():
            tokens = tokenize(tokenizer, text)
            file_name = f"{name}_{split}_000000.npy"
            path = f"{new_dir}/{file_name}"
            with atomic_write(path) as file:
                np.save(file, tokens)
            shard = {"file": file_name, "split": split, "tokens": len(tokens), "sha256": sha256_of(path)}
            meta["shards"].append(shard)
        write_tokenizer_files(tokenizer_name, new_dir)
        write_json(f"{new_dir}/meta.json", meta)
        if os.path.isdir(out_dir):
            os.rmdir(out_dir)  # it is empty; Windows does not rename to a directory that exists
        os.rename(new_dir, out_dir)
    return meta


def is_written(out_dir, tokenizer_name, source):
    """Return whether out_dir contains this data set. Exits with an error if it has other files."""
    if not os.path.isdir(out_dir) or not os.listdir(out_dir):
        return False
    # The directory got its name when it was complete, so meta.json tells which data set it is.
    with explain(f"--out_dir {out_dir} contains other files", "choose another --out_dir, or delete it"):
        with open(f"{out_dir}/meta.json", encoding="utf-8") as file:
            meta = json.load(file)
        if (meta["tokenizer"], meta["source"]) != (tokenizer_name, source):
            raise ValueError("a data set with another text, --tokenizer or --val_fraction")
    return True


# ------------------------------------------------------------------------------ shared functions
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
# ---------------------------------------------------------------------------------- command line
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
    """Parse and check the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}: see --help")
    add = parser.add_argument
    add("--input", default="input.txt", help="UTF-8 text file (default: %(default)s)")
    add("--download", action="store_true", help="download Tiny Shakespeare (1.1 MB), and use it instead of --input")
    add("--out_dir", default="shakespeare", help="output directory (default: %(default)s)")
    add("--tokenizer", choices=["bytes", "gpt2"], default="bytes", help="default: bytes, one token per byte")
    add("--val_fraction", type=float, default=0.1, help="fraction for validation (default: %(default)s)")
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        fail(f"--val_fraction {args.val_fraction} is not between 0 and 1: use for example 0.1")
    return args


def main():
    args = parse_args()
    # read the text, and download it first if asked to
    path = download_tiny_shakespeare() if args.download else args.input
    text = read_text(path)

    # split the text: the first part is for training, the rest for validation
    n = int((1 - args.val_fraction) * len(text))
    if not 0 < n < len(text):
        fail(f"{path} is too short to split it with --val_fraction {args.val_fraction}: use a longer text")
    parts = {"train": text[:n], "val": text[n:]}

    # do nothing if an earlier run wrote this data set: it has the same source in its meta.json
    source = {
        "input": os.path.basename(path),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "val_fraction": args.val_fraction,
    }
    del text  # the parts are copies, and a long text should not be in memory twice
    if is_written(args.out_dir, args.tokenizer, source):
        print(f"{args.out_dir} already contains this data set")
        return
    with explain(f"cannot write --out_dir {args.out_dir}", "choose another --out_dir"):
        meta = write_data_set(args.out_dir, parts, args.tokenizer, source)
    for shard in meta["shards"]:
        print(f"{args.out_dir}/{shard['file']}: {shard['tokens']:,} tokens")


if __name__ == "__main__":
    main()
