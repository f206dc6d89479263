"""
Turn any UTF-8 text into the token shards that train_gpt2.py reads.

    python prepare_shakespeare.py                              # input.txt, one token a byte, no network
    python prepare_shakespeare.py --tokenizer gpt2             # GPT-2's 50,257 tokens (fetched once)
    python prepare_shakespeare.py --download --out_dir tiny    # the real Tiny Shakespeare
    python prepare_shakespeare.py --input book.txt --out_dir book

Writes, in a second, OUT_DIR/NAME_train_000000.npy, OUT_DIR/NAME_val_000000.npy (one-dimensional
uint16 arrays, NAME is OUT_DIR's last part) and OUT_DIR/meta.json, which describes them. The last
tenth of the text is for validation. For input.txt: 432,828 training and 48,093 validation tokens.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile

import numpy as np
import requests
import tiktoken

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_PATH = "data/tinyshakespeare/input.txt"


def download(url, path, sha256):
    """Fetch url to path. The file appears there whole and with the right SHA-256, or not at all (OSError)."""
    try:
        response = requests.get(url, timeout=30)
        response.raise_for_status()
    except requests.RequestException as error:
        fail(f"cannot fetch {url} ({type(error).__name__}): get it elsewhere and name it with --input")
    found = hashlib.sha256(response.content).hexdigest()
    if found != sha256:
        fail(f"{url} came with SHA-256 {found} instead of {sha256}: get it elsewhere and name it with --input")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.tmp", "wb") as file:
        file.write(response.content)
    os.replace(f"{path}.tmp", path)


# --- copied block: text ---
def fail(message):
    """Report a user's mistake in one line on stderr and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_text(path):
    """The text of a UTF-8 file, its line ends as they are; exits if there is none."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read() or fail(f"{path!r} is empty: name another text with --input")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path!r} as UTF-8 text ({error}): name another with --input")


# --- end of copied block: text ---
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
# --- copied block: sha256_of ---
def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- end of copied block: sha256_of ---
def write_shards(out_dir, parts, tokenizer, source):
    """Write a data set: one shard for each split of parts {"train": text, "val": text}, then meta.json.

    All of it is made in a temporary directory that is renamed when it is complete, so that out_dir
    either holds the whole data set or does not exist. Returns meta.json's content.
    """
    try:
        enc = get_tokenizer(tokenizer)
    except requests.RequestException as error:
        fail(
            f"cannot fetch the GPT-2 vocabulary ({type(error).__name__}): use --tokenizer bytes, "
            "or point TIKTOKEN_CACHE_DIR at a folder that holds it"
        )
    name = os.path.basename(os.path.abspath(out_dir))
    meta = {"tokenizer": tokenizer, "vocab_size": enc.n_vocab, "eot_token": enc.eot_token, "source": source}
    meta["shards"] = []
    parent = os.path.dirname(os.path.abspath(out_dir))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}.", suffix=".tmp", dir=parent) as workplace:
        temporary = f"{workplace}/{name}"
        os.mkdir(temporary)
        for split, text in parts.items():
            tokens = np.array([enc.eot_token, *enc.encode_ordinary(text)], dtype="<u2")  # (N,)
            file = f"{name}_{split}_000000.npy"
            np.save(f"{temporary}/{file}", tokens)
            digest = sha256_of(f"{temporary}/{file}")
            meta["shards"].append({"file": file, "split": split, "tokens": len(tokens), "sha256": digest})
        with open(f"{temporary}/meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
        os.replace(temporary, out_dir)
    return meta


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")  # argparse's own errors in one line, too
    add = parser.add_argument
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--input", default="input.txt", help="UTF-8 text (input.txt)")
    text.add_argument(
        "--download", action="store_true", help=f"fetch Tiny Shakespeare (1.1 MB) to {TINY_SHAKESPEARE_PATH}, use that"
    )
    add("--out_dir", default="shakespeare", help="directory to make (shakespeare)")
    add("--tokenizer", choices=["bytes", "gpt2"], default="bytes", help="one token a byte, or GPT-2's (bytes)")
    add("--val_fraction", type=float, default=0.1, help="share of the text kept for validation, 0 to 1 (0.1)")
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        fail(f"--val_fraction is {args.val_fraction}: it must be between 0 and 1")
    if args.download:
        args.input = TINY_SHAKESPEARE_PATH
        try:
            if not os.path.exists(args.input) or sha256_of(args.input) != TINY_SHAKESPEARE_SHA256:
                download(TINY_SHAKESPEARE_URL, args.input, TINY_SHAKESPEARE_SHA256)
        except OSError as error:
            fail(f"cannot write {args.input} ({error.strerror}): make room for a file there")
    text = read_text(args.input)
    n = int((1 - args.val_fraction) * len(text))
    if not 0 < n < len(text):
        fail(f"{args.input} has {len(text)} characters: too few to split with --val_fraction {args.val_fraction}")

    digest = hashlib.sha256(text.encode()).hexdigest()
    source = {"input": os.path.basename(args.input), "sha256": digest, "val_fraction": args.val_fraction}
    if os.path.isdir(args.out_dir) and os.listdir(args.out_dir):
        try:
            with open(f"{args.out_dir}/meta.json", encoding="utf-8") as file:
                found = json.load(file)
            same = (found["tokenizer"], found["source"]) == (args.tokenizer, source)
            wanted = {f"{args.out_dir}/{shard['file']}": shard["sha256"] for shard in found["shards"]}
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            fail(f"--out_dir {args.out_dir} holds something else: delete it, or name another directory")
        if all(os.path.isfile(path) and sha256_of(path) == sha256 for path, sha256 in wanted.items()):
            print(f"{args.out_dir} already holds these shards")
            return
        for path in (*wanted, f"{args.out_dir}/meta.json"):  # damaged: make them again
            if os.path.isfile(path):
                os.remove(path)
    try:
        meta = write_shards(args.out_dir, {"train": text[:n], "val": text[n:]}, args.tokenizer, source)
    except OSError as error:
        fail(f"cannot write --out_dir {args.out_dir} ({error}): name another directory")
    for shard in meta["shards"]:
        print(f"{args.out_dir}/{shard['file']}: {shard['tokens']:,} tokens")


if __name__ == "__main__":
    main()
